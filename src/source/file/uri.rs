//! From what a tenant wrote to a path: `file:///…` or an absolute path, with no way up.

use std::path::PathBuf;

use crate::error::Code;
use crate::json::shown;

/// Why a source does not name a path.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    #[error("'{}' is neither an absolute path nor a URI: {why}", shown(uri))]
    Invalid { uri: String, why: &'static str },
    #[error("this node does not read from '{}:': use file:///… or an absolute path", shown(scheme))]
    Scheme { scheme: String },
    #[error("'{}' must not contain '..' or a zero byte", shown(uri))]
    Outside { uri: String },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Invalid { .. } => Code::SourceUriInvalid,
            Error::Scheme { .. } => Code::SourceSchemeUnsupported,
            Error::Outside { .. } => Code::SourceFileOutsideRoot,
        };
        crate::Error::new(code, error.to_string())
    }
}

/// The absolute path that `uri` names, without `.`, doubled or trailing slashes.
pub(super) fn local_path(uri: &str) -> Result<PathBuf, Error> {
    let invalid = |why| Error::Invalid { uri: uri.to_owned(), why };
    if uri.starts_with('/') {
        return normal(uri, uri);
    }
    let Some((scheme, rest)) = uri.split_once(':').filter(|(scheme, _)| is_scheme(scheme)) else {
        return Err(invalid("write it from '/'"));
    };
    if !scheme.eq_ignore_ascii_case("file") {
        return Err(Error::Scheme { scheme: scheme.to_owned() });
    }
    let path = rest.strip_prefix("//").ok_or_else(|| invalid("a file URI starts with 'file:///'"))?;
    if !path.starts_with('/') {
        return Err(invalid("a file URI names no host"));
    }
    if path.contains(['?', '#']) {
        return Err(invalid("write '?' as %3F and '#' as %23"));
    }
    let path = percent_decoded(path).ok_or_else(|| invalid("its percent-encoding is not UTF-8 text"))?;
    normal(&path, uri)
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let high = char::from(rest.next()?).to_digit(16)?;
            let low = char::from(rest.next()?).to_digit(16)?;
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

fn normal(path: &str, uri: &str) -> Result<PathBuf, Error> {
    let mut normal = PathBuf::from("/");
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(Error::Outside { uri: uri.to_owned() }),
            part if part.contains('\0') => return Err(Error::Outside { uri: uri.to_owned() }),
            part => normal.push(part),
        }
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(uri: &str) -> Code {
        crate::Error::from(local_path(uri).unwrap_err()).code
    }

    #[test]
    fn paths_and_file_uris_name_the_same() {
        for uri in ["/models/a b", "file:///models/a%20b", "FILE:///models//./a%20b/", "/models/a b/."] {
            assert_eq!(local_path(uri).unwrap(), PathBuf::from("/models/a b"), "{uri}");
        }
        // A bare path is taken literally.
        assert_eq!(local_path("/models/a%20b#?").unwrap(), PathBuf::from("/models/a%20b#?"));
        assert_eq!(local_path("file:///%C3%A4").unwrap(), PathBuf::from("/ä"));
    }

    #[test]
    fn what_is_no_path_has_its_code() {
        for uri in ["s3://bucket/a", "https://host/a", "peer://digest", "x-y.z+1:a"] {
            assert_eq!(code(uri), Code::SourceSchemeUnsupported, "{uri}");
        }
        let invalid = [
            "",
            "models",
            "./a",
            ":a",
            "1a:b",
            "file:",
            "file:a",
            "file:/a",
            "file://host/a",
            "file://",
            "file:///%",
            "file:///%2",
            "file:///%zz",
            "file:///%ff",
            "file:///a?b",
            "file:///a#b",
        ];
        for uri in invalid {
            assert_eq!(code(uri), Code::SourceUriInvalid, "{uri}");
        }
        for uri in ["/a/../b", "/..", "file:///a/%2e%2e/b", "file:///a%2F..%2Fb", "/a\0b", "file:///a%00b"] {
            assert_eq!(code(uri), Code::SourceFileOutsideRoot, "{uri}");
        }
    }

    proptest! {
        #[test]
        fn a_path_never_leads_up(uri in "(file://)?/[a-z./%2e0]{0,24}") {
            if let Ok(path) = local_path(&uri) {
                prop_assert!(path.is_absolute());
                let plain = path.components().skip(1).all(|part| matches!(part, std::path::Component::Normal(_)));
                prop_assert!(plain);
            }
        }
    }
}
