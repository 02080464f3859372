//! Streams, events, copies and fills.

use std::ffi::CString;

use crate::check::{Checked, Gpu, Wrong, ensure, fails, fails_somehow, pattern, same};
use crate::driver::{self, Code, DISABLE_TIMING, NON_BLOCKING, NULL, Pages, READ_WRITE};

pub(crate) fn work_of_a_stream_is_in_order() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(4, READ_WRITE)?;
    let stream = driver::stream(NON_BLOCKING)?;
    for value in 0..=50 {
        driver::fill(memory.address, value, memory.bytes, stream)?;
    }
    driver::copy(memory.address, memory.address + memory.bytes / 2, memory.bytes / 4, stream)?;
    driver::wait(stream)?;
    driver::query_stream(stream)?;
    let expected = vec![50; memory.bytes as usize];
    same("the last fill", &driver::read(memory.address, memory.bytes)?, &expected)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn streams_wait_for_events() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(8, READ_WRITE)?;
    let (first, second) = (driver::stream(NON_BLOCKING)?, driver::stream(NON_BLOCKING)?);
    let event = driver::event(DISABLE_TIMING)?;
    let half = memory.bytes / 2;
    for round in 1..=20 {
        driver::fill(memory.address, round, half, first)?;
        driver::record(event, first)?;
        driver::wait_event(second, event)?;
        driver::copy(memory.address + half, memory.address, half, second)?;
        driver::record(event, second)?;
        driver::wait_event(first, event)?;
    }
    driver::wait(second)?;
    let expected = vec![20; half as usize];
    same("what the second copied", &driver::read(memory.address + half, half)?, &expected)?;
    driver::wait(first)?;
    driver::destroy_event(event)?;
    driver::destroy_stream(first)?;
    driver::destroy_stream(second)?;
    memory.close()
}

pub(crate) fn events_tell_what_was_reached() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(8, READ_WRITE)?;
    let stream = driver::stream(NON_BLOCKING)?;
    let event = driver::event(DISABLE_TIMING)?;
    driver::query(event)?;
    for _ in 0..50 {
        driver::fill(memory.address, 9, memory.bytes, stream)?;
    }
    driver::record(event, stream)?;
    // It may be reached at once, and if not it says so.
    while let Err(failure) = driver::query(event) {
        ensure!(failure.code == Code::CUDA_ERROR_NOT_READY, "{failure}");
        std::thread::yield_now();
    }
    driver::query_stream(stream)?;
    driver::wait_for(event)?;
    driver::destroy_event(event)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn events_tell_times() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(8, READ_WRITE)?;
    let stream = driver::stream(NON_BLOCKING)?;
    let (start, end, untimed) = (driver::event(0)?, driver::event(0)?, driver::event(DISABLE_TIMING)?);
    let invalid = &[Code::CUDA_ERROR_INVALID_HANDLE];
    fails("events that were not recorded", driver::elapsed_ms(start, end), invalid)?;
    driver::record(start, stream)?;
    driver::fill(memory.address, 9, memory.bytes, stream)?;
    driver::record(end, stream)?;
    driver::record(untimed, stream)?;
    driver::wait(stream)?;
    let elapsed = driver::elapsed_ms(start, end)?;
    ensure!((0.0..60_000.0).contains(&elapsed), "{elapsed} ms");
    fails("an event without times", driver::elapsed_ms(start, untimed), invalid)?;
    [start, end, untimed].into_iter().try_for_each(driver::destroy_event)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn a_stream_that_is_destroyed_ends_its_work() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(8, READ_WRITE)?;
    let stream = driver::stream(NON_BLOCKING)?;
    for value in 0..30 {
        driver::fill(memory.address, value, memory.bytes, stream)?;
    }
    driver::destroy_stream(stream)?;
    driver::synchronize()?;
    let expected = vec![29; memory.bytes as usize];
    same("the last fill", &driver::read(memory.address, memory.bytes)?, &expected)?;
    memory.close()
}

pub(crate) fn the_null_stream_waits_for_blocking_streams() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(8, READ_WRITE)?;
    let stream = driver::stream(0)?;
    for value in 0..30 {
        driver::fill(memory.address, value, memory.bytes, stream)?;
    }
    let expected = vec![29; memory.bytes as usize];
    same("after the stream", &driver::read(memory.address, memory.bytes)?, &expected)?;
    driver::fill(memory.address, 77, memory.bytes, NULL)?;
    driver::copy(memory.address, memory.address + memory.bytes / 2, memory.bytes / 2, stream)?;
    driver::wait(stream)?;
    let expected = vec![77; memory.bytes as usize];
    same("after the NULL stream", &driver::read(memory.address, memory.bytes)?, &expected)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn fills_fill_what_they_are_told() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    driver::fill(memory.address, 1, memory.bytes, NULL)?;
    driver::fill(memory.address + 5, 2, 10, NULL)?;
    driver::fill_words(memory.address + 64, 0x0403_0201, 3, NULL)?;
    let mut expected = vec![1; 80];
    expected[5..15].fill(2);
    expected[64..76].copy_from_slice(&[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]);
    same("the start", &driver::read(memory.address, 80)?, &expected)?;
    memory.close()
}

pub(crate) fn host_memory_is_registered_once() -> Checked {
    let _gpu = Gpu::open()?;
    let pages = Pages::new(64 * Pages::PAGE);
    let bytes = 32 * Pages::PAGE;
    pages.register(0, bytes, 0)?;
    let already = &[Code::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED];
    fails("the same again", pages.register(0, bytes, 0), already)?;
    fails("a part of it", pages.register(Pages::PAGE, Pages::PAGE, 0), already)?;
    pages.register(bytes, bytes, 1)?;
    pages.unregister(0)?;
    pages.unregister(bytes)?;
    let not = &[Code::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED];
    fails("what is not registered any more", pages.unregister(0), not)?;
    fails("no bytes", pages.register(0, 0, 0), &[Code::CUDA_ERROR_INVALID_VALUE])
}

pub(crate) fn copies_from_registered_memory_arrive() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(4, READ_WRITE)?;
    let bytes = memory.bytes as usize;
    let mut pages = Pages::new(2 * bytes);
    let expected = pattern(11, memory.bytes);
    pages.bytes()[..bytes].copy_from_slice(&expected);
    pages.register(0, 2 * bytes, 1)?;
    let stream = driver::stream(NON_BLOCKING)?;
    // In odd pieces.
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(123_457);
        pages.upload(memory.address + at as u64, at, length, stream)?;
        at += length;
    }
    pages.download(memory.address, bytes, bytes, stream)?;
    driver::wait(stream)?;
    pages.unregister(0)?;
    same("there and back", &pages.bytes()[bytes..], &expected)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn copies_from_other_memory_are_staged() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(4, READ_WRITE)?;
    let stream = driver::stream(NON_BLOCKING)?;
    for bytes in [1000, 64 << 10, 3 << 20] {
        let expected = pattern(bytes, bytes);
        let mut source = expected.clone();
        driver::write_pageable(memory.address, &source, stream)?;
        // The driver is done with it.
        source.fill(0);
        driver::wait(stream)?;
        same("what was handed in", &driver::read(memory.address, bytes)?, &expected)?;
    }
    driver::destroy_stream(stream)?;
    memory.close()
}

pub(crate) fn rows_are_gathered() -> Checked {
    const ROW: usize = 1000;
    const STRIDE: usize = 4096;
    const ROWS: usize = 100;
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    let mut pages = Pages::new(STRIDE * ROWS);
    let source = pattern(12, (STRIDE * ROWS) as u64);
    pages.bytes().copy_from_slice(&source);
    pages.register(0, STRIDE * ROWS, 0)?;
    let stream = driver::stream(NON_BLOCKING)?;
    pages.upload_rows(memory.address + 512, STRIDE, ROW, ROWS, stream)?;
    driver::wait(stream)?;
    pages.unregister(0)?;
    let expected: Vec<u8> = source.chunks(STRIDE).flat_map(|row| row[..ROW].to_vec()).collect();
    same("rows", &driver::read(memory.address + 512, (ROW * ROWS) as u64)?, &expected)?;
    driver::destroy_stream(stream)?;
    memory.close()
}

/// As short as PTX can be.
const PTX: &str =
    ".version 7.0\n.target sm_52\n.address_size 64\n.visible .entry does_nothing()\n{\n    ret;\n}\n";

pub(crate) fn entries_are_found_in_modules() -> Checked {
    let _gpu = Gpu::open()?;
    let text = CString::new(PTX).unwrap_or_default();
    let module = driver::load(&text)?;
    driver::function(module, "does_nothing")?;
    fails("no entry", driver::function(module, "does_something"), &[Code::CUDA_ERROR_NOT_FOUND])?;
    driver::unload(module)?;
    fails_somehow("no PTX", driver::load(c"this is not PTX"))
}

/// The checksum kernel of Lodestream against the checksum that the CPU computes.
pub(crate) fn checksums_agree(ptx: &str) -> Checked {
    const CHUNK: u64 = 1 << 20;
    const THREADS: u32 = 128;
    let gpu = Gpu::open()?;
    let text = CString::new(ptx).map_err(|_| Wrong("the PTX has a zero in it".to_owned()))?;
    let module = driver::load(&text)?;
    let kernel = driver::function(module, "lodestream_crc64_chunks")?;
    let memory = gpu.memory(4, READ_WRITE)?;
    let sums = gpu.memory(1, READ_WRITE)?;
    let bytes = pattern(13, memory.bytes);
    driver::write(memory.address, &bytes)?;
    let stream = driver::stream(NON_BLOCKING)?;
    // Whole, and with every kind of edge.
    for (offset, length) in [(0, memory.bytes), (0, 3 * CHUNK + 12_345), (4097, CHUNK), (1, 1), (512, 33_000)]
    {
        let chunks = length.div_ceil(CHUNK);
        driver::fill(sums.address, 0, sums.bytes, stream)?;
        let mut arguments = [memory.address + offset, length, CHUNK, sums.address];
        driver::launch(kernel, chunks as u32, THREADS, stream, &mut arguments)?;
        driver::wait(stream)?;
        let expected: Vec<u8> = bytes[offset as usize..(offset + length) as usize]
            .chunks(CHUNK as usize)
            .flat_map(|chunk| crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, chunk).to_le_bytes())
            .collect();
        same("sums", &driver::read(sums.address, 8 * chunks)?, &expected)?;
    }
    driver::destroy_stream(stream)?;
    driver::unload(module)?;
    sums.close()?;
    memory.close()
}
