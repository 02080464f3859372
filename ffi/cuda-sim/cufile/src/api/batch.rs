//! Batches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{call, counted, exported, guarded, library, session};
use crate::abi::{BatchEntry, BatchEvent, Code, Status, Timespec, batch_status};
use crate::batch::Batch;
use crate::device::lock;
use crate::failure::Answer;
use crate::pointers::{In, Out};
use crate::session::next_handle;
use crate::statistics::Call;

exported! {
    fn cuFileBatchIOSetUp(handle: Out<usize>, capacity: u32) -> Status {
        call("cuFileBatchIOSetUp", |_| {
            let session = session()?;
            let batch = counted(Call::BatchSetup, &session, |session| {
                let capacity = capacity as usize;
                if handle.is_null() || capacity == 0 || capacity > session.parameters.batch_size() {
                    return Err(Code::INVALID_VALUE.into());
                }
                Batch::new(capacity)
            })?;
            let number = next_handle();
            library().batches.insert(number, Arc::new(batch));
            handle.put(number)
        })
    }

    fn cuFileBatchIOSubmit(handle: usize, count: u32, entries: In<BatchEntry>, _flags: u32) -> Status {
        // The flags are reserved.
        call("cuFileBatchIOSubmit", |_| {
            let (session, batch) = (session()?, batch(handle)?);
            counted(Call::BatchSubmit, &session, |limits| {
                let count = count as usize;
                if entries.is_null() || count > limits.parameters.batch_size() {
                    return Err(Code::INTERNAL_BATCH_SUBMIT_ERROR.into());
                }
                let entries = (0..count).map(|index| entries.at(index)).collect::<Answer<Vec<_>>>()?;
                batch.submit(&session, &entries)
            })
        })
    }

    fn cuFileBatchIOGetStatus(
        handle: usize,
        min: u32,
        count: Out<u32>,
        events: Out<BatchEvent>,
        timeout: In<Timespec>,
    ) -> Status {
        call("cuFileBatchIOGetStatus", |_| {
            let batch = batch(handle)?;
            let max = count.get()? as usize;
            if events.is_null() || min as usize > max {
                return Err(Code::INVALID_VALUE.into());
            }
            let told = batch.events(min as usize, max, until(&timeout)?);
            for (index, event) in told.iter().enumerate() {
                events.put_at(index, *event)?;
            }
            // Nobody keeps the driver open that waits here: it may be closed by now.
            if let Ok(session) = session() {
                lock(&session.counters).call(Call::BatchComplete, true);
            }
            // Real libraries leave the count as it was then.
            if told.iter().any(|event| event.status == batch_status::FAILED) {
                return Err(Code::IO_ERROR.into());
            }
            count.put(told.len() as u32)
        })
    }

    fn cuFileBatchIOCancel(handle: usize) -> Status {
        call("cuFileBatchIOCancel", |_| {
            let batch = batch(handle)?;
            counted(Call::BatchCancel, &*session()?, |_| {
                batch.cancel();
                Ok(())
            })
        })
    }

    fn cuFileBatchIODestroy(handle: usize) -> () {
        // The C function returns nothing.
        let _ = guarded("cuFileBatchIODestroy", |_| {
            counted(Call::BatchDestroy, &*session()?, |_| {
                let batch = library().batches.remove(&handle).ok_or(Code::INVALID_VALUE)?;
                // Also where another thread waits for it.
                batch.end();
                Ok(())
            })
        });
    }
}

fn batch(handle: usize) -> Answer<Arc<Batch>> {
    library().batches.get(&handle).cloned().ok_or(Code::INVALID_VALUE.into())
}

/// When a call that waits is to return. None: no time is set, it waits as long as it takes.
fn until(timeout: &In<Timespec>) -> Answer<Option<Instant>> {
    if timeout.is_null() {
        return Ok(None);
    }
    let timeout = timeout.get()?;
    let seconds = u64::try_from(timeout.seconds).map_err(|_| Code::INVALID_VALUE)?;
    let nanoseconds = u32::try_from(timeout.nanoseconds).map_err(|_| Code::INVALID_VALUE)?;
    if nanoseconds >= 1_000_000_000 {
        return Err(Code::INVALID_VALUE.into());
    }
    // Beyond what a clock can say is for ever.
    Ok(Instant::now().checked_add(Duration::new(seconds, nanoseconds)))
}
