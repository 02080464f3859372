use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn frames(reader: &mut FrameReader) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        all.push(frame.to_vec());
    }
    all
}

fn json_of(line: &[u8]) -> Value {
    assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1, "one line");
    assert_eq!(line.last(), Some(&b'\n'));
    serde_json::from_slice(line).unwrap()
}

#[test]
fn lines_are_cut_wherever_the_pushes_fall() {
    let mut reader = FrameReader::new(100);
    reader.push(b"{\"a\"");
    assert!(frames(&mut reader).is_empty());
    assert!(reader.mid_frame());
    reader.push(b":1}\n\n \r\n{}\n{");
    assert_eq!(frames(&mut reader), [b"{\"a\":1}".to_vec(), b"{}".to_vec()]);
    assert!(reader.mid_frame());
    reader.push(b"}\n");
    assert_eq!(frames(&mut reader), [b"{}".to_vec()]);
    assert!(!reader.mid_frame());
}

#[test]
fn a_line_of_the_limit_passes_and_one_byte_more_fails_before_its_newline() {
    let mut reader = FrameReader::new(8);
    reader.push(b"12345678\n");
    assert_eq!(frames(&mut reader), [b"12345678".to_vec()]);
    reader.push(b"12345678");
    assert!(frames(&mut reader).is_empty());
    reader.push(b"9");
    assert_eq!(reader.next_frame(), Err(WireError::FrameTooLarge { bytes_max: 8 }));
    reader.push(b"\n{}\n");
    assert!(reader.next_frame().is_err(), "it stays");
    let mut reader = FrameReader::new(8);
    reader.push(b"{}\n123456789\n");
    assert_eq!(reader.next_frame().unwrap(), Some(&b"{}"[..]));
    assert!(reader.next_frame().is_err());
}

#[test]
fn an_idle_reader_gives_its_memory_back() {
    let mut reader = FrameReader::new(1 << 20);
    reader.push(&vec![b'x'; 1 << 20]);
    reader.push(b"\n");
    assert_eq!(frames(&mut reader).len(), 1);
    reader.push(b"{");
    assert!(reader.buffer.capacity() <= IDLE_BYTES_MAX);
}

#[test]
fn a_long_line_in_single_bytes_is_scanned_once() {
    // Quadratic, this is 8.8e12 comparisons and does not end.
    let mut reader = FrameReader::new(4 << 20);
    for _ in 0..4 << 20 {
        reader.push(b"x");
        assert!(reader.next_frame().unwrap().is_none());
    }
    reader.push(b"\n");
    assert_eq!(reader.next_frame().unwrap().map(<[u8]>::len), Some(4 << 20));
}

fn refusal(frame: &str) -> (Code, Id) {
    let refused = parse_request(frame.as_bytes()).expect_err(frame);
    (refused.error.code(), refused.id)
}

#[test]
fn requests_of_every_id() {
    let request = parse_request(br#" {"jsonrpc":"2.0","id":7,"method":"hello","params":{"a":[1]}}"#).unwrap();
    assert_eq!((request.id, request.method.as_str()), (Some(Id::Number(7.into())), "hello"));
    assert_eq!(request.params.unwrap().get(), r#"{"a":[1]}"#);
    let id = |text: &str| parse_request(text.as_bytes()).unwrap().id;
    assert_eq!(id(r#"{"jsonrpc":"2.0","id":"é","method":"m"}"#), Some(Id::String("é".to_owned())));
    assert_eq!(id(r#"{"jsonrpc":"2.0","id":null,"method":"m"}"#), Some(Id::Null));
    assert_eq!(id(r#"{"jsonrpc":"2.0","method":"m"}"#), None);
    assert_eq!(id(r#"{"jsonrpc":"2.0","id":-1,"method":"m"}"#), Some(Id::Number((-1).into())));
}

#[test]
fn what_is_not_json_is_bad_json() {
    for frame in ["nonsense", "{", "{\"jsonrpc\":\"2.0\"", "\u{feff}{}", "\"", "01"] {
        assert_eq!(refusal(frame), (Code::ApiBadJson, Id::Null), "{frame}");
    }
    assert_eq!(refusal(r#"{"jsonrpc":"2.0","id":1,"method":"m"} {}"#), (Code::ApiBadJson, Id::Null));
    assert_eq!(parse_request(b"{\"\xff\":1}").unwrap_err().error.code(), Code::ApiBadJson);
}

#[test]
fn what_is_json_but_no_request_is_a_bad_request_with_the_id_if_it_has_one() {
    for frame in [
        "1",
        "null",
        "[]",
        r#"[{"jsonrpc":"2.0","id":1,"method":"hello"}]"#,
        r#"["2.0",1,"hello"]"#,
        "{}",
        r#"{"jsonrpc":"2.0","id":true,"method":"m"}"#,
        r#"{"jsonrpc":"2.0","id":[1],"method":"m"}"#,
        r#"{"jsonrpc":"2.0","id":{},"method":"m"}"#,
    ] {
        assert_eq!(refusal(frame), (Code::ApiBadRequest, Id::Null), "{frame}");
    }
    for frame in [
        r#"{"jsonrpc":"1.0","id":3,"method":"m"}"#,
        r#"{"id":3,"method":"m"}"#,
        r#"{"jsonrpc":2.0,"id":3,"method":"m"}"#,
        r#"{"jsonrpc":"2.0","id":3}"#,
        r#"{"jsonrpc":"2.0","id":3,"method":5}"#,
        r#"{"jsonrpc":"2.0","id":3,"method":"m","extra":1}"#,
        r#"{"jsonrpc":"2.0","id":3,"method":"m","params":[1]}"#,
        r#"{"jsonrpc":"2.0","id":3,"method":"m","params":"x"}"#,
        r#"{"jsonrpc":"2.0","id":3,"method":"m","method":"n"}"#,
    ] {
        assert_eq!(refusal(frame), (Code::ApiBadRequest, Id::Number(3.into())), "{frame}");
    }
}

#[test]
fn ids_have_a_limit() {
    let frame = |bytes| format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"m"}}"#, "i".repeat(bytes));
    assert!(parse_request(frame(ID_BYTES_MAX).as_bytes()).is_ok());
    assert_eq!(refusal(&frame(ID_BYTES_MAX + 1)), (Code::ApiBadRequest, Id::Null));
}

#[test]
fn nesting_without_end_neither_overflows_the_stack_nor_passes() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(200_000), close.repeat(200_000));
        assert!(parse_request(deep.as_bytes()).is_err());
        assert!(parse_request(open.repeat(200_000).as_bytes()).is_err());
        let frame = format!(r#"{{"jsonrpc":"2.0","id":{deep},"method":"m"}}"#);
        assert!(parse_request(frame.as_bytes()).is_err());
    }
}

#[test]
fn replies_and_errors_have_the_form_of_the_standard() {
    let line = reply(&Id::String("a".to_owned()), &json!({"text": "two\nlines"}), 1000).unwrap();
    assert_eq!(json_of(&line), json!({"jsonrpc": "2.0", "id": "a", "result": {"text": "two\nlines"}}));
    let error = Error::new(Code::SourceFileNotFound, "no such file").kept("the lease");
    assert_eq!(
        json_of(&error_reply(&Id::Number(1.into()), &error, "r-7")),
        json!({"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "no such file", "data": {
            "code": "source.file.not_found", "message": "no such file", "retryable": false,
            "request": "r-7", "kept": "the lease"}}})
    );
    let number = |code| json_of(&error_reply(&Id::Null, &Error::new(code, ""), ""))["error"]["code"].clone();
    assert_eq!(number(Code::ApiBadJson), -32700);
    assert_eq!(number(Code::ApiBadRequest), -32600);
    assert_eq!(number(Code::ApiUnknownMethod), -32601);
    assert_eq!(number(Code::ApiBadParams), -32602);
    assert_eq!(number(Code::Internal), -32603);
}

#[test]
fn a_reply_past_the_limit_is_refused() {
    let fits = reply(&Id::Null, &"x".repeat(100), 1000).unwrap().len() - 1;
    assert!(reply(&Id::Null, &"x".repeat(100), fits).is_ok());
    let error = reply(&Id::Null, &"x".repeat(100), fits - 1).unwrap_err();
    assert_eq!(error.code(), Code::ApiReplyTooLarge);
}

#[test]
fn messages_to_the_client_are_told_apart() {
    let line = reply(&Id::Number(4.into()), &json!({"job": 1}), 1000).unwrap();
    let Message::Reply { id, outcome } = parse_message(&line).unwrap() else { panic!("a reply") };
    assert_eq!((id, outcome.unwrap().get()), (Id::Number(4.into()), r#"{"job":1}"#));
    let line = error_reply(&Id::Null, &Error::new(Code::JobTooMany, "too many"), "");
    let Message::Reply { outcome, .. } = parse_message(&line).unwrap() else { panic!("a reply") };
    assert_eq!(outcome.unwrap_err().data.unwrap().code, "job.too_many");
    let text = br#"{"jsonrpc":"2.0","method":"job.progress","params":{"job":1},"new":true}"#;
    let Message::Notification { method, params } = parse_message(text).unwrap() else {
        panic!("a notification")
    };
    assert_eq!((method.as_str(), params.unwrap().get()), (JOB_PROGRESS, r#"{"job":1}"#));
    for text in [
        r#"{"jsonrpc":"2.0","id":1}"#,
        r#"{"jsonrpc":"2.0","id":1,"result":1,"error":{"code":1,"message":""}}"#,
        r#"{"jsonrpc":"1.0","id":1,"result":1}"#,
        r#"{"jsonrpc":"2.0","id":1,"method":"x","result":1}"#,
        "[]",
        "{",
    ] {
        assert!(parse_message(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn what_the_client_writes_the_server_reads() {
    let line = request(9, "job.get", &json!({"job": 1})).unwrap();
    let parsed = parse_request(&line).unwrap();
    assert_eq!((parsed.id, parsed.method.as_str()), (Some(Id::Number(9.into())), "job.get"));
}

proptest! {
    /// The reference: split the whole at newlines. However it is pushed, the frames are the same.
    #[test]
    fn framing_does_not_depend_on_the_pushes(
        lines in prop::collection::vec("[ -~]{0,40}", 0..20),
        cuts in prop::collection::vec(1usize..30, 1..20),
    ) {
        let whole = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        let expected: Vec<_> =
            lines.iter().filter(|line| !line.trim().is_empty()).map(|line| line.clone().into_bytes()).collect();
        let mut reader = FrameReader::new(40);
        let (mut got, mut rest) = (Vec::new(), whole.as_bytes());
        for &cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(cut.min(rest.len()));
            reader.push(now);
            got.extend(frames(&mut reader));
            rest = later;
        }
        prop_assert_eq!(got, expected);
        prop_assert!(!reader.mid_frame());
    }

    #[test]
    fn no_line_makes_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Err(refused) = parse_request(&bytes) {
            prop_assert!(refused.error.to_string().len() < 2 * MESSAGE_BYTES_MAX);
        }
        let _ = parse_message(&bytes);
    }

    #[test]
    fn a_request_survives_the_way(id in any::<i64>(), method in "\\PC{0,20}", text in "\\PC{0,20}") {
        let params = json!({ "text": text });
        let frame = serde_json::to_vec(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}));
        let request = parse_request(&frame.unwrap()).unwrap();
        prop_assert_eq!(request.id, Some(Id::Number(id.into())));
        prop_assert_eq!(request.method, method);
        prop_assert_eq!(serde_json::from_str::<Value>(request.params.unwrap().get()).unwrap(), params);
    }
}
