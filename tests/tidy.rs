//! The rules of the repository that no compiler holds. Each failure states its rule; `docs/architecture.md` has the reasons.

#![allow(clippy::unwrap_used, reason = "a rule that cannot read the source has failed")]

#[path = "tidy/layers.rs"]
mod layers;
#[path = "tidy/source.rs"]
mod source;

use source::{File, files, words};

/// A file that is longer is not read in one sitting.
const LINES_MAX: usize = 600;
/// The glossary has `shard thread`, `job` and `region` for these.
const WORDS_REFUSED: &[&str] = &["worker", "workers", "executor", "Worker", "Executor"];

fn product() -> Vec<File> {
    files(&["src"])
}

#[track_caller]
fn none(rule: &str, violations: Vec<String>) {
    assert!(violations.is_empty(), "\nRULE: {rule}\n  {}\n", violations.join("\n  "));
}

/// Every place in the product's code where one of `patterns` stands.
fn places(file: &File, text: &str, patterns: &[&str]) -> Vec<String> {
    patterns
        .iter()
        .flat_map(|pattern| text.match_indices(pattern))
        .map(|(at, what)| format!("{}: {what}", file.place(at)))
        .collect()
}

#[test]
fn layers_call_only_what_lies_below_them() {
    let mut violations = Vec::new();
    for file in product() {
        let module = file.module();
        if module == ["lib"] {
            continue;
        }
        let root = if module == ["main"] { "lodestream" } else { "crate" };
        for (at, target) in layers::uses(&file.product, root) {
            if let Some(refusal) = layers::refusal(&module, &target) {
                violations.push(format!("{}: {refusal}", file.place(at)));
            }
        }
    }
    none("a module uses only the modules that tests/tidy/layers.rs gives it", violations);
}

/// Invariant 1.
#[test]
fn unsafe_stands_only_where_the_operating_system_is_called() {
    let violations = files(&["src", "tests", "benches"])
        .iter()
        .filter(|file| !file.path.starts_with("src/sys/"))
        .flat_map(|file| words(&file.code, "unsafe").map(|at| file.place(at)).collect::<Vec<_>>())
        .collect();
    none("`unsafe` stands only in src/sys and ffi (invariant 1)", violations);
}

#[test]
fn the_environment_is_read_only_by_the_configuration() {
    let violations = product()
        .iter()
        .filter(|file| !file.path.starts_with("src/config/"))
        .flat_map(|file| places(file, &file.product, &["env::var", "env::set_var", "env::remove_var"]))
        .collect();
    none("the environment is read only in src/config (and by clap's `env` attributes)", violations);
}

#[test]
fn errors_are_returned_and_nothing_is_left_undone() {
    let panics = [".unwrap()", ".expect(", "todo!(", "unimplemented!("];
    let mut violations: Vec<_> =
        product().iter().flat_map(|file| places(file, &file.product, &panics)).collect();
    // In comments too; spelt in two parts, or this file would find itself.
    let markers = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    for file in files(&["src", "tests", "benches", "ffi"]) {
        for marker in markers {
            violations.extend(words(&file.text, marker).map(|at| format!("{}: {marker}", file.place(at))));
        }
    }
    none("outside tests no unwrap and no expect; nowhere a note of unfinished work", violations);
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let violations = files(&["src", "tests", "benches", "ffi"])
        .iter()
        .map(|file| (file.text.lines().count(), &file.path))
        .filter(|(lines, _)| *lines > LINES_MAX)
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    none("a file has at most 600 lines: split it where its subjects part", violations);
}

#[test]
fn words_are_those_of_the_glossary() {
    let mut violations = Vec::new();
    for file in product() {
        for word in WORDS_REFUSED {
            violations.extend(words(&file.text, word).map(|at| format!("{}: {word}", file.place(at))));
        }
    }
    none("names come from the glossary of docs/architecture.md: shard thread, job, region, …", violations);
}

#[test]
fn every_error_code_is_used() {
    let all = product();
    let table = all.iter().find(|file| file.path == "src/error.rs").unwrap();
    let names: Vec<&str> = table
        .text
        .lines()
        .filter_map(|line| line.trim().split_once(" = \""))
        .map(|(name, _)| name)
        .filter(|name| {
            name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(char::is_alphanumeric)
        })
        .collect();
    assert_eq!(names.len(), lodestream::Code::ALL.len(), "the table in src/error.rs could not be read");
    let violations = names
        .into_iter()
        .filter(|name| {
            let path = format!("Code::{name}");
            !all.iter().any(|file| file.path != table.path && words(&file.product, &path).next().is_some())
        })
        .map(|name| format!("Code::{name}"))
        .collect();
    none("every error code of src/error.rs is used somewhere in src", violations);
}

#[test]
fn every_invariant_is_defended_by_a_test_that_cites_it() {
    let all = files(&["src", "tests", "ffi"]);
    let lib = all.iter().find(|file| file.path == "src/lib.rs").unwrap();
    let numbers: Vec<u32> = lib
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("//! ")?.split_once(". ")?.0.parse().ok())
        .collect();
    assert_eq!(
        numbers,
        (1..=u32::try_from(numbers.len()).unwrap()).collect::<Vec<_>>(),
        "src/lib.rs numbers them"
    );
    assert!(!numbers.is_empty(), "RULE: src/lib.rs lists the numbered invariants as `//! 1. …`");
    let tests: String = all.iter().map(File::test_text).collect();
    let violations = numbers
        .into_iter()
        .filter(|number| words(&tests, &format!("Invariant {number}")).next().is_none())
        .map(|number| format!("Invariant {number}"))
        .collect();
    none("every invariant of src/lib.rs is cited, as `Invariant N`, by a test that defends it", violations);
}

mod the_rules_themselves {
    use super::{layers, source};

    #[test]
    fn comments_and_literals_are_blanked_and_lifetimes_are_not() {
        let text = "a /* x /* y */ unsafe */ b // unsafe\n\"un\\\"safe\" r#\"unsafe\"# '\\'' 'u' fn f<'a>(x: &'a u8) {}";
        let code = source::blank(text);
        assert_eq!(code.len(), text.len());
        assert!(!code.contains("unsafe") && !code.contains("'u'"), "{code}");
        assert!(code.contains("fn f<'a>(x: &'a u8) {}"), "{code}");
    }

    #[test]
    fn test_items_are_blanked_with_their_body_only() {
        let code =
            "fn a() {} #[cfg(test)] mod tests { fn b() { {} } } fn c() {} #[cfg(test)] mod more; fn d() {}";
        let product = source::without_tests(code);
        assert!(
            product.contains("fn a") && product.contains("fn c") && product.contains("fn d"),
            "{product}"
        );
        assert!(!product.contains("fn b") && !product.contains("more"), "{product}");
    }

    #[test]
    fn use_groups_are_opened() {
        let code = "use crate::{api::{methods::{A, B as C}, wire}, error::Code}; crate::sys::mem::map(x); crate::Error";
        let paths: Vec<_> = layers::uses(code, "crate").into_iter().map(|(_, path)| path).collect();
        assert_eq!(
            paths,
            [
                "api::methods::A",
                "api::methods::B",
                "api::wire",
                "error::Code",
                "sys::mem::map",
                "error::Error"
            ]
        );
    }

    #[test]
    fn a_call_upwards_is_refused_and_one_downwards_is_not() {
        assert!(layers::refusal(&["shard", "run"], "transfer::Job").is_some());
        assert!(layers::refusal(&["client"], "sys::mem::Region").is_some());
        assert!(layers::refusal(&["api", "methods"], "api::server::Server").is_some());
        assert!(layers::refusal(&["cli", "attach"], "daemon").is_some());
        assert!(layers::refusal(&["config"], "telemetry").is_some());
        assert!(layers::refusal(&["new_module"], "error::Code").is_some());
        assert!(layers::refusal(&["shard", "run"], "sys::uring::Ring").is_none());
        assert!(layers::refusal(&["client"], "sys::map::ReadMap").is_none());
        assert!(layers::refusal(&["cli", "serve"], "daemon::run").is_none());
        assert!(layers::refusal(&["api", "server"], "tier::residency").is_none());
    }
}
