//! Statistics: switched on, read, reset.

use super::{call, exported, library, session};
use crate::abi::{Basic, Code, Detailed, Statistics, Status};
use crate::device::lock;
use crate::failure::Answer;
use crate::parameters::LEVEL_MAX;
use crate::pointers::Out;

exported! {
    fn cuFileSetStatsLevel(level: i32) -> Status {
        call("cuFileSetStatsLevel", |_| {
            if !(0..=LEVEL_MAX as i32).contains(&level) {
                return Err(Code::INVALID_VALUE.into());
            }
            let mut library = library();
            library.level = Some(level);
            if let Some(opened) = &library.opened {
                lock(&opened.session.counters).level = level;
            }
            Ok(())
        })
    }

    fn cuFileGetStatsLevel(level: Out<i32>) -> Status {
        call("cuFileGetStatsLevel", |_| {
            let library = library();
            level.put(match &library.opened {
                Some(opened) => lock(&opened.session.counters).level,
                None => library.level.unwrap_or(library.staged.statistics_level()),
            })
        })
    }

    fn cuFileStatsStart() -> Status {
        call("cuFileStatsStart", |_| {
            let session = session()?;
            let mut counters = lock(&session.counters);
            if counters.level == 0 {
                return Err(Code::INTERNAL_ERROR.into());
            }
            counters.is_started = true;
            Ok(())
        })
    }

    fn cuFileStatsStop() -> Status {
        call("cuFileStatsStop", |_| {
            lock(&session()?.counters).is_started = false;
            Ok(())
        })
    }

    fn cuFileStatsReset() -> Status {
        call("cuFileStatsReset", |_| {
            lock(&session()?.counters).reset();
            Ok(())
        })
    }

    fn cuFileGetStatsL1(out: Out<Basic>) -> Status {
        call("cuFileGetStatsL1", |_| tell(out, 1, |counted| counted.detailed.basic))
    }

    fn cuFileGetStatsL2(out: Out<Detailed>) -> Status {
        call("cuFileGetStatsL2", |_| tell(out, 2, |counted| counted.detailed))
    }

    fn cuFileGetStatsL3(out: Out<Statistics>) -> Status {
        call("cuFileGetStatsL3", |_| tell(out, 3, |counted| counted))
    }
}

/// Tells a part of what has been counted, if that is done now, and up to this level.
fn tell<T>(out: Out<T>, level: i32, part: fn(Statistics) -> T) -> Answer {
    if out.is_null() {
        return Err(Code::INVALID_VALUE.into());
    }
    let session = session()?;
    let counters = lock(&session.counters);
    if !counters.is_started || counters.level < level {
        return Err(Code::INVALID_VALUE.into());
    }
    out.put(part(counters.counted()))
}
