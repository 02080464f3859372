//! The file as it is written: every key optional, unknown keys refused, each value with its place.
//!
//! Values are text until they are checked: a flag, a variable and a line of the file go through the same check.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

/// A value and where it stands in the file.
pub(super) type Field<T = Scalar> = Option<Spanned<T>>;

/// A text, an integer or a truth value, as text.
#[derive(Debug, Clone)]
pub(super) struct Scalar(pub(super) String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an integer, true or false")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar(text.to_owned()))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }

            fn visit_bool<E: Error>(self, truth: bool) -> Result<Scalar, E> {
                Ok(Scalar(truth.to_string()))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// A table of the file.
macro_rules! table {
    ($name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
    };
}

table!(RawConfig {
    node: Field,
    socket: Field,
    socket_mode: Field,
    roots: Field<Vec<Scalar>>,
    state_dir: Field,
    metrics_listen: Field,
    metrics_connections_max: Field,
    metrics_timeout_ms: Field,
    drain_timeout_ms: Field,
    host: RawHost,
    gpu: RawGpu,
    data_plane: RawDataPlane,
    peer: RawPeer,
    limits: RawLimits,
    etcd: RawEtcd,
    preload: Option<Vec<Spanned<RawPreload>>>,
    ready_after_preload: Field,
    log: RawLog,
});

table!(RawHost { budget_bytes: Field, ready_pool_bytes: Field, pages: Field, reserve_huge_pages: Field });

table!(RawGpu { budget_bytes: Field, devices: Field<Vec<Scalar>>, direct: Field, direct_probe_timeout_ms: Field });

table!(RawDataPlane {
    reader: Field,
    block_bytes: Field,
    depth: Field,
    slots: Field,
    shards: Field,
    pin: Field,
    page_cache: Field,
    landing: Field,
});

table!(RawLimits {
    connections_max: Field,
    connections_per_tenant_max: Field,
    request_bytes_max: Field,
    reply_bytes_max: Field,
    requests_in_flight_max: Field,
    leases_per_connection_max: Field,
    fds_per_message_max: Field,
    frame_timeout_ms: Field,
    write_timeout_ms: Field,
    jobs_max: Field,
    jobs_kept_max: Field,
    files_max: Field,
    tensors_max: Field,
    header_bytes_max: Field,
});

table!(RawPeer {
    listen: Field,
    advertise: Field,
    certificate: Field,
    key: Field,
    ca: Field,
    identities: Field<Vec<Scalar>>,
    peers: Field<Vec<Scalar>>,
    streams: Field,
    connections_max: Field,
    unauthenticated_max: Field,
    handshake_timeout_ms: Field,
    idle_timeout_ms: Field,
    chunk_timeout_ms: Field,
    window: Field,
    prefer: Field,
    tenants: Field<Vec<Scalar>>,
});

table!(RawEtcd {
    endpoints: Field<Vec<Scalar>>,
    prefix: Field,
    ca: Field,
    certificate: Field,
    key: Field,
    user: Field,
    password_file: Field,
    ttl_s: Field,
    timeout_ms: Field,
});

table!(RawPreload { source: Field, device: Field, priority: Field, pin: Field });

table!(RawLog { format: Field, level: Field });
