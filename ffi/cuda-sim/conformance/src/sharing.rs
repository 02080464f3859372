//! Memory shared by descriptor, and what is refused to who may only read it.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::check::{Checked, Gpu, Wrong, ensure, fails, fails_somehow, pattern, same};
use crate::driver::{self, Answer, Code, Failure, NULL, READ, READ_WRITE};
use crate::peer::{Exporter, SEED};

/// Units that the exporter makes.
const UNITS: u64 = 2;

pub(crate) fn what_is_imported_is_the_same_memory() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(UNITS, READ_WRITE)?;
    let fd = driver::export(memory.handle)?;
    let again = gpu.map(driver::import(fd.as_fd())?, memory.bytes, READ_WRITE)?;
    drop(fd);
    let bytes = pattern(20, memory.bytes);
    driver::write(memory.address, &bytes)?;
    same("through the other mapping", &driver::read(again.address, again.bytes)?, &bytes)?;
    memory.close()?;
    same("after the first is gone", &driver::read(again.address, again.bytes)?, &bytes)?;
    again.close()
}

pub(crate) fn processes_share_memory() -> Checked {
    let gpu = Gpu::open()?;
    let (mut exporter, fd) = Exporter::start(UNITS)?;
    let memory = gpu.map(driver::import(fd.as_fd())?, UNITS * gpu.unit, READ_WRITE)?;
    let found = driver::read(memory.address, memory.bytes)?;
    same("what the exporter wrote", &found, &pattern(SEED.into(), memory.bytes))?;
    driver::write(memory.address, &pattern(22, memory.bytes))?;
    ensure!(exporter.sees(22)?, "the exporter does not see what the importer wrote");
    memory.close()?;
    ensure!(exporter.sees(22)?, "the exporter has lost it with the importer's mapping");
    Ok(())
}

pub(crate) fn mapped_memory_outlives_its_exporter() -> Checked {
    let gpu = Gpu::open()?;
    let (exporter, fd) = Exporter::start(UNITS)?;
    let memory = gpu.map(driver::import(fd.as_fd())?, UNITS * gpu.unit, READ)?;
    drop(fd);
    exporter.kill()?;
    let expected = pattern(SEED.into(), memory.bytes);
    same("after SIGKILL", &driver::read(memory.address, memory.bytes)?, &expected)?;
    memory.close()
}

pub(crate) fn a_descriptor_outlives_its_exporter() -> Checked {
    let gpu = Gpu::open()?;
    let (exporter, fd) = Exporter::start(UNITS)?;
    exporter.kill()?;
    let memory = gpu.map(driver::import(fd.as_fd())?, UNITS * gpu.unit, READ)?;
    let expected = pattern(SEED.into(), memory.bytes);
    same("after SIGKILL", &driver::read(memory.address, memory.bytes)?, &expected)?;
    memory.close()
}

pub(crate) fn memory_of_the_dead_comes_back() -> Checked {
    /// Bytes, and what other processes may do meanwhile.
    const BYTES: u64 = 64 << 20;
    const NOISE: u64 = BYTES / 4;
    const DEADLINE: Duration = Duration::from_secs(20);
    let gpu = Gpu::open()?;
    let (exporter, fd) = Exporter::start(BYTES / gpu.unit)?;
    drop(fd);
    let (during, _) = driver::memory_info()?;
    exporter.kill()?;
    let start = Instant::now();
    loop {
        let (after, _) = driver::memory_info()?;
        if after >= during + BYTES - NOISE {
            return Ok(());
        }
        ensure!(start.elapsed() < DEADLINE, "{during} bytes were free, and {after} are after SIGKILL");
        std::thread::yield_now();
    }
}

pub(crate) fn private_memory_is_not_exported() -> Checked {
    let gpu = Gpu::open()?;
    let handle = driver::create_private(gpu.device, gpu.unit)?;
    fails_somehow("its export", driver::export(handle))?;
    driver::release(handle)?;
    fails("a handle that was released", driver::export(handle), &[Code::CUDA_ERROR_INVALID_VALUE])
}

pub(crate) fn strange_descriptors_are_refused() -> Checked {
    let _gpu = Gpu::open()?;
    fails_somehow("/dev/null", driver::import(File::open("/dev/null")?.as_fd()))?;
    fails_somehow("a program", driver::import(File::open("/proc/self/exe")?.as_fd()))?;
    fails_somehow("a directory", driver::import(File::open("/")?.as_fd()))
}

/// The error of work that was submitted, whenever it is told.
fn outcome(submitted: Answer) -> Answer {
    submitted.and_then(|()| driver::synchronize())
}

/// Work must fail, and leave the context unusable if it is for an address.
fn is_refused(what: &str, submitted: Answer) -> Checked {
    let Err(Failure { code, .. }) = outcome(submitted) else {
        return Err(Wrong(format!("{what}: succeeded, and should have failed")));
    };
    if code == Code::CUDA_ERROR_ILLEGAL_ADDRESS {
        fails(what, driver::synchronize(), &[code])?;
        fails(what, driver::stream(0), &[code])?;
    }
    Ok(())
}

pub(crate) fn who_may_read_may_not_write() -> Checked {
    let gpu = Gpu::open()?;
    let (mut exporter, fd) = Exporter::start(UNITS)?;
    let memory = gpu.map(driver::import(fd.as_fd())?, UNITS * gpu.unit, READ)?;
    let expected = pattern(SEED.into(), memory.bytes);
    same("what may be read", &driver::read(memory.address, memory.bytes)?, &expected)?;
    is_refused("a write", driver::fill(memory.address, 0, memory.bytes, NULL))?;
    ensure!(exporter.sees(SEED)?, "the memory has changed, or its owner was harmed");
    Ok(())
}

pub(crate) fn who_may_read_may_not_copy_to_it() -> Checked {
    let gpu = Gpu::open()?;
    let (mut exporter, fd) = Exporter::start(UNITS)?;
    let memory = gpu.map(driver::import(fd.as_fd())?, UNITS * gpu.unit, READ)?;
    is_refused("a copy", driver::write(memory.address, &[0; 4096]))?;
    ensure!(exporter.sees(SEED)?, "the memory has changed, or its owner was harmed");
    Ok(())
}

pub(crate) fn what_is_not_mapped_is_not_accessible() -> Checked {
    let gpu = Gpu::open()?;
    let address = driver::reserve(gpu.unit, 0)?;
    is_refused("a write", driver::fill(address, 0, gpu.unit, NULL))
}

pub(crate) fn what_was_unmapped_is_not_accessible() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    driver::unmap(memory.address, memory.bytes)?;
    is_refused("a read", driver::read(memory.address, 4096).map(|_| ()))
}

pub(crate) fn access_must_be_given() -> Checked {
    let gpu = Gpu::open()?;
    let address = driver::reserve(gpu.unit, 0)?;
    let handle = driver::create(gpu.device, gpu.unit)?;
    driver::map(address, gpu.unit, handle)?;
    is_refused("a write", driver::fill(address, 0, gpu.unit, NULL))
}
