//! The driver: opened, closed, described.

use std::ffi::{CStr, c_char};
use std::sync::Arc;

use super::{Library, call, exported, library};
use crate::abi::{Code, Properties, Status};
use crate::failure::Answer;
use crate::pointers::Out;
use crate::session::Session;

/// The version of cuFile whose ABI this is: 1.20, as 1000 times the major number and 10 times the minor one.
const VERSION: i32 = 1200;
/// What the library calls itself.
const NAME: &CStr = c"Simulated cuFile 1.20";

exported! {
    fn cuFileDriverOpen() -> Status {
        call("cuFileDriverOpen", |config| {
            library().open(config)?.uses += 1;
            Ok(())
        })
    }

    fn cuFileDriverClose() -> Status {
        call("cuFileDriverClose", |_| close())
    }

    fn cuFileDriverClose_v2() -> Status {
        call("cuFileDriverClose_v2", |_| close())
    }

    fn cuFileUseCount() -> i64 {
        library().opened.as_ref().map_or(0, |opened| opened.uses as i64)
    }

    fn cuFileGetVersion(version: Out<i32>) -> Status {
        call("cuFileGetVersion", |_| version.put(VERSION))
    }

    fn cuFileDriverGetProperties(properties: Out<Properties>) -> Status {
        call("cuFileDriverGetProperties", |_| {
            let library = library();
            let session = library.opened.as_ref().map(|opened| &*opened.session);
            properties.put(Session::properties(library.parameters(), session))
        })
    }

    // A real library has no such function: who finds it knows what it has.
    fn cuFileSimulated() -> *const c_char {
        NAME.as_ptr()
    }
}

/// Whether the driver has one user only; of several there is one less then.
fn is_last(library: &mut Library) -> Answer<bool> {
    let opened = library.opened.as_mut().ok_or(Code::DRIVER_NOT_INITIALIZED)?;
    let is_last = opened.uses <= 1;
    if !is_last {
        opened.uses -= 1;
    }
    Ok(is_last)
}

/// The last one to close ends everything that is registered.
fn close() -> Answer {
    let mut library = library();
    if !is_last(&mut library)? {
        return Ok(());
    }
    let batches = std::mem::take(&mut library.batches);
    // Not while the library is locked: what a batch has begun may take a while.
    drop(library);
    batches.values().for_each(|batch| batch.end());
    let mut library = self::library();
    if !is_last(&mut library)? {
        return Ok(());
    }
    // A call that is under way has it.
    if library.opened.as_ref().is_some_and(|opened| Arc::strong_count(&opened.session) > 1) {
        return Err(Code::DRIVER_CLOSING.into());
    }
    library.opened = None;
    Ok(())
}
