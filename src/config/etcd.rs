//! `[etcd]`: where nodes tell each other which artifacts they have.

use std::path::PathBuf;

use serde::Serialize;

use super::ConfigError;
use super::check::{bounded, integer};
use super::layers::Layers;
use super::origin::Given;
use super::raw::RawEtcd;

/// Length of `etcd.prefix`, and of a user's name.
const TEXT_BYTES_MAX: usize = 256;
/// What an endpoint looks like.
const ENDPOINT: &str = "http://host:port, or https://host:port with etcd.ca";

/// The directory in etcd.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Etcd {
    /// `https://host:port`, each a member of one cluster. Empty: etcd is not used.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// Certificates (PEM) that etcd's certificate must lead to; needed for `https://`.
    pub ca: Option<PathBuf>,
    /// Certificate (PEM) that this node shows to etcd.
    pub certificate: Option<PathBuf>,
    /// Its key (PEM).
    pub key: Option<PathBuf>,
    /// Name of the user in etcd.
    pub user: Option<String>,
    /// A file with the user's password.
    pub password_file: Option<PathBuf>,
    /// How long after a node's death others go on seeing what it had, seconds.
    pub ttl_s: u64,
    /// Most time for one request, milliseconds.
    pub timeout_ms: u64,
}

impl Default for Etcd {
    fn default() -> Self {
        Etcd {
            endpoints: Vec::new(),
            prefix: "/lodestream".to_owned(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password_file: None,
            ttl_s: 10,
            timeout_ms: 3000,
        }
    }
}

/// Checks the table.
pub(super) fn etcd(layers: &Layers<'_>, raw: RawEtcd, default: Etcd) -> Result<Etcd, ConfigError> {
    let endpoints = bounded(layers.file_list("etcd.endpoints", raw.endpoints))?;
    let ca = layers.file("etcd.ca", raw.ca);
    let certificate = layers.file("etcd.certificate", raw.certificate);
    let key = layers.file("etcd.key", raw.key);
    let user = layers.file("etcd.user", raw.user);
    let password_file = layers.file("etcd.password_file", raw.password_file);

    together(&certificate, &key, "together with etcd.key, not without it")?;
    together(&key, &certificate, "together with etcd.certificate, not without it")?;
    together(&certificate, &ca, "together with etcd.ca, not without it")?;
    together(&user, &password_file, "together with etcd.password_file, not without it")?;
    together(&password_file, &user, "together with etcd.user, not without it")?;
    for given in &endpoints {
        let secure = endpoint(given)?;
        if secure != ca.is_some() {
            return Err(given.invalid(ENDPOINT));
        }
        // The password would be there for everybody on the way to read.
        if let Some(user) = user.as_ref().filter(|_| !secure && !is_of_this_machine(&given.text)) {
            return Err(
                user.invalid("a user and a password only with https:// endpoints, or on this machine")
            );
        }
    }
    let text = |given: Given| {
        let fits = (1..=TEXT_BYTES_MAX).contains(&given.text.len());
        if fits { Ok(given.text) } else { Err(given.invalid(format!("1 to {TEXT_BYTES_MAX} bytes"))) }
    };
    let path = |given: Option<Given>| given.map(|given| given.absolute_path()).transpose();
    Ok(Etcd {
        endpoints: endpoints.into_iter().map(|given| given.text).collect(),
        prefix: layers.file("etcd.prefix", raw.prefix).map_or(Ok(default.prefix), prefix)?,
        ca: path(ca)?,
        certificate: path(certificate)?,
        key: path(key)?,
        user: user.map(text).transpose()?,
        password_file: path(password_file)?,
        ttl_s: integer(layers.file("etcd.ttl_s", raw.ttl_s), default.ttl_s, 2..=3600)?,
        timeout_ms: integer(
            layers.file("etcd.timeout_ms", raw.timeout_ms),
            default.timeout_ms,
            100..=60_000,
        )?,
    })
}

/// The first is given only if the second is.
fn together(given: &Option<Given>, with: &Option<Given>, allowed: &str) -> Result<(), ConfigError> {
    match given {
        Some(given) if with.is_none() => Err(given.invalid(allowed)),
        _ => Ok(()),
    }
}

/// Whether this endpoint is one of TLS.
fn endpoint(given: &Given) -> Result<bool, ConfigError> {
    let (secure, rest) = match given.text.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => return Err(given.invalid(ENDPOINT)),
    };
    let host_and_port = rest.rsplit_once(':').is_some_and(|(host, port)| {
        let plain = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_[:]".contains(&byte));
        !host.is_empty() && plain && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if host_and_port { Ok(secure) } else { Err(given.invalid(ENDPOINT)) }
}

fn is_of_this_machine(endpoint: &str) -> bool {
    ["http://localhost:", "http://127.0.0.1:", "http://[::1]:"].iter().any(|host| endpoint.starts_with(host))
}

fn prefix(given: Given) -> Result<String, ConfigError> {
    let text = &given.text;
    let plain = text.len() <= TEXT_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic());
    if plain && text.len() > 1 && text.starts_with('/') && !text.ends_with('/') {
        Ok(given.text)
    } else {
        Err(given.invalid(format!(
            "a slash and 1 to {} printable ASCII characters, the last of them no slash",
            TEXT_BYTES_MAX - 1
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file, refused};
    use super::super::{Config, ServeArgs};
    use super::*;

    fn loaded(text: &str) -> Etcd {
        file(text, ServeArgs::default(), &[]).unwrap_or_else(|error| panic!("{error}: {text}")).etcd
    }

    #[test]
    fn without_the_table_there_is_no_etcd() {
        assert_eq!(loaded(""), Etcd::default());
        assert!(Config::default().etcd.endpoints.is_empty());
    }

    #[test]
    fn every_key_reaches_its_place() {
        let text = "[etcd]\nendpoints = ['https://a:2379', 'https://[::1]:2379']\nprefix = '/site/x'\nca = '/ca'\n\
                    certificate = '/c'\nkey = '/k'\nuser = 'u'\npassword_file = '/p'\nttl_s = 30\ntimeout_ms = 500\n";
        let expected = Etcd {
            endpoints: vec!["https://a:2379".to_owned(), "https://[::1]:2379".to_owned()],
            prefix: "/site/x".to_owned(),
            ca: Some("/ca".into()),
            certificate: Some("/c".into()),
            key: Some("/k".into()),
            user: Some("u".to_owned()),
            password_file: Some("/p".into()),
            ttl_s: 30,
            timeout_ms: 500,
        };
        assert_eq!(loaded(text), expected);
        let printed = Config { node: "n".to_owned(), etcd: expected.clone(), ..Config::default() };
        assert_eq!(loaded(&printed.to_toml().unwrap()), expected, "what is printed loads back");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        for text in [
            "endpoints = ['a:2379']",
            "endpoints = ['ftp://a:2379']",
            "endpoints = ['http://a']",
            "endpoints = ['http://:2379']",
            "endpoints = ['http://a:0']",
            "endpoints = ['http://u@a:2379']",
            "endpoints = ['http://a:2379/v3']",
            "endpoints = ['https://a:2379']",
            "endpoints = ['http://a:2379'], ca = '/ca'",
            "endpoints = ['https://a:2379', 'http://b:2379'], ca = '/ca'",
            "endpoints = ['http://a:2379'], user = 'u', password_file = '/p'",
            "certificate = '/c', ca = '/ca'",
            "key = '/k', ca = '/ca'",
            "certificate = '/c', key = '/k'",
            "user = 'u'",
            "password_file = '/p'",
            "user = '', password_file = '/p'",
            "ca = 'ca.pem'",
            "prefix = ''",
            "prefix = '/'",
            "prefix = 'lodestream'",
            "prefix = '/a/'",
            "prefix = '/a b'",
            "ttl_s = 1",
            "ttl_s = 3601",
            "timeout_ms = 99",
        ] {
            let message = refused(&format!("etcd = {{ {text} }}"));
            assert!(message.contains("etcd.") && message.contains("allowed: "), "{text}: {message}");
        }
        let local = "etcd = { endpoints = ['http://127.0.0.1:2379'], user = 'u', password_file = '/p' }";
        assert_eq!(loaded(local).user.as_deref(), Some("u"));
    }
}
