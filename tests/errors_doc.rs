//! `docs/errors.md` has exactly one section for each error code of `src/error.rs`.

use lodestream::Code;

const DOCUMENT: &str = include_str!("../docs/errors.md");

/// (code, text) of every section whose heading is a code in backticks.
fn sections() -> Vec<(&'static str, &'static str)> {
    DOCUMENT
        .split("\n## ")
        .skip(1)
        .map(|section| {
            let (heading, text) = section.split_once('\n').unwrap_or((section, ""));
            let code = heading.trim().strip_prefix('`').and_then(|rest| rest.strip_suffix('`'));
            (code.unwrap_or_else(|| panic!("the heading `{heading}` is not a code in backticks")), text)
        })
        .collect()
}

#[test]
fn every_code_has_a_section_and_every_section_a_code() {
    let sections = sections();
    let missing: Vec<_> =
        Code::ALL.iter().filter(|code| !sections.iter().any(|(name, _)| *name == code.as_str())).collect();
    assert!(
        missing.is_empty(),
        "docs/errors.md lacks these codes of src/error.rs; for each, say what happened, what was kept and what \
         to do:\n{}",
        missing.iter().map(|code| format!("\n## `{code}`\n")).collect::<String>()
    );
    for (name, _) in &sections {
        assert!(
            Code::parse(name).is_some(),
            "docs/errors.md documents `{name}`, which src/error.rs does not have"
        );
    }
    for (position, (name, _)) in sections.iter().enumerate() {
        assert!(
            !sections[..position].iter().any(|(other, _)| other == name),
            "docs/errors.md has `{name}` twice"
        );
    }
}

#[test]
fn every_section_says_something() {
    for (name, text) in sections() {
        assert!(
            text.split_whitespace().count() >= 8,
            "the section of `{name}` in docs/errors.md says too little"
        );
    }
}

#[test]
fn codes_are_unique_and_lower_case_words_with_dots() {
    for (position, code) in Code::ALL.iter().enumerate() {
        let text = code.as_str();
        assert!(
            text.split('.').all(|word| {
                word.starts_with(|c: char| c.is_ascii_lowercase())
                    && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            }),
            "`{text}` is not lower-case words joined by dots"
        );
        assert_eq!(
            Code::ALL.iter().position(|other| other.as_str() == text),
            Some(position),
            "`{text}` stands twice"
        );
        assert_eq!(Code::parse(text), Some(*code));
    }
}
