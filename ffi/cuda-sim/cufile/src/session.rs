//! The open driver: which way bytes go, and what is registered.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs};
use rustix::io::fcntl_dupfd_cloexec;

use crate::abi::{Code, PerGpu, Properties, flag, size};
use crate::config::{Ability, Config};
use crate::cuda;
use crate::device::{Device, lock};
use crate::failure::{Answer, Failure};
use crate::parameters::Parameters;
use crate::statistics::{Counters, Way};

/// What a direct transfer is aligned to, in the file and on the device, bytes.
pub(crate) const PAGE: u64 = 4096;

/// Magic numbers of the file systems on local drives that the real library moves bytes of directly: ext4 and XFS.
const DIRECT_FILE_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];

/// Version of nvidia-fs that a simulated node has.
const NVFS_VERSION: (u32, u32) = (2, 26);

/// A registered file.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) fd: OwnedFd,
    /// The descriptor that was registered, which may not be registered again.
    number: i32,
    pub(crate) way: Way,
    /// Whether it is read and written past the page cache, in whole pages.
    pub(crate) is_direct_io: bool,
    pub(crate) is_writable: bool,
}

/// A registered piece of device memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) bytes: u64,
    device: usize,
}

/// The driver from its opening to its closing.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) config: &'static Config,
    pub(crate) parameters: Parameters,
    pub(crate) devices: Vec<Device>,
    pub(crate) counters: Mutex<Counters>,
    /// The best way that there is.
    way: Way,
    files: Mutex<BTreeMap<usize, Arc<File>>>,
    /// By their first address.
    buffers: Mutex<BTreeMap<u64, Buffer>>,
}

/// Handles that were given out: never one twice, so that an old one is not taken for a new one.
pub(crate) fn next_handle() -> usize {
    static HANDLES: AtomicUsize = AtomicUsize::new(0x1000);
    HANDLES.fetch_add(1, Ordering::Relaxed)
}

impl Session {
    pub(crate) fn open(config: &'static Config, mut parameters: Parameters, level: i32) -> Answer<Session> {
        cuda::init()?;
        let way = match config.ability {
            _ if parameters.force_compat_mode() => Way::Posix,
            Ability::Nvfs => Way::Nvfs,
            Ability::P2pdma if parameters.use_p2pdma() => Way::P2p,
            Ability::P2pdma | Ability::Compat => Way::Posix,
        };
        if parameters.force_compat_mode() {
            // What is forced is allowed.
            parameters.set_allow_compat_mode();
        }
        if way == Way::Posix && !parameters.allow_compat_mode() {
            return Err(Code::DRIVER_NOT_INITIALIZED.into());
        }
        let devices = (0..cuda::device_count()?)
            .map(|ordinal| Ok(Device::new(ordinal, cuda::device_uuid(ordinal)?)))
            .collect::<Answer<Vec<_>>>()?;
        let uuids: Vec<_> = devices.iter().map(|device| device.uuid).collect();
        Ok(Session {
            config,
            counters: Mutex::new(Counters::new(level, &uuids)),
            parameters,
            devices,
            way,
            files: Mutex::default(),
            buffers: Mutex::default(),
        })
    }

    /// Properties of a driver that is open in this way, or of one that is not open.
    pub(crate) fn properties(parameters: &Parameters, session: Option<&Session>) -> Properties {
        let way = session.map_or(Way::Posix, |session| session.way);
        let (nvfs_major, nvfs_minor) = if way == Way::Nvfs { NVFS_VERSION } else { (0, 0) };
        let (status_flags, feature_flags) = match way {
            Way::Nvfs => (flag::NVME_SUPPORTED, flag::BATCH_IO_SUPPORTED),
            Way::P2p => (
                flag::NVME_SUPPORTED | flag::NVME_P2P_SUPPORTED,
                flag::BATCH_IO_SUPPORTED | flag::P2P_SUPPORTED,
            ),
            Way::Posix => (0, flag::BATCH_IO_SUPPORTED),
        };
        Properties {
            nvfs_major,
            nvfs_minor,
            poll_threshold_kib: parameters.property(size::POLL_THRESHOLD_KIB) as usize,
            direct_io_max_kib: parameters.property(size::DIRECT_IO_MAX_KIB) as usize,
            status_flags,
            control_flags: if parameters.allow_compat_mode() { flag::ALLOW_COMPAT_MODE } else { 0 },
            feature_flags,
            device_cache_max_kib: parameters.property(size::DEVICE_CACHE_MAX_KIB),
            buffer_cache_kib: parameters.property(size::BUFFER_CACHE_KIB),
            device_pinned_max_kib: parameters.property(size::DEVICE_PINNED_MAX_KIB),
            batch_max: parameters.property(size::BATCH_SIZE),
            batch_timeout_ms: parameters.property(size::BATCH_TIMEOUT_MS),
        }
    }

    /// Registers a file. Where it cannot be moved directly that is said only if compatibility mode is not allowed.
    pub(crate) fn register_file(&self, fd: BorrowedFd<'_>, number: i32) -> Answer<usize> {
        let kind = FileType::from_raw_mode(fstat(fd).map_err(|_| Code::INVALID_VALUE)?.st_mode);
        if ![FileType::RegularFile, FileType::BlockDevice].contains(&kind) {
            return Err(Code::INVALID_FILE_TYPE.into());
        }
        let flags = fcntl_getfl(fd).map_err(|_| Code::INVALID_VALUE)?;
        let is_direct_io = flags.contains(OFlags::DIRECT);
        let magic = fstatfs(fd).map_err(|_| Code::INVALID_VALUE)?.f_type as u64;
        let is_supported = kind == FileType::BlockDevice || DIRECT_FILE_SYSTEMS.contains(&magic);
        let way = if is_direct_io && is_supported { self.way } else { Way::Posix };
        if way == Way::Posix && !self.parameters.allow_compat_mode() {
            let code = if is_supported { Code::INVALID_FILE_OPEN_FLAG } else { Code::IO_NOT_SUPPORTED };
            return Err(code.into());
        }
        let mut files = lock(&self.files);
        if files.values().any(|file| file.number == number) {
            return Err(Code::HANDLE_ALREADY_REGISTERED.into());
        }
        let fd = fcntl_dupfd_cloexec(fd, 0).map_err(|_| Code::GETNEWFD_FAILED)?;
        let handle = next_handle();
        let is_writable = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        files.insert(handle, Arc::new(File { fd, number, way, is_direct_io, is_writable }));
        Ok(handle)
    }

    pub(crate) fn deregister_file(&self, handle: usize) -> Answer {
        let file = lock(&self.files).remove(&handle);
        file.map(drop).ok_or(Code::HANDLE_NOT_REGISTERED.into())
    }

    pub(crate) fn file(&self, handle: usize) -> Answer<Arc<File>> {
        lock(&self.files).get(&handle).cloned().ok_or(Code::HANDLE_NOT_REGISTERED.into())
    }

    /// The device of a range of device memory, which may lie in several mappings, one behind the other.
    pub(crate) fn device_of(&self, start: u64, bytes: u64) -> Answer<usize> {
        let end = start.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        let mapping = |address| {
            cuda::mapping(address).map_err(|_| {
                Failure::from(if address == start {
                    Code::CUDA_MEMORY_TYPE_INVALID
                } else {
                    Code::CUDA_POINTER_RANGE_ERROR
                })
            })
        };
        let first = mapping(start)?;
        let mut covered = first.start.saturating_add(first.bytes);
        while covered < end {
            let next = mapping(covered)?;
            if next.device != first.device || next.bytes == 0 {
                return Err(Code::CUDA_POINTER_RANGE_ERROR.into());
            }
            covered = next.start.saturating_add(next.bytes);
        }
        let device = usize::try_from(first.device).ok().filter(|device| *device < self.devices.len());
        device.ok_or(Code::DEVICE_NOT_FOUND.into())
    }

    /// Whether drives may reach all of a range that is mapped.
    fn is_reachable(start: u64, bytes: u64) -> Answer<bool> {
        let mut at = start;
        while at < start + bytes {
            if !cuda::is_reachable(at)? {
                return Ok(false);
            }
            let mapping = cuda::mapping(at)?;
            at = mapping.start.saturating_add(mapping.bytes.max(1));
        }
        Ok(true)
    }

    pub(crate) fn register_buffer(&self, start: u64, bytes: u64) -> Answer {
        if start == 0 || bytes == 0 {
            return Err(Code::INVALID_VALUE.into());
        }
        let device = self.device_of(start, bytes)?;
        let registered = self.add_buffer(start, Buffer { bytes, device });
        self.count_pinning(device, |gpu| {
            gpu.registers += 1;
            match registered {
                Ok(()) => {
                    gpu.registers_ok += 1;
                    gpu.registered_bytes += bytes;
                }
                Err(_) => gpu.registers_failed += 1,
            }
        });
        registered
    }

    /// Compatibility mode pins nothing.
    fn count_pinning(&self, device: usize, change: impl FnOnce(&mut PerGpu)) {
        if self.way != Way::Posix {
            lock(&self.counters).gpu(device, change);
        }
    }

    fn add_buffer(&self, start: u64, buffer: Buffer) -> Answer {
        // What is pinned for drives must have been made so that it can be; compatibility mode pins nothing.
        if self.way != Way::Posix && !Session::is_reachable(start, buffer.bytes)? {
            return Err(Code::GPU_MEMORY_PINNING_FAILED.into());
        }
        let mut buffers = lock(&self.buffers);
        // Those that overlap are no concern of a real library.
        if buffers.contains_key(&start) {
            return Err(Code::MEMORY_ALREADY_REGISTERED.into());
        }
        let pinned: u64 =
            buffers.values().filter(|other| other.device == buffer.device).map(|other| other.bytes).sum();
        if pinned.saturating_add(buffer.bytes) > self.parameters.pinned_max_bytes() {
            return Err(Code::GPU_MEMORY_PINNING_FAILED.into());
        }
        buffers.insert(start, buffer);
        Ok(())
    }

    pub(crate) fn deregister_buffer(&self, start: u64) -> Answer {
        let buffer = lock(&self.buffers).remove(&start).ok_or(Code::MEMORY_NOT_REGISTERED)?;
        self.count_pinning(buffer.device, |gpu| {
            gpu.deregisters += 1;
            gpu.registered_bytes = gpu.registered_bytes.saturating_sub(buffer.bytes);
        });
        Ok(())
    }

    /// What is registered from an address on.
    pub(crate) fn buffer(&self, start: u64) -> Option<Buffer> {
        lock(&self.buffers).get(&start).copied()
    }
}

impl File {
    /// The same file through the page cache, with the same access: for what is not whole pages.
    pub(crate) fn buffered(&self) -> Answer<OwnedFd> {
        let flags = fcntl_getfl(&self.fd)?.difference(OFlags::DIRECT) | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.fd.as_fd()));
        Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
    }
}
