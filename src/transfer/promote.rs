//! From the host tier to GPUs: what is resident there is copied by the devices themselves, and not read again.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use tokio::task::{JoinSet, spawn_blocking};

use super::gpu::Taken;
use super::load::{Prepared, blocking, stop_reason, too_large};
use super::{Job, Jobs, Target};
use crate::api::methods::Selector;
use crate::catalog::select::Runs;
use crate::checksum::{self, CHUNK_BYTES};
use crate::error::{Code, Error, Result};
use crate::plan::Layout;
use crate::shard::{Path, Progress, copy_error};
use crate::sys::cuda::{Context, DeviceMemory, PinnedMap, Promotion, Rows};
use crate::tier::DeviceId;
use crate::tier::residency::{Content, Form, Hold, Key, Region};

/// Bytes of one copy at most: a job that is cancelled waits for no more than a few of them.
const COPY_BYTES_MAX: u64 = 64 << 20;
/// Copies that are under way before their end is waited for.
const COPIES_MAX: usize = 4;

/// An artifact on the host tier; held, so that it stays.
pub(super) struct Source {
    _hold: Hold,
    pub(super) content: Arc<Content>,
    form: Form,
}

impl Jobs {
    /// What each target can be copied from: the artifact, whole, or what has left a GPU and is wanted on one again.
    /// `None`: the host tier does not have all of it.
    pub(super) fn on_host(
        &self,
        prepared: &Prepared,
        targets: &[Target],
        tenant: u32,
    ) -> Option<Vec<Source>> {
        let source = |select: Option<&[Selector]>, form| {
            let key = Key {
                device: DeviceId::Host,
                identity: prepared.identity.clone(),
                select: select.map(<[Selector]>::to_vec),
                form,
            };
            let hold = self.residency.hold(self.residency.known(&key, tenant)?).ok()?;
            Some(Source { content: hold.content().ok()?, _hold: hold, form })
        };
        let sources = targets.iter().map(|target| {
            source(None, Form::Files).or_else(|| source(target.select.as_deref(), Form::Packed))
        });
        sources.collect()
    }

    /// Fills the regions in `taken` from the host tier. `None`: its memory cannot be registered with the driver.
    ///
    /// Gives the checksums of the pieces of each region.
    pub(super) async fn promote(
        &self,
        job: &Job,
        prepared: &Prepared,
        sources: &[Source],
        taken: &[Taken],
    ) -> Result<Option<Vec<Box<[u64]>>>> {
        let mut maps: Vec<Arc<PinnedMap>> = Vec::with_capacity(sources.len());
        for (place, (source, taken)) in sources.iter().zip(taken).enumerate() {
            let same = |other: &Source| Arc::ptr_eq(&other.content, &source.content);
            let map = match sources[..place].iter().position(same) {
                Some(known) => Arc::clone(&maps[known]),
                None => match self.pin(taken.memory.context(), &source.content).await? {
                    Ok(map) => map,
                    Err(why) => {
                        tracing::warn!(
                            job = job.id,
                            why,
                            "the host tier cannot be registered: the files are read again"
                        );
                        return Ok(None);
                    }
                },
            };
            maps.push(map);
        }
        let layouts = &prepared.layouts;
        let rows = layouts.iter().zip(sources).map(|(layout, source)| match source.form {
            Form::Files => rows(layout, &source.content).ok_or_else(too_large),
            Form::Packed => Ok(as_it_was(layout)),
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        job.begin(rows.iter().flatten().map(|rows| rows.bytes * rows.count).sum());
        let mut copying = JoinSet::new();
        let mut checking = Vec::with_capacity(taken.len());
        for (place, (rows, map)) in rows.into_iter().zip(maps).enumerate() {
            let (from, to) = (Arc::clone(&map), Arc::clone(&taken[place].memory));
            let progress = Arc::clone(&job.progress);
            copying.spawn_blocking(move || copy(&from, &to, &rows, &progress));
            let (content, form) = (Arc::clone(&sources[place].content), sources[place].form);
            let (layout, sizes) = (layouts[place].clone(), prepared.sizes());
            checking.push(spawn_blocking(move || match form {
                Form::Files => checks(&layout, &sizes, &content, map.as_slice()),
                // They were compared when it came down, and nobody could write to it since.
                Form::Packed => content.checks.clone(),
            }));
        }
        // All of them end before any memory goes, whatever becomes of the first (invariant 2).
        let (mut outcome, mut reason) = (Ok(()), None);
        loop {
            tokio::select! {
                ended = copying.join_next() => match ended {
                    None => break,
                    Some(result) => {
                        let result = result.unwrap_or_else(|_| Err(thread_failed()));
                        if result.is_err() {
                            job.progress.stop();
                            outcome = outcome.and(result);
                        }
                    }
                },
                why = stop_reason(job), if reason.is_none() => {
                    job.progress.stop();
                    job.entries.iter().for_each(|entry| self.residency.disown(*entry));
                    reason = Some(why);
                }
            }
        }
        let mut checked = Vec::with_capacity(checking.len());
        for task in checking {
            checked.push(task.await.map_err(|_| thread_failed())?);
        }
        match reason {
            Some(reason) => Err(reason),
            None if outcome.is_ok() => {
                self.metrics.promoted_bytes.inc_by(job.progress.bytes(Path::Host));
                Ok(Some(checked))
            }
            None => outcome.map(|()| None),
        }
    }

    async fn pin(
        &self,
        context: &Arc<Context>,
        content: &Arc<Content>,
    ) -> Result<Result<Arc<PinnedMap>, String>> {
        let (context, content) = (Arc::clone(context), Arc::clone(content));
        blocking(move || {
            let Region::Host(parts) = &content.region else {
                return Ok(Err("it is not on the host tier".to_owned()));
            };
            let parts = parts.iter().map(|part| {
                let fd = part.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
                Ok((fd, part.bytes()))
            });
            let parts: Result<Vec<_>, String> = parts.collect();
            Ok(parts.and_then(|parts| PinnedMap::new(&context, parts)).map(Arc::new))
        })
        .await
    }
}

/// All of what has left a GPU goes back as it lay there.
fn as_it_was(layout: &Layout) -> Vec<Rows> {
    let bytes = layout.bytes;
    let all = Rows { span_offset: 0, target_offset: 0, bytes, stride: bytes, count: 1 };
    Vec::from_iter((bytes > 0).then_some(all))
}

/// What of the region on the host tier goes where.
fn rows(layout: &Layout, content: &Content) -> Option<Vec<Rows>> {
    let rows = layout.runs().map(|(file, runs, place)| {
        let start = (*content.files.get(file as usize)?)?;
        Some(Rows {
            span_offset: start.checked_add(runs.offset)?,
            target_offset: place,
            bytes: runs.bytes,
            stride: runs.stride,
            count: runs.count,
        })
    });
    rows.collect()
}

fn copy(map: &Arc<PinnedMap>, memory: &Arc<DeviceMemory>, rows: &[Rows], progress: &Progress) -> Result<()> {
    let promotion = Promotion::new(map, memory).map_err(copy_error)?;
    let (mut under_way, mut bytes) = (0, 0);
    let end_of = |offset| map.part_end(offset).unwrap_or(offset + 1);
    for piece in rows.iter().flat_map(|rows| pieces(rows, end_of)) {
        if progress.stopped() {
            return Ok(());
        }
        promotion.copy(piece).map_err(copy_error)?;
        (under_way, bytes) = (under_way + 1, bytes + piece.bytes * piece.count);
        if under_way == COPIES_MAX {
            promotion.finish().map_err(copy_error)?;
            progress.arrived(Path::Host, std::mem::take(&mut bytes));
            under_way = 0;
        }
    }
    promotion.finish().map_err(copy_error)?;
    progress.arrived(Path::Host, bytes);
    Ok(())
}

/// `rows` in pieces, none of which crosses a border (`end_of` says where the part ends that holds an offset) or is longer
/// than [`COPY_BYTES_MAX`].
fn pieces(rows: &Rows, end_of: impl Fn(u64) -> u64) -> Vec<Rows> {
    let mut pieces = Vec::new();
    let mut row = 0;
    while row < rows.count {
        let from = rows.span_offset + row * rows.stride;
        let to = rows.target_offset + row * rows.bytes;
        let room = end_of(from) - from;
        let fitting = if rows.bytes > room { 0 } else { (room - rows.bytes) / rows.stride + 1 };
        let count = fitting.min(COPY_BYTES_MAX / rows.bytes).min(rows.count - row);
        if count > 0 {
            pieces.push(Rows { span_offset: from, target_offset: to, count, ..*rows });
            row += count;
            continue;
        }
        // A row that crosses a border, or is very long.
        let mut done = 0;
        while done < rows.bytes {
            let at = from + done;
            let bytes = (end_of(at) - at).min(rows.bytes - done).min(COPY_BYTES_MAX);
            pieces.push(Rows { span_offset: at, target_offset: to + done, bytes, stride: bytes, count: 1 });
            done += bytes;
        }
        row += 1;
    }
    pieces
}

/// The checksum of each piece of a region, from those of the chunks on the host tier where that is possible.
fn checks(layout: &Layout, sizes: &[u64], content: &Content, bytes: &[u8]) -> Box<[u64]> {
    let runs: HashMap<u64, (u32, &Runs)> =
        layout.runs().map(|(file, runs, place)| (place, (file, runs))).collect();
    let pieces = layout.pieces(sizes);
    let checks = pieces.iter().map(|(offset, nbytes)| {
        let Some((file, runs)) = runs.get(offset).filter(|_| *nbytes > 0) else { return checksum::EMPTY };
        check(*file, runs, content, bytes).unwrap_or(checksum::EMPTY)
    });
    checks.collect()
}

fn check(file: u32, runs: &Runs, content: &Content, bytes: &[u8]) -> Option<u64> {
    let start = (*content.files.get(file as usize)?)?;
    let slice = |from: u64, to: u64| bytes.get((start + from) as usize..(start + to) as usize);
    if runs.count > 1 {
        let mut sum = checksum::Running::new();
        for row in 0..runs.count {
            let from = runs.offset + row * runs.stride;
            sum.update(slice(from, from + runs.bytes)?);
        }
        return Some(sum.finish());
    }
    let before: u64 =
        content.description.files[..file as usize].iter().map(|file| file.bytes.div_ceil(CHUNK_BYTES)).sum();
    let end = runs.offset + runs.bytes;
    let (mut at, mut sum) = (runs.offset, checksum::EMPTY);
    while at < end {
        let next = ((at / CHUNK_BYTES + 1) * CHUNK_BYTES).min(end);
        let whole = at.is_multiple_of(CHUNK_BYTES) && next - at == CHUNK_BYTES;
        let piece = match whole {
            true => *content.checks.get((before + at / CHUNK_BYTES) as usize)?,
            false => checksum::chunk(slice(at, next)?),
        };
        sum = checksum::combine(sum, piece, next - at);
        at = next;
    }
    Some(sum)
}

fn thread_failed() -> Error {
    Error::new(Code::Internal, "a thread of the control plane failed")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_are_cut_at_borders_and_nothing_is_lost(
            part in 100u64..5000, start in 0u64..3000, bytes in 1u64..400, gap in 0u64..300, count in 1u64..40
        ) {
            let rows = Rows { span_offset: start, target_offset: 0, bytes, stride: bytes + gap, count };
            let mut arrived = vec![0u8; (bytes * count) as usize];
            for piece in pieces(&rows, |offset| (offset / part + 1) * part) {
                for row in 0..piece.count {
                    let from = piece.span_offset + row * piece.stride;
                    prop_assert_eq!(from / part, (from + piece.bytes - 1) / part, "crosses a border");
                    for byte in 0..piece.bytes {
                        let to = piece.target_offset + row * piece.bytes + byte;
                        prop_assert_eq!(from + byte, start + to / bytes * (bytes + gap) + to % bytes);
                        arrived[to as usize] += 1;
                    }
                }
            }
            prop_assert!(arrived.iter().all(|times| *times == 1));
        }
    }
}
