//! The wire: lines in, lines out, and the JSON-RPC 2.0 envelope around each.
//!
//! Pure: bytes in, values out, no I/O and no clock. What a method's parameters mean is in `api::call`; descriptors
//! that travel beside the bytes are in `api::scm`. The server and the client use the same code.
//!
//! A frame is one line, UTF-8, one JSON object. Lines of white space are ignored. Batches are refused: requests can
//! be pipelined, so a batch would only be a second way to say the same, with limits of its own.

use std::io;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::api::methods::{ErrorData, JobInfo};
use crate::error::{Code, Error};

/// Longest `id` that a request may have, bytes of its string. Ids are kept for as long as the request is unanswered.
pub const ID_BYTES_MAX: usize = 128;

/// The notification that reports a job's progress.
pub const JOB_PROGRESS: &str = "job.progress";

/// An empty reader keeps at most this much memory, so that one long request does not cost a connection its size forever.
const IDLE_BYTES_MAX: usize = 64 << 10;

/// Parsers quote what they refuse; a message longer than this is cut.
const MESSAGE_BYTES_MAX: usize = 300;

/// What can be wrong with bytes on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A line is longer than the limit. The stream cannot be followed further.
    #[error("a line is longer than {bytes_max} bytes; the connection is closed")]
    FrameTooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// A line is not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// A line is JSON, but not a request.
    #[error("not a JSON-RPC 2.0 request: {0}")]
    Request(String),
    /// A reply is longer than the limit.
    #[error("the reply is longer than {bytes_max} bytes; select fewer tensors")]
    ReplyTooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// A value could not be written as JSON.
    #[error("cannot write a message: {0}")]
    Encode(String),
}

impl WireError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            WireError::FrameTooLarge { .. } => Code::ApiFrameTooLarge,
            WireError::Json(_) => Code::ApiBadJson,
            WireError::Request(_) => Code::ApiBadRequest,
            WireError::ReplyTooLarge { .. } => Code::ApiReplyTooLarge,
            WireError::Encode(_) => Code::Internal,
        }
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        Error::new(error.code(), error.to_string())
    }
}

/// Cuts a stream of bytes into lines.
///
/// Push what was read, then take frames until there is none; memory is then bounded by the limit plus one push.
/// Each byte is looked at once and moved at most once more than it is pushed.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    /// Where the first frame that was not taken begins.
    start: usize,
    /// No newline lies in `start..scanned`.
    scanned: usize,
    bytes_max: usize,
}

impl FrameReader {
    /// A reader that accepts lines of at most `bytes_max` bytes, the newline not counted.
    pub fn new(bytes_max: usize) -> Self {
        FrameReader { buffer: Vec::new(), start: 0, scanned: 0, bytes_max }
    }

    /// Appends bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.scanned = 0;
            self.buffer.clear();
            self.buffer.shrink_to(IDLE_BYTES_MAX);
        } else if self.start >= self.buffer.len() / 2 {
            // What is moved is no longer than what was taken since the last move: linear over all.
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its newline, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`WireError::FrameTooLarge`], also before the newline has come. It stays: nothing is taken after it.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, WireError> {
        let too_large = WireError::FrameTooLarge { bytes_max: self.bytes_max };
        loop {
            let rest = self.buffer.get(self.scanned..).unwrap_or_default();
            let Some(position) = rest.iter().position(|&byte| byte == b'\n') else {
                self.scanned = self.buffer.len();
                return if self.scanned - self.start > self.bytes_max { Err(too_large) } else { Ok(None) };
            };
            let (start, end) = (self.start, self.scanned + position);
            if end - start > self.bytes_max {
                return Err(too_large);
            }
            self.start = end + 1;
            self.scanned = end + 1;
            if !self.buffer[start..end].trim_ascii().is_empty() {
                return Ok(Some(&self.buffer[start..end]));
            }
        }
    }

    /// Whether a frame has begun that is not complete. Meaningful once [`FrameReader::next_frame`] gave `None`.
    pub fn mid_frame(&self) -> bool {
        self.start < self.buffer.len()
    }
}

/// The `id` of a request, echoed in its reply.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Id {
    /// `null`; also in the reply to a line whose id could not be read.
    Null,
    /// A number.
    Number(serde_json::Number),
    /// A string of at most [`ID_BYTES_MAX`] bytes.
    String(String),
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Id;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an id: a string, a number or null")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Id, E> {
                Ok(Id::Null)
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Id, E> {
                Ok(Id::Number(number.into()))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Id, E> {
                Ok(Id::Number(number.into()))
            }
            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Id, E> {
                serde_json::Number::from_f64(number).map(Id::Number).ok_or_else(|| E::custom("not finite"))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Id, E> {
                if text.len() > ID_BYTES_MAX {
                    return Err(E::custom(format_args!("an id is longer than {ID_BYTES_MAX} bytes")));
                }
                Ok(Id::String(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// One request, its parameters not looked at yet.
#[derive(Debug)]
pub struct Request {
    /// Absent in a notification, which gets no reply.
    pub id: Option<Id>,
    /// Name of the method.
    pub method: String,
    /// An object, or absent. Valid JSON, but not yet of the method's type.
    pub params: Option<Box<RawValue>>,
}

/// A line that is no request, and the id to answer it with as far as one could be read.
#[derive(Debug)]
pub struct Refused {
    /// The id for the error reply.
    pub id: Id,
    /// Why.
    pub error: WireError,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestForm {
    jsonrpc: String,
    #[serde(default, deserialize_with = "present")]
    id: Option<Id>,
    method: String,
    #[serde(default)]
    params: Option<Box<RawValue>>,
}

/// Tells `"id": null` from no id at all.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Id>, D::Error> {
    Id::deserialize(deserializer).map(Some)
}

/// Reads a request from a frame.
///
/// # Errors
/// [`Refused`] with `api.bad_json` or `api.bad_request`.
pub fn parse_request(frame: &[u8]) -> Result<Request, Refused> {
    let refused = |error| Refused { id: readable_id(frame), error };
    match opening(frame) {
        Some(b'{') => {}
        Some(b'[') => return Err(refused(WireError::Request("batches are not accepted".to_owned()))),
        _ => {
            // A bare scalar, or no JSON at all.
            let error = match serde_json::from_slice::<de::IgnoredAny>(frame) {
                Ok(_) => WireError::Request("not an object".to_owned()),
                Err(error) => parse_error(&error),
            };
            return Err(refused(error));
        }
    }
    let form: RequestForm = serde_json::from_slice(frame).map_err(|error| refused(parse_error(&error)))?;
    if form.jsonrpc != "2.0" {
        return Err(refused(WireError::Request("jsonrpc is not \"2.0\"".to_owned())));
    }
    if let Some(params) = &form.params
        && opening(params.get().as_bytes()) != Some(b'{')
    {
        return Err(refused(WireError::Request("params is not an object".to_owned())));
    }
    Ok(Request { id: form.id, method: form.method, params: form.params })
}

/// First byte that is not white space. A derived struct would also accept an array of its fields in order.
pub(super) fn opening(text: &[u8]) -> Option<u8> {
    text.trim_ascii_start().first().copied()
}

fn parse_error(error: &serde_json::Error) -> WireError {
    let text = cut(&error.to_string());
    match error.classify() {
        Category::Data => WireError::Request(text),
        Category::Io | Category::Syntax | Category::Eof => WireError::Json(text),
    }
}

/// `text` if it is short, else its beginning: messages quote what came from outside.
pub(super) fn cut(text: &str) -> String {
    if text.len() <= MESSAGE_BYTES_MAX {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)])
}

fn readable_id(frame: &[u8]) -> Id {
    #[derive(Deserialize)]
    struct OnlyId {
        id: Id,
    }
    if opening(frame) != Some(b'{') {
        return Id::Null;
    }
    serde_json::from_slice::<OnlyId>(frame).map_or(Id::Null, |only| only.id)
}

/// The `code` of a JSON-RPC error object: the standard's where it has one, else -32000. Clients match on the string.
pub fn error_number(code: Code) -> i64 {
    match code {
        Code::ApiBadJson => -32700,
        Code::ApiBadRequest => -32600,
        Code::ApiUnknownMethod => -32601,
        Code::ApiBadParams => -32602,
        Code::Internal => -32603,
        _ => -32000,
    }
}

/// The error object of a reply.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorObject {
    /// See [`error_number`].
    pub code: i64,
    /// What happened.
    pub message: String,
    /// The stable code and what goes with it.
    #[serde(default)]
    pub data: Option<ErrorData>,
}

/// The line that answers a request.
///
/// # Errors
/// `api.reply_too_large` if it would be longer than `bytes_max`, found before it is all in memory.
pub fn reply(id: &Id, result: &impl Serialize, bytes_max: usize) -> Result<Vec<u8>, WireError> {
    #[derive(Serialize)]
    struct Form<'a, T> {
        jsonrpc: &'static str,
        id: &'a Id,
        result: &'a T,
    }
    line(&Form { jsonrpc: "2.0", id, result }, bytes_max)
}

/// The line that refuses a request. `request` is the request's id in the log; it may be empty.
pub fn error_reply(id: &Id, error: &Error, request: &str) -> Vec<u8> {
    #[derive(Serialize)]
    struct Form<'a> {
        jsonrpc: &'static str,
        id: &'a Id,
        error: ErrorObject,
    }
    let mut data = ErrorData::from(error);
    request.clone_into(&mut data.request);
    let error =
        ErrorObject { code: error_number(error.code), message: error.message.clone(), data: Some(data) };
    // Strings and numbers only: writing them to memory cannot fail.
    line(&Form { jsonrpc: "2.0", id, error }, usize::MAX).unwrap_or_default()
}

/// The line that reports a job's progress.
///
/// # Errors
/// `api.reply_too_large` if it would be longer than `bytes_max`.
pub fn progress(job: &JobInfo, bytes_max: usize) -> Result<Vec<u8>, WireError> {
    call_line(None, JOB_PROGRESS, job, bytes_max)
}

/// The line of a request.
///
/// # Errors
/// [`WireError::Encode`] if `params` has no JSON form.
pub fn request(id: u64, method: &str, params: &impl Serialize) -> Result<Vec<u8>, WireError> {
    call_line(Some(id), method, params, usize::MAX)
}

fn call_line(
    id: Option<u64>,
    method: &str,
    params: &impl Serialize,
    bytes_max: usize,
) -> Result<Vec<u8>, WireError> {
    #[derive(Serialize)]
    struct Form<'a, T> {
        jsonrpc: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
        method: &'a str,
        params: &'a T,
    }
    line(&Form { jsonrpc: "2.0", id, method, params }, bytes_max)
}

/// Bytes written, up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.bytes_max - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn line(message: &impl Serialize, bytes_max: usize) -> Result<Vec<u8>, WireError> {
    let mut out = Bounded { bytes: Vec::with_capacity(256), bytes_max };
    match serde_json::to_writer(&mut out, message) {
        Ok(()) => {
            out.bytes.push(b'\n');
            Ok(out.bytes)
        }
        Err(error) if error.is_io() => Err(WireError::ReplyTooLarge { bytes_max }),
        Err(error) => Err(WireError::Encode(cut(&error.to_string()))),
    }
}

/// What a client receives: a reply to one of its requests, or a notification.
#[derive(Debug)]
pub enum Message {
    /// The reply with this id.
    Reply {
        /// The request's id.
        id: Id,
        /// What the method gave.
        outcome: Result<Box<RawValue>, ErrorObject>,
    },
    /// A notification.
    Notification {
        /// Its method.
        method: String,
        /// Its content.
        params: Option<Box<RawValue>>,
    },
}

/// Reads what a daemon sent. Unknown fields are ignored: replies may gain some.
///
/// # Errors
/// `api.bad_json`, or `api.bad_request` if it is neither a reply nor a notification.
pub fn parse_message(frame: &[u8]) -> Result<Message, WireError> {
    #[derive(Deserialize)]
    struct Form {
        jsonrpc: String,
        #[serde(default, deserialize_with = "present")]
        id: Option<Id>,
        result: Option<Box<RawValue>>,
        error: Option<ErrorObject>,
        method: Option<String>,
        params: Option<Box<RawValue>>,
    }
    let form: Form = serde_json::from_slice(frame).map_err(|error| parse_error(&error))?;
    match form {
        Form { jsonrpc, .. } if jsonrpc != "2.0" => {
            Err(WireError::Request("jsonrpc is not \"2.0\"".to_owned()))
        }
        Form { id: Some(id), result: Some(result), error: None, method: None, .. } => {
            Ok(Message::Reply { id, outcome: Ok(result) })
        }
        Form { id: Some(id), result: None, error: Some(error), method: None, .. } => {
            Ok(Message::Reply { id, outcome: Err(error) })
        }
        Form { id: None, result: None, error: None, method: Some(method), params, .. } => {
            Ok(Message::Notification { method, params })
        }
        _ => Err(WireError::Request("neither a reply nor a notification".to_owned())),
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
