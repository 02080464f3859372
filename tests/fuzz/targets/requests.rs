//! Any line as a request, and as what a daemon sends. What is refused is answered with one line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::Error;
use lodestream::api::call::{Call, parse_call};
use lodestream::api::wire::{Id, error_reply, parse_message, parse_request, reply};

fn answered(id: &Id, error: &Error) {
    let line = error_reply(id, error, "r");
    assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1), "one line");
    parse_message(&line).expect("a reply that the client can read");
    assert!(line.len() < 16 << 10, "an error does not grow with the request");
}

fuzz_target!(|frame: &[u8]| {
    let _ = parse_message(frame);
    let request = match parse_request(frame) {
        Ok(request) => request,
        Err(refused) => return answered(&refused.id, &refused.error.into()),
    };
    let id = request.id.unwrap_or(Id::Null);
    match parse_call(&request.method, request.params.as_deref()) {
        Ok(call) => {
            assert_eq!(call.name(), request.method);
            assert!(Call::METHODS.contains(&call.name()));
            let line = reply(&id, &(), usize::MAX).expect("a reply without a limit");
            assert_eq!(line.last(), Some(&b'\n'));
        }
        Err(error) => answered(&id, &error.into()),
    }
});
