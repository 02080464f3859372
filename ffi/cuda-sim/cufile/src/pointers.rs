//! Pointers that a caller of the C API hands in.

use std::ffi::{CStr, c_char};

use crate::abi::Code;
use crate::failure::Answer;

/// A pointer of the C API through which a result goes out: null, or to places for as many `T` as the call says.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Writes the result. A null pointer is `INVALID_VALUE`.
    pub(crate) fn put(&self, value: T) -> Answer {
        self.put_at(0, value)
    }

    /// Writes one of several results.
    pub(crate) fn put_at(&self, index: usize, value: T) -> Answer {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE.into());
        }
        let place = self.0.wrapping_add(index);
        // SAFETY: only a caller of the C API makes an `Out`, and promises that it points to as many places for a `T` as
        // the call documents; callers of this stay below that number.
        unsafe { place.write_unaligned(value) };
        Ok(())
    }
}

impl<T: Copy> Out<T> {
    /// What the caller has put there. A null pointer is `INVALID_VALUE`.
    pub(crate) fn get(&self) -> Answer<T> {
        In(self.0.cast_const()).get()
    }
}

/// A pointer of the C API to an argument: null, or to so many `T` as the call says.
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T> In<T> {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

impl<T: Copy> In<T> {
    /// The argument. A null pointer is `INVALID_VALUE`.
    pub(crate) fn get(&self) -> Answer<T> {
        self.at(0)
    }

    /// One of several.
    pub(crate) fn at(&self, index: usize) -> Answer<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE.into());
        }
        let place = self.0.wrapping_add(index);
        // SAFETY: only a caller of the C API makes an `In`, and promises that it points to as many `T` as the call
        // documents; callers of this stay below that number.
        Ok(unsafe { place.read_unaligned() })
    }
}

/// A pointer of the C API to a text that ends with a zero, or null.
#[repr(transparent)]
pub(crate) struct InText(*const c_char);

impl InText {
    /// The text. Null, and bytes that are not UTF-8, are `INVALID_VALUE`.
    pub(crate) fn get(&self) -> Answer<String> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE.into());
        }
        // SAFETY: only a caller of the C API makes an `InText`, and promises that a zero ends what it points to.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(str::to_owned).map_err(|_| Code::INVALID_VALUE.into())
    }
}
