//! cuFile's C ABI as of version 1.20: structures and numbers. Enumerations are integers here, as any value may come.
//!
//! Also included by the conformance suite, which calls a real library by it.

use std::ffi::c_void;

/// `CUfileOpError`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) i32);

macro_rules! codes {
    ($($name:ident = $number:literal;)*) => {
        impl Code {
            $(            pub(crate) const $name: Code = Code($number);)*

            /// The code of a name without its `CU_FILE_`.
            pub(crate) fn named(name: &str) -> Option<Code> {
                match name {
                    $(stringify!($name) => Some(Code::$name),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    DRIVER_NOT_INITIALIZED = 5001;
    DRIVER_INVALID_PROPS = 5002;
    DRIVER_UNSUPPORTED_LIMIT = 5003;
    DRIVER_VERSION_MISMATCH = 5004;
    DRIVER_VERSION_READ_ERROR = 5005;
    DRIVER_CLOSING = 5006;
    PLATFORM_NOT_SUPPORTED = 5007;
    IO_NOT_SUPPORTED = 5008;
    DEVICE_NOT_SUPPORTED = 5009;
    NVFS_DRIVER_ERROR = 5010;
    CUDA_DRIVER_ERROR = 5011;
    CUDA_POINTER_INVALID = 5012;
    CUDA_MEMORY_TYPE_INVALID = 5013;
    CUDA_POINTER_RANGE_ERROR = 5014;
    CUDA_CONTEXT_MISMATCH = 5015;
    INVALID_MAPPING_SIZE = 5016;
    INVALID_MAPPING_RANGE = 5017;
    INVALID_FILE_TYPE = 5018;
    INVALID_FILE_OPEN_FLAG = 5019;
    DIO_NOT_SET = 5020;
    INVALID_VALUE = 5022;
    MEMORY_ALREADY_REGISTERED = 5023;
    MEMORY_NOT_REGISTERED = 5024;
    PERMISSION_DENIED = 5025;
    DRIVER_ALREADY_OPEN = 5026;
    HANDLE_NOT_REGISTERED = 5027;
    HANDLE_ALREADY_REGISTERED = 5028;
    DEVICE_NOT_FOUND = 5029;
    INTERNAL_ERROR = 5030;
    GETNEWFD_FAILED = 5031;
    NVFS_SETUP_ERROR = 5033;
    IO_DISABLED = 5034;
    BATCH_SUBMIT_FAILED = 5035;
    GPU_MEMORY_PINNING_FAILED = 5036;
    BATCH_FULL = 5037;
    ASYNC_NOT_SUPPORTED = 5038;
    INTERNAL_BATCH_SETUP_ERROR = 5039;
    INTERNAL_BATCH_SUBMIT_ERROR = 5040;
    INTERNAL_BATCH_GETSTATUS_ERROR = 5041;
    INTERNAL_BATCH_CANCEL_ERROR = 5042;
    NOMEM_ERROR = 5043;
    IO_ERROR = 5044;
    INTERNAL_BUF_REGISTER_ERROR = 5045;
    HASH_OPR_ERROR = 5046;
    INVALID_CONTEXT_ERROR = 5047;
    NVFS_INTERNAL_DRIVER_ERROR = 5048;
    BATCH_NOCOMPAT_ERROR = 5049;
}

/// `CUfileError_t`, which calls return.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status {
    /// 0: success.
    pub(crate) error: i32,
    /// `CUresult`, if the error is `CUDA_DRIVER_ERROR`.
    pub(crate) cuda: u32,
}

/// `CUfileDescr_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) kind: i32,
    pub(crate) handle: DescriptorHandle,
    pub(crate) operations: *const c_void,
}

/// The union of a [`Descriptor`]: of its 8 bytes only the first 4 are used on Linux.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DescriptorHandle {
    pub(crate) fd: i32,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(crate) const OPAQUE_FD: i32 = 1;

/// `CUfileDrvProps_t`, its inner structure flat.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Properties {
    pub(crate) nvfs_major: u32,
    pub(crate) nvfs_minor: u32,
    pub(crate) poll_threshold_kib: usize,
    pub(crate) direct_io_max_kib: usize,
    /// Bits `CU_FILE_*_SUPPORTED` of file systems and drives.
    pub(crate) status_flags: u32,
    /// Bits `CU_FILE_ALLOW_COMPAT_MODE` and the like.
    pub(crate) control_flags: u32,
    /// Bits `CU_FILE_BATCH_IO_SUPPORTED` and the like.
    pub(crate) feature_flags: u32,
    pub(crate) device_cache_max_kib: u32,
    pub(crate) buffer_cache_kib: u32,
    pub(crate) device_pinned_max_kib: u32,
    pub(crate) batch_max: u32,
    pub(crate) batch_timeout_ms: u32,
}

/// Bits of [`Properties`].
pub(crate) mod flag {
    pub(crate) const NVME_SUPPORTED: u32 = 1 << 4;
    pub(crate) const NVME_P2P_SUPPORTED: u32 = 1 << 11;
    pub(crate) const ALLOW_COMPAT_MODE: u32 = 1 << 1;
    pub(crate) const BATCH_IO_SUPPORTED: u32 = 1 << 1;
    pub(crate) const P2P_SUPPORTED: u32 = 1 << 4;
}

/// `CUFileSizeTConfigParameter_t`, as far as a value has a meaning here.
pub(crate) mod size {
    pub(crate) const PROFILE_STATS: usize = 0;
    pub(crate) const DIRECT_IO_MAX_KIB: usize = 5;
    pub(crate) const DEVICE_CACHE_MAX_KIB: usize = 6;
    pub(crate) const BUFFER_CACHE_KIB: usize = 7;
    pub(crate) const DEVICE_PINNED_MAX_KIB: usize = 8;
    pub(crate) const BATCH_SIZE: usize = 9;
    pub(crate) const POLL_THRESHOLD_KIB: usize = 10;
    pub(crate) const BATCH_TIMEOUT_MS: usize = 11;
    pub(crate) const COUNT: usize = 12;
}

/// `CUFileBoolConfigParameter_t`, likewise.
pub(crate) mod boolean {
    pub(crate) const ALLOW_COMPAT_MODE: usize = 1;
    pub(crate) const FORCE_COMPAT_MODE: usize = 2;
    pub(crate) const ALLOW_SYSTEM_MEMORY: usize = 6;
    pub(crate) const USE_PCIP2PDMA: usize = 7;
    pub(crate) const COUNT: usize = 14;
}

/// `CUfileOpCounter_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counter {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
}

/// `CUfileStatsLevel1_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Basic {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) handle_registers: Counter,
    pub(crate) handle_deregisters: Counter,
    pub(crate) buffer_registers: Counter,
    pub(crate) buffer_deregisters: Counter,
    pub(crate) read_bytes: u64,
    pub(crate) write_bytes: u64,
    pub(crate) read_bytes_per_second: u64,
    pub(crate) write_bytes_per_second: u64,
    pub(crate) read_latency_mean_us: u64,
    pub(crate) write_latency_mean_us: u64,
    pub(crate) reads_per_second: u64,
    pub(crate) writes_per_second: u64,
    pub(crate) read_latency_sum_us: u64,
    pub(crate) write_latency_sum_us: u64,
    pub(crate) batch_submits: Counter,
    pub(crate) batch_completes: Counter,
    pub(crate) batch_setups: Counter,
    pub(crate) batch_cancels: Counter,
    pub(crate) batch_destroys: Counter,
    /// Enqueued, enqueued for POSIX, processed, processed by POSIX; submitted by nvidia-fs, P2PDMA, AIO, io_uring, mixed, in all.
    pub(crate) batch_queues: [Counter; 10],
    pub(crate) batch_read_bytes: u64,
    pub(crate) batch_write_bytes: u64,
    /// Bandwidths, latencies and rates of batches, and bytes of the last one.
    pub(crate) batch_rates: [u64; 10],
    pub(crate) vector_reads: Counter,
    pub(crate) vector_writes: Counter,
    /// Bytes, bandwidths, latencies and rates of vectors.
    pub(crate) vector_rates: [u64; 10],
}

/// `CUfileStatsLevel2_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Detailed {
    pub(crate) basic: Basic,
    pub(crate) read_sizes: [u64; 32],
    pub(crate) write_sizes: [u64; 32],
}

/// `CUfilePerGpuStats_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PerGpu {
    pub(crate) uuid: [u8; 16],
    pub(crate) read_bytes: u64,
    pub(crate) read_bytes_per_second: u64,
    pub(crate) read_utilization: u64,
    pub(crate) read_us: u64,
    pub(crate) reads: u64,
    pub(crate) p2p_reads: u64,
    pub(crate) nvfs_reads: u64,
    pub(crate) posix_reads: u64,
    pub(crate) unaligned_reads: u64,
    pub(crate) routed_reads: u64,
    pub(crate) sparse_regions: u64,
    pub(crate) inline_regions: u64,
    pub(crate) reads_failed: u64,
    pub(crate) write_bytes: u64,
    pub(crate) write_bytes_per_second: u64,
    pub(crate) write_utilization: u64,
    pub(crate) write_us: u64,
    pub(crate) writes: u64,
    pub(crate) p2p_writes: u64,
    pub(crate) nvfs_writes: u64,
    pub(crate) posix_writes: u64,
    pub(crate) unaligned_writes: u64,
    pub(crate) routed_writes: u64,
    pub(crate) writes_failed: u64,
    pub(crate) registers: u64,
    pub(crate) registers_ok: u64,
    pub(crate) registers_failed: u64,
    pub(crate) deregisters: u64,
    pub(crate) registered_bytes: u64,
}

/// GPUs that the statistics have room for.
pub(crate) const GPUS_MAX: usize = 16;

/// `CUfileStatsLevel3_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Statistics {
    pub(crate) detailed: Detailed,
    pub(crate) gpu_count: u32,
    pub(crate) gpus: [PerGpu; GPUS_MAX],
}

/// `CUfileIOParams_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchEntry {
    pub(crate) mode: i32,
    pub(crate) base: u64,
    pub(crate) file_offset: i64,
    pub(crate) base_offset: i64,
    pub(crate) bytes: usize,
    pub(crate) handle: usize,
    pub(crate) opcode: i32,
    pub(crate) cookie: usize,
}

/// `CUFILE_BATCH`.
pub(crate) const BATCH_MODE: i32 = 1;
/// `CUFILE_READ`, `CUFILE_WRITE`.
pub(crate) const READ: i32 = 0;
pub(crate) const WRITE: i32 = 1;

/// `CUfileIOEvents_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchEvent {
    pub(crate) cookie: usize,
    pub(crate) status: u32,
    /// Bytes, or a negative error.
    pub(crate) result: isize,
}

/// `CUfileStatus_t`, as far as events have it.
pub(crate) mod batch_status {
    pub(crate) const COMPLETE: u32 = 0x10;
    pub(crate) const FAILED: u32 = 0x40;
}

/// `struct timespec`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timespec {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: i64,
}
