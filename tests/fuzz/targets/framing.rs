//! Any bytes in any pieces: the frames are those of the whole split at newlines, and memory stays within the limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::api::wire::FrameReader;

const BYTES_MAX: usize = 64;

/// The reference: the whole, split at newlines; nothing after a line that is too long.
fn expected(whole: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut frames = Vec::new();
    let mut lines = whole.split(|&byte| byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        if line.len() > BYTES_MAX {
            return (frames, true);
        }
        let complete = lines.peek().is_some();
        if complete && !line.trim_ascii().is_empty() {
            frames.push(line);
        }
    }
    (frames, false)
}

fuzz_target!(|input: (Vec<u8>, Vec<u8>)| {
    let (cuts, whole) = input;
    let (frames, too_large) = expected(&whole);
    let mut reader = FrameReader::new(BYTES_MAX);
    let (mut seen, mut failed, mut rest) = (0, false, whole.as_slice());
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() && !failed {
        let cut = cuts.next().map_or(1, |&cut| usize::from(cut).max(1));
        let (now, later) = rest.split_at(cut.min(rest.len()));
        reader.push(now);
        rest = later;
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => {
                    assert_eq!(frame, frames[seen]);
                    seen += 1;
                }
                Ok(None) => break,
                Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
    }
    assert_eq!((seen, failed), (frames.len(), too_large));
    let unfinished = whole.rsplit(|&byte| byte == b'\n').next().is_some_and(|line| !line.is_empty());
    assert!(failed || reader.mid_frame() == unfinished);
});
