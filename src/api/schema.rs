//! The JSON Schema of the socket API, generated from the types in `api::methods`; `docs/schema/api.json` is its copy.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::api::call;
use crate::api::methods::{ErrorData, JobInfo, VERSIONS};
use crate::api::wire::JOB_PROGRESS;

/// The document: `methods.<name>.request` and `.reply`, `notifications.<name>` and `error` are schemas; what they
/// refer to is below `requests.$defs` and `replies.$defs` (a field with a default may be absent from a request, but
/// is always in a reply).
pub fn document() -> Value {
    let mut requests = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/requests/$defs".into())
        .into_generator();
    let mut replies = SchemaSettings::draft2020_12()
        .for_serialize()
        .with(|settings| settings.definitions_path = "/replies/$defs".into())
        .into_generator();
    let methods: Map<String, Value> = call::schemas(&mut requests, &mut replies)
        .into_iter()
        .map(|(name, request, reply)| (name.to_owned(), json!({ "request": request, "reply": reply })))
        .collect();
    let progress = replies.subschema_for::<JobInfo>();
    let error = replies.subschema_for::<ErrorData>();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The socket API of Lodestream",
        "versions": VERSIONS,
        "methods": methods,
        "notifications": { JOB_PROGRESS: progress },
        "error": error,
        "requests": { "$defs": requests.take_definitions(false) },
        "replies": { "$defs": replies.take_definitions(false) },
    })
}
