//! The checked-in JSON Schema is the one that the types give, and it says what the types say.

use lodestream::api::call::{Call, parse_call};
use lodestream::api::schema::document;
use lodestream::api::wire::parse_request;
use serde_json::{Value, json};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/schema/api.json");

#[test]
#[allow(clippy::disallowed_methods, reason = "a switch of this test, not of the program")]
fn the_checked_in_schema_is_the_generated_one() {
    let generated = format!("{:#}\n", document());
    if std::env::var("LODESTREAM_BLESS").as_deref() == Ok("1") {
        std::fs::write(PATH, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(
        checked_in == generated,
        "docs/schema/api.json is not what the types in src/api/methods.rs give; if the change is meant, run \
         LODESTREAM_BLESS=1 cargo test --test schema, and read docs/api.md for what else a change of the API needs"
    );
}

/// The schema of one request or reply, standing on its own.
fn part(pointer: &str) -> Value {
    let mut document = document();
    let reference = format!("#{pointer}");
    assert!(document.pointer(pointer).is_some(), "{pointer}");
    document["$ref"] = json!(reference);
    document
}

#[test]
fn every_method_has_a_request_and_a_reply() {
    let document = document();
    let methods = document["methods"].as_object().unwrap();
    assert_eq!(methods.len(), Call::METHODS.len());
    for method in Call::METHODS {
        for side in ["request", "reply"] {
            let pointer = format!("/methods/{method}/{side}");
            jsonschema::validator_for(&part(&pointer)).unwrap_or_else(|error| panic!("{pointer}: {error}"));
        }
    }
}

#[test]
fn the_schema_and_the_parser_agree_on_requests() {
    for (method, params) in [
        ("hello", json!({})),
        ("hello", json!({"versions": [1], "client": "test"})),
        ("hello", json!({"versions": "1"})),
        ("artifact.prefetch", json!({"source": "/m"})),
        (
            "artifact.prefetch",
            json!({"source": {"fds": 2, "names": ["a", "b"]}, "priority": -3, "pin": true}),
        ),
        ("artifact.prefetch", json!({"source": "/m", "prio": 1})),
        ("artifact.prefetch", json!({"source": {"fds": 1, "more": 1}})),
        ("artifact.prefetch", json!({})),
        (
            "artifact.attach",
            json!({"source": "/m", "select": ["*.q", {"name": "*", "dim": 0, "of": 8, "index": 1}]}),
        ),
        ("artifact.attach", json!({"source": "/m", "select": [{"name": "*", "dim": 0, "of": 8}]})),
        ("artifact.attach", json!({"source": "/m", "wait": 1})),
        ("lease.release", json!({"lease": 1})),
        ("lease.release", json!({"lease": -1})),
        ("job.wait", json!({"job": 1, "timeout_ms": null})),
        ("node.status", json!({"x": 1})),
    ] {
        let schema = part(&format!("/methods/{method}/request"));
        let by_schema = jsonschema::validator_for(&schema).unwrap().is_valid(&params);
        let text = serde_json::value::to_raw_value(&params).unwrap();
        assert_eq!(by_schema, parse_call(method, Some(&text)).is_ok(), "{method} {params}");
    }
}

#[test]
fn the_examples_of_the_documentation_are_requests_and_cover_every_method() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.md")).unwrap();
    let examples = page.lines().filter(|line| line.starts_with("ask '"));
    let examples = examples.flat_map(|line| line.split('\'').filter(|text| text.starts_with('{')));
    let called: Vec<&str> = examples
        .map(|example| {
            let request =
                parse_request(example.as_bytes()).unwrap_or_else(|error| panic!("{example}: {error:?}"));
            let call = parse_call(&request.method, request.params.as_deref());
            call.unwrap_or_else(|error| panic!("{example}: {error}")).name()
        })
        .collect();
    for method in Call::METHODS {
        assert!(called.contains(method), "docs/api.md has no example of {method}");
    }
}
