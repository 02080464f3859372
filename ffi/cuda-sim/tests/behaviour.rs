//! What is the simulation's own: poison, faults, modelled links, memory counted across processes, addresses that no CPU
//! may touch. What it shares with real drivers is checked by the conformance suite.

#[path = "../conformance/src/check.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the conformance suite")]
mod check;
#[path = "../conformance/src/driver.rs"]
#[allow(dead_code, reason = "shared with the conformance suite")]
mod driver;
#[path = "common/library.rs"]
mod library;
#[path = "common/process.rs"]
mod process;

use std::ffi::c_void;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use check::{Gpu, pattern};
use cudarc::driver::sys;
use driver::{Answer, Code, Failure, NON_BLOCKING, NULL, Pages, READ, READ_WRITE};
use process::{Machine, alone, part, this_test};

const UNIT: u64 = 2 << 20;
const ONE: &str = r#"[{"memory_bytes": 67108864}]"#;
/// 4 MiB a second to the device: one unit takes half a second.
const SLOW: &str = r#"[{"memory_bytes": 67108864, "h2d_bytes_per_second": 4194304}]"#;

fn one() -> Machine {
    Machine::new(ONE)
}

#[track_caller]
fn fails<T>(answer: Answer<T>, code: Code) {
    match answer {
        Err(Failure { code: found, .. }) => assert_eq!(found, code),
        Ok(_) => panic!("succeeded, and should have failed with {code:?}"),
    }
}

#[test]
fn fresh_memory_holds_poison() {
    alone(one, || {
        let gpu = Gpu::open().unwrap();
        let memory = gpu.memory(1, READ_WRITE).unwrap();
        assert_eq!(driver::read(memory.address, UNIT).unwrap(), vec![0xa5; UNIT as usize]);
    });
}

#[test]
fn the_cpu_cannot_touch_a_device_address() {
    if part().is_none() {
        let status = one().start(this_test!(), "touch").wait().unwrap();
        assert_eq!(status.signal(), Some(11), "{status}");
        return;
    }
    let gpu = Gpu::open().unwrap();
    let memory = gpu.memory(1, READ_WRITE).unwrap();
    let place = memory.address as *const u8;
    // SAFETY: it is not safe: the process dies of it, which is what is tested.
    let byte = unsafe { place.read_volatile() };
    panic!("read {byte}");
}

#[test]
fn devices_are_those_that_are_configured() {
    let devices = r#"[
        {"memory_bytes": 8388608, "name": "H200", "numa": 1, "pci": "0000:3b:00.0", "attributes": {"16": 132}},
        {"memory_bytes": 4194304, "mig": true, "uuid": "MIG-00112233-4455-6677-8899-aabbccddeeff"}
    ]"#;
    alone(
        || Machine::new(devices).with("CUDA_VISIBLE_DEVICES", "MIG-00112233,0"),
        || {
            driver::init().unwrap();
            assert_eq!(driver::device_count(), Ok(2));
            assert_eq!(driver::device_name(0).unwrap(), "Simulated GPU 1 MIG 1g");
            assert_eq!(driver::device_uuid(0).unwrap()[..3], [0, 0x11, 0x22]);
            assert_eq!(driver::device_name(1).unwrap(), "Simulated H200");
            assert_eq!(driver::device_memory(1), Ok(8 << 20));
            assert_eq!(driver::device_pci(1, 32).unwrap(), "0000:3b:00.0");
            let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            assert_eq!(driver::attribute(processors, 1), Ok(132));
            let bus = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID;
            assert_eq!(driver::attribute(bus, 1), Ok(0x3b));
            // Memory of one is nothing to the other.
            let handle = driver::create(0, UNIT).unwrap();
            let address = driver::reserve(UNIT, 0).unwrap();
            driver::map(address, UNIT, handle).unwrap();
            fails(driver::set_access(address, UNIT, 1, READ), Code::CUDA_ERROR_INVALID_DEVICE);
        },
    );
}

#[test]
fn no_device_is_no_driver() {
    alone(|| one().with("CUDA_VISIBLE_DEVICES", ""), || fails(driver::init(), Code::CUDA_ERROR_NO_DEVICE));
}

#[test]
fn a_wrong_configuration_is_said() {
    alone(
        || one().with("CUDA_SIM_FAULT", "cuMemCreate:first=OUT_OF_MEMORY"),
        || fails(driver::init(), Code::CUDA_ERROR_SYSTEM_NOT_READY),
    );
}

/// Integers where C has enumerations: any may come.
#[test]
fn numbers_that_mean_nothing_are_refused() {
    fn function(name: &std::ffi::CStr) -> *mut c_void {
        let mut place = std::ptr::null_mut();
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
        // SAFETY: both places live through the call.
        let code = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut place, 12_020, 0, &mut status) };
        assert_eq!(code, Code::CUDA_SUCCESS, "{name:?}");
        place
    }
    alone(one, || {
        driver::init().unwrap();
        // SAFETY: the C function's signature, with its enumeration as the integer that it is.
        let attribute: extern "C" fn(*mut i32, u32, i32) -> u32 =
            unsafe { std::mem::transmute(function(c"cuDeviceGetAttribute")) };
        assert_eq!(attribute(&mut 0, 9999, 0), 1);
        // SAFETY: as above.
        let name: extern "C" fn(u32, *mut *const u8) -> u32 =
            unsafe { std::mem::transmute(function(c"cuGetErrorName")) };
        let mut text = std::ptr::dangling();
        assert_eq!(name(12_345, &mut text), 1);
        assert!(text.is_null());
        // SAFETY: as above.
        let export: extern "C" fn(*mut i32, u64, u32, u64) -> u32 =
            unsafe { std::mem::transmute(function(c"cuMemExportToShareableHandle")) };
        let handle = driver::create(0, UNIT).unwrap();
        assert_eq!(export(&mut 0, handle, 77, 0), 1);
        assert_eq!(export(std::ptr::null_mut(), handle, 1, 0), 1);
    });
}

#[test]
fn memory_is_counted_across_processes() {
    let Some(part) = part() else {
        let machine = Machine::new(r#"[{"memory_bytes": 16777216}]"#);
        let mut holder = machine.start(this_test!(), "hold");
        let said = BufReader::new(holder.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(said.into_iter().any(|line| line == "ready"), "the holder has ended");
        machine.run(this_test!(), "none is left");
        holder.kill().unwrap();
        holder.wait().unwrap();
        machine.run(this_test!(), "all is back");
        return;
    };
    let gpu = Gpu::open().unwrap();
    match part.as_str() {
        "hold" => {
            let _handle = driver::create(gpu.device, 12 << 20).unwrap();
            println!("\nready");
            // Until it is killed.
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
        "none is left" => {
            assert_eq!(driver::memory_info(), Ok((4 << 20, 16 << 20)));
            fails(driver::create(gpu.device, 8 << 20), Code::CUDA_ERROR_OUT_OF_MEMORY);
            fails(driver::allocate(8 << 20), Code::CUDA_ERROR_OUT_OF_MEMORY);
            driver::create(gpu.device, 4 << 20).unwrap();
        }
        _ => {
            assert_eq!(driver::memory_info(), Ok((16 << 20, 16 << 20)));
            driver::create(gpu.device, 16 << 20).unwrap();
        }
    }
}

#[test]
fn a_descriptor_keeps_memory_in_use() {
    alone(one, || {
        let gpu = Gpu::open().unwrap();
        let (before, _) = driver::memory_info().unwrap();
        let handle = driver::create(gpu.device, UNIT).unwrap();
        let fd = driver::export(handle).unwrap();
        driver::release(handle).unwrap();
        assert_eq!(driver::memory_info().unwrap().0, before - UNIT);
        drop(fd);
        assert_eq!(driver::memory_info().unwrap().0, before);
    });
}

#[test]
fn a_forged_descriptor_is_refused() {
    alone(one, || {
        Gpu::open().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        for length in [0, 4096, UNIT, UNIT + 4096] {
            file.set_len(length).unwrap();
            fails(driver::import(file.as_fd()), Code::CUDA_ERROR_INVALID_VALUE);
        }
        // A device that is not there, under a name that would be a path.
        file.seek(SeekFrom::Start(UNIT)).unwrap();
        write!(file, "cuda-sim memory 1\nGPU-1\n{UNIT}\n0\n../../x.memory\n").unwrap();
        fails(driver::import(file.as_fd()), Code::CUDA_ERROR_INVALID_VALUE);
        file.seek(SeekFrom::Start(UNIT)).unwrap();
        write!(file, "cuda-sim memory 1\nGPU-1\n{UNIT}\n0\n1-1.memory\n..............").unwrap();
        fails(driver::import(file.as_fd()), Code::CUDA_ERROR_INVALID_DEVICE);
    });
}

/// Invariant 2 is worth something only where this is so: a slot that is filled again too early shows.
#[test]
fn registered_memory_is_read_when_the_copy_runs() {
    alone(
        || Machine::new(SLOW),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(2, READ_WRITE).unwrap();
            let mut pages = Pages::new(2 * UNIT as usize);
            pages.register(0, 2 * UNIT as usize, 0).unwrap();
            let (first, second) =
                (driver::stream(NON_BLOCKING).unwrap(), driver::stream(NON_BLOCKING).unwrap());
            let event = driver::event(driver::DISABLE_TIMING).unwrap();
            for value in 1.. {
                pages.bytes()[..100].fill(0);
                // What the second copy waits for takes half a second.
                pages.upload(memory.address + UNIT, UNIT as usize, UNIT as usize, first).unwrap();
                driver::record(event, first).unwrap();
                driver::wait_event(second, event).unwrap();
                pages.upload(memory.address, 0, 100, second).unwrap();
                pages.bytes()[..100].fill(value);
                let in_time = driver::query(event).is_err();
                driver::wait(second).unwrap();
                // This thread may have been held up for that long: then again.
                if in_time {
                    assert_eq!(driver::read(memory.address, 100).unwrap(), vec![value; 100]);
                    break;
                }
            }
            pages.unregister(0).unwrap();
        },
    );
}

#[test]
fn unmapping_and_unregistering_wait_for_copies() {
    alone(
        || Machine::new(SLOW),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(1, READ_WRITE).unwrap();
            let pages = Pages::new(UNIT as usize);
            let stream = driver::stream(NON_BLOCKING).unwrap();
            pages.register(0, UNIT as usize, 0).unwrap();
            pages.upload(memory.address, 0, UNIT as usize, stream).unwrap();
            driver::unmap(memory.address, memory.bytes).unwrap();
            driver::query_stream(stream).unwrap();
            driver::map(memory.address, memory.bytes, memory.handle).unwrap();
            driver::set_access(memory.address, memory.bytes, gpu.device, READ_WRITE).unwrap();
            pages.upload(memory.address, 0, UNIT as usize, stream).unwrap();
            pages.unregister(0).unwrap();
            driver::query_stream(stream).unwrap();
        },
    );
}

/// Only from below: how long a machine that is busy takes nobody knows.
#[test]
fn a_link_carries_one_copy_after_the_other() {
    alone(
        || Machine::new(SLOW),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(1, READ_WRITE).unwrap();
            let pages = Pages::new(UNIT as usize);
            pages.register(0, UNIT as usize, 0).unwrap();
            let (first, second) =
                (driver::stream(NON_BLOCKING).unwrap(), driver::stream(NON_BLOCKING).unwrap());
            let [start, end_first, end_second] = [(); 3].map(|()| driver::event(0).unwrap());
            let half = UNIT as usize / 2;
            driver::record(start, first).unwrap();
            driver::wait_event(second, start).unwrap();
            pages.upload(memory.address, 0, half, first).unwrap();
            pages.upload(memory.address, 0, half, second).unwrap();
            driver::record(end_first, first).unwrap();
            driver::record(end_second, second).unwrap();
            driver::synchronize().unwrap();
            let taken = [end_first, end_second].map(|end| driver::elapsed_ms(start, end).unwrap());
            assert!(taken[0].min(taken[1]) >= 249.0, "half a unit took {taken:?} ms");
            assert!(taken[0].max(taken[1]) >= 499.0, "a unit took {taken:?} ms");
            pages.unregister(0).unwrap();
        },
    );
}

#[test]
fn a_stream_takes_more_work_than_it_holds() {
    alone(one, || {
        let gpu = Gpu::open().unwrap();
        let memory = gpu.memory(1, READ_WRITE).unwrap();
        let stream = driver::stream(NON_BLOCKING).unwrap();
        for value in 0..5000u32 {
            driver::fill_words(memory.address, value, 1000, stream).unwrap();
        }
        driver::wait(stream).unwrap();
        assert_eq!(driver::read(memory.address, 4).unwrap(), 4999u32.to_le_bytes());
    });
}

#[test]
fn the_call_that_is_to_fail_fails_and_does_nothing() {
    alone(
        || one().with("CUDA_SIM_FAULT", "cuMemCreate:2=OUT_OF_MEMORY;cuStreamCreate:1+=OPERATING_SYSTEM"),
        || {
            let gpu = Gpu::open().unwrap();
            driver::create(gpu.device, UNIT).unwrap();
            let (before, _) = driver::memory_info().unwrap();
            fails(driver::create(gpu.device, UNIT), Code::CUDA_ERROR_OUT_OF_MEMORY);
            assert_eq!(driver::memory_info().unwrap().0, before);
            driver::create(gpu.device, UNIT).unwrap();
            fails(driver::stream(0), Code::CUDA_ERROR_OPERATING_SYSTEM);
            fails(driver::stream(0), Code::CUDA_ERROR_OPERATING_SYSTEM);
        },
    );
}

#[test]
fn work_that_is_to_fail_ends_the_context_when_it_is_waited_for() {
    alone(
        || one().with("CUDA_SIM_FAULT", "cuMemcpyHtoDAsync_v2:2=LAUNCH_FAILED"),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(1, READ_WRITE).unwrap();
            let stream = driver::stream(NON_BLOCKING).unwrap();
            let bytes = pattern(1, 1000);
            driver::write_pageable(memory.address, &bytes, stream).unwrap();
            driver::wait(stream).unwrap();
            driver::write_pageable(memory.address, &bytes, stream).unwrap();
            for _ in 0..2 {
                fails(driver::wait(stream), Code::CUDA_ERROR_LAUNCH_FAILED);
            }
            fails(driver::create(gpu.device, UNIT), Code::CUDA_ERROR_LAUNCH_FAILED);
            // Memory can be given back, and the next context knows nothing of it.
            memory.close().unwrap();
            driver::release_context(gpu.device).unwrap();
            let next = Gpu::open().unwrap();
            next.memory(1, READ_WRITE).unwrap();
        },
    );
}

#[test]
fn a_copy_fails_when_it_runs() {
    alone(
        || one().with("CUDA_SIM_FAULT", "copy:1=ECC_UNCORRECTABLE"),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(1, READ_WRITE).unwrap();
            fails(driver::write(memory.address, &[1; 10]), Code::CUDA_ERROR_ECC_UNCORRECTABLE);
        },
    );
}

#[test]
fn a_lost_device_answers_nothing() {
    alone(
        || one().with("CUDA_SIM_FAULT", "device:0:40=LOST"),
        || {
            let gpu = Gpu::open().unwrap();
            let memory = gpu.memory(1, READ_WRITE).unwrap();
            let lost = (0..50).find_map(|_| driver::fill(memory.address, 1, UNIT, NULL).err());
            assert_eq!(lost.map(|failure| failure.code), Some(Code::CUDA_ERROR_DEVICE_UNAVAILABLE));
            fails(driver::synchronize(), Code::CUDA_ERROR_DEVICE_UNAVAILABLE);
            fails(driver::retain(gpu.device), Code::CUDA_ERROR_DEVICE_UNAVAILABLE);
            // What can be given back is.
            memory.close().unwrap();
        },
    );
}

#[test]
fn calls_are_traced() {
    let Some(_) = part() else {
        let trace = tempfile::NamedTempFile::new().unwrap();
        one().with("CUDA_SIM_TRACE", trace.path().to_str().unwrap()).run(this_test!(), "trace");
        let text = std::fs::read_to_string(trace.path()).unwrap();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with("cuMemCreate ")).collect();
        assert_eq!(lines, ["cuMemCreate CUDA_SUCCESS", "cuMemCreate CUDA_ERROR_INVALID_VALUE"]);
        assert_eq!(text.lines().next(), Some("cuInit CUDA_SUCCESS"));
        return;
    };
    let gpu = Gpu::open().unwrap();
    driver::create(gpu.device, UNIT).unwrap();
    assert!(driver::create(gpu.device, 1).is_err());
}

#[test]
fn the_script_makes_the_directory_that_programs_load_from() {
    let built = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link");
    let link = || Command::new(script).arg(built.path()).output().unwrap();
    assert!(!link().status.success(), "there is no library yet");
    std::fs::write(built.path().join("libcuda_sim.so"), "").unwrap();
    for _ in 0..2 {
        let output = link();
        assert!(output.status.success());
        let directory = String::from_utf8(output.stdout).unwrap();
        for name in ["libcuda.so.1", "libcuda.so"] {
            assert!(std::path::Path::new(directory.trim()).join(name).exists(), "{name}");
        }
    }
}
