//! Frames: a length of four bytes, then that many. All integers are little-endian.
//!
//! Pure functions over slices: what is read is checked before it is used, and nothing is allocated by what a length says.

/// Length of a frame's body, bytes: the largest that either side takes.
pub const BODY_BYTES_MAX: usize = 64 << 10;
/// Length of a frame's length, bytes.
pub const PREFIX_BYTES: usize = 4;

/// Why bytes are not what the protocol has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A length is 0 or above the limit.
    #[error("a frame of {bytes} bytes, where 1 to {max} are allowed")]
    Length {
        /// What was said.
        bytes: u32,
        /// The limit.
        max: usize,
    },
    /// A frame ends before what it should hold.
    #[error("a frame that is too short")]
    Short,
    /// A frame goes on after what it should hold.
    #[error("a frame with bytes behind its end")]
    Trailing,
    /// No message has this number.
    #[error("a message of the unknown kind {0}")]
    Kind(u8),
    /// A field has a value that it cannot have.
    #[error("a message with a bad {0}")]
    Field(&'static str),
    /// A message that does not belong there.
    #[error("another message than was expected")]
    Unexpected,
}

/// The length of a body, from its prefix.
///
/// # Errors
/// [`Malformed::Length`].
pub fn length(prefix: [u8; PREFIX_BYTES], max: usize) -> Result<usize, Malformed> {
    let bytes = u32::from_le_bytes(prefix);
    match usize::try_from(bytes) {
        Ok(length) if (1..=max.min(BODY_BYTES_MAX)).contains(&length) => Ok(length),
        _ => Err(Malformed::Length { bytes, max }),
    }
}

/// Writes a frame whose body is what `body` appends.
pub fn write(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; PREFIX_BYTES]);
    body(out);
    let length = out.len() - start - PREFIX_BYTES;
    debug_assert!((1..=BODY_BYTES_MAX).contains(&length), "a frame of {length} bytes");
    // Every message is far below 4 GiB: the longest field has a limit of its own.
    out[start..start + PREFIX_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
}

/// Takes fields off the front of a body.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(bytes).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Trailing) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_limit() {
        let bytes = |length: u32| super::length(length.to_le_bytes(), 100);
        assert_eq!((bytes(1), bytes(100)), (Ok(1), Ok(100)));
        for wrong in [0, 101, u32::MAX] {
            assert_eq!(bytes(wrong), Err(Malformed::Length { bytes: wrong, max: 100 }));
        }
        let above = BODY_BYTES_MAX as u32 + 1;
        assert!(length(above.to_le_bytes(), usize::MAX).is_err());
    }

    #[test]
    fn a_frame_says_its_length() {
        let mut out = vec![9];
        write(&mut out, |body| body.extend(b"abc"));
        assert_eq!(out, [9, 3, 0, 0, 0, b'a', b'b', b'c']);
    }
}
