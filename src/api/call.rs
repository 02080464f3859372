//! The methods of the socket API as one closed enum: the table of names, requests and replies.
//!
//! The table below is the only place that binds a method's name to its types; parsing and the JSON Schema come from it.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::api::methods::*;
use crate::api::wire;
use crate::error::{Code, Error};

/// What can be wrong with a method's name or parameters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No such method.
    #[error("there is no method {0:?}")]
    UnknownMethod(String),
    /// The parameters are not of the method's type.
    #[error("{method}: {reason}")]
    BadParams {
        /// The method.
        method: &'static str,
        /// What is wrong with them.
        reason: String,
    },
}

impl CallError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            CallError::UnknownMethod(_) => Code::ApiUnknownMethod,
            CallError::BadParams { .. } => Code::ApiBadParams,
        }
    }
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        Error::new(error.code(), error.to_string())
    }
}

macro_rules! calls {
    ($($variant:ident $name:literal $request:ty => $reply:ty;)*) => {
        /// A request of the socket API. The variants are the public interface of the daemon.
        #[derive(Debug, Clone)]
        pub enum Call {
            $(#[doc = concat!("`", $name, "`")] $variant($request),)*
        }

        impl Call {
            /// Names of all methods, in the order of the table.
            pub const METHODS: &[&str] = &[$($name,)*];

            /// The method's name.
            pub fn name(&self) -> &'static str {
                match self { $(Call::$variant(_) => $name,)* }
            }
        }

        /// Reads a method's parameters; absent ones are an empty object.
        ///
        /// # Errors
        /// `api.unknown_method` or `api.bad_params`.
        pub fn parse_call(method: &str, params: Option<&RawValue>) -> Result<Call, CallError> {
            match method {
                $($name => parse_params($name, params).map(Call::$variant),)*
                _ => Err(CallError::UnknownMethod(wire::cut(method))),
            }
        }

        /// For each method: its name and the schemas of its request and its reply.
        pub(super) fn schemas(
            requests: &mut schemars::SchemaGenerator,
            replies: &mut schemars::SchemaGenerator,
        ) -> Vec<(&'static str, schemars::Schema, schemars::Schema)> {
            vec![$(($name, requests.subschema_for::<$request>(), replies.subschema_for::<$reply>()),)*]
        }
    };
}

calls! {
    Hello "hello" HelloRequest => HelloReply;
    ArtifactResolve "artifact.resolve" ResolveRequest => ResolveReply;
    ArtifactPrefetch "artifact.prefetch" PrefetchRequest => PrefetchReply;
    ArtifactAttach "artifact.attach" AttachRequest => AttachReply;
    ArtifactList "artifact.list" ListRequest => ListReply;
    ArtifactStat "artifact.stat" ArtifactRequest => ArtifactReply;
    ArtifactPin "artifact.pin" ArtifactRequest => ArtifactReply;
    ArtifactUnpin "artifact.unpin" ArtifactRequest => ArtifactReply;
    ArtifactEvict "artifact.evict" ArtifactRequest => ArtifactReply;
    LeaseRelease "lease.release" ReleaseRequest => EmptyReply;
    JobGet "job.get" JobRequest => JobReply;
    JobWait "job.wait" JobWaitRequest => JobReply;
    JobCancel "job.cancel" JobRequest => JobReply;
    JobList "job.list" JobListRequest => JobListReply;
    NodeStatus "node.status" StatusRequest => StatusReply;
    NodePeers "node.peers" PeersRequest => PeersReply;
    NodeTopology "node.topology" TopologyRequest => crate::topology::Topology;
}

fn parse_params<'a, T: Deserialize<'a>>(
    method: &'static str,
    params: Option<&'a RawValue>,
) -> Result<T, CallError> {
    let text = params.map_or("{}", RawValue::get);
    if wire::opening(text.as_bytes()) != Some(b'{') {
        return Err(CallError::BadParams { method, reason: "params is not an object".to_owned() });
    }
    serde_json::from_str(text)
        .map_err(|error| CallError::BadParams { method, reason: wire::cut(&error.to_string()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &str, params: &str) -> Result<Call, CallError> {
        parse_call(method, Some(&RawValue::from_string(params.to_owned()).unwrap()))
    }

    #[test]
    fn every_method_of_the_table_is_reached_by_its_name() {
        for &method in Call::METHODS {
            match parse(method, "{}") {
                Ok(call) => assert_eq!(call.name(), method),
                Err(error) => assert_eq!(error.code(), Code::ApiBadParams, "{method}: {error}"),
            }
        }
        assert_eq!(Call::METHODS.len(), 17);
    }

    #[test]
    fn absent_params_are_an_empty_object() {
        assert!(matches!(parse_call("node.status", None), Ok(Call::NodeStatus(_))));
        assert_eq!(parse_call("job.get", None).unwrap_err().code(), Code::ApiBadParams);
    }

    #[test]
    fn defaults_are_those_of_the_types() {
        let Ok(Call::ArtifactAttach(request)) = parse("artifact.attach", r#"{"source":"/m"}"#) else {
            panic!("an attach");
        };
        assert_eq!((request.device.as_str(), request.wait, request.notify), ("host", true, false));
        assert_eq!(request.source, Some(Source::Uri("/m".to_owned())));
    }

    #[test]
    fn misspelt_and_mistyped_params_are_refused() {
        for (method, params) in [
            ("artifact.prefetch", r#"{"source":"/m","prioritty":1}"#),
            ("artifact.prefetch", r#"{"source":7}"#),
            ("artifact.prefetch", r#"{"source":"/m","source":"/n"}"#),
            ("artifact.prefetch", r#"{"source":{"fds":-1}}"#),
            ("artifact.prefetch", r#"{"source":{"fds":1,"extra":0}}"#),
            ("artifact.prefetch", r#"{"source":[1]}"#),
            ("artifact.prefetch", r#"{"source":[1,["a"]]}"#),
            ("artifact.prefetch", r#"{"source":"/m","select":[["*",0,8,1]]}"#),
            ("artifact.prefetch", r#"{"source":"/m","priority":2147483648}"#),
            ("artifact.prefetch", r#"{"source":"/m","deadline_ms":-1}"#),
            ("artifact.prefetch", r#"{"source":"/m","select":[{"name":"*","dim":0,"of":8}]}"#),
            ("job.get", r#"{"job":"1"}"#),
            ("job.get", "[1]"),
            ("node.status", r#"{"x":1}"#),
            ("node.status", "null"),
        ] {
            assert_eq!(parse(method, params).unwrap_err().code(), Code::ApiBadParams, "{method} {params}");
        }
    }

    #[test]
    fn an_unknown_method_is_quoted_but_not_at_length() {
        let error = parse_call(&"x".repeat(100_000), None).unwrap_err();
        assert_eq!(error.code(), Code::ApiUnknownMethod);
        assert!(error.to_string().len() < 1000);
    }

    #[test]
    fn deep_nesting_is_refused_and_not_followed() {
        let deep = format!(r#"{{"source":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(parse("artifact.resolve", &deep).unwrap_err().code(), Code::ApiBadParams);
    }
}
