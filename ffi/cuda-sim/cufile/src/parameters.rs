//! Parameters that are chosen before the driver is opened.

use crate::abi::{Code, boolean, size};
use crate::failure::Answer;

/// Entries of a batch; a larger number is refused.
pub(crate) const BATCH_MAX: usize = 128;
/// Levels of statistics are 0 to this.
pub(crate) const LEVEL_MAX: usize = 3;
/// Kinds of slabs that there may be.
const SLABS_MAX: usize = 16;
/// `CUFileStringConfigParameter_t`: level, file and folder of the log, RDMA transport.
const TEXTS: usize = 4;

/// Buffers of host memory that compatibility mode copies through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slab {
    pub(crate) kib: usize,
    pub(crate) count: usize,
}

/// What `cuFileSetParameter…` sets, by the numbers of the C API.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    sizes: [usize; size::COUNT],
    booleans: [bool; boolean::COUNT],
    texts: [String; TEXTS],
    slabs: Vec<Slab>,
}

impl Default for Parameters {
    fn default() -> Parameters {
        let mut parameters = Parameters {
            sizes: [0; size::COUNT],
            booleans: [false; boolean::COUNT],
            texts: Default::default(),
            // The defaults of cufile.json.
            slabs: [(4, 128), (1024, 64), (16384, 64)].map(|(kib, count)| Slab { kib, count }).into(),
        };
        for (which, value) in [
            (size::DIRECT_IO_MAX_KIB, 16384),
            (size::DEVICE_CACHE_MAX_KIB, 131_072),
            (size::BUFFER_CACHE_KIB, 1024),
            (size::DEVICE_PINNED_MAX_KIB, 4_294_967_292),
            (size::BATCH_SIZE, BATCH_MAX),
            (size::POLL_THRESHOLD_KIB, 4),
            (size::BATCH_TIMEOUT_MS, 5),
        ] {
            parameters.sizes[which] = value;
        }
        for which in [boolean::ALLOW_COMPAT_MODE, boolean::ALLOW_SYSTEM_MEMORY] {
            parameters.booleans[which] = true;
        }
        parameters
    }
}

/// The place of a parameter that a caller names by number.
fn place<T>(places: &[T], which: i32) -> Answer<usize> {
    let which = usize::try_from(which).ok().filter(|which| *which < places.len());
    which.ok_or(Code::INVALID_VALUE.into())
}

impl Parameters {
    pub(crate) fn size(&self, which: i32) -> Answer<usize> {
        place(&self.sizes, which).map(|place| self.sizes[place])
    }

    /// The largest batch is limited, as is the level of statistics; what else is out of range for the real library is not
    /// known here.
    pub(crate) fn set_size(&mut self, which: i32, value: usize) -> Answer {
        let place = place(&self.sizes, which)?;
        let limit = match place {
            size::BATCH_SIZE => BATCH_MAX,
            size::PROFILE_STATS => LEVEL_MAX,
            _ => usize::MAX,
        };
        if value > limit {
            return Err(Code::INVALID_VALUE.into());
        }
        self.sizes[place] = value;
        Ok(())
    }

    pub(crate) fn boolean(&self, which: i32) -> Answer<bool> {
        place(&self.booleans, which).map(|place| self.booleans[place])
    }

    pub(crate) fn set_boolean(&mut self, which: i32, value: bool) -> Answer {
        place(&self.booleans, which).map(|place| self.booleans[place] = value)
    }

    pub(crate) fn text(&self, which: i32) -> Answer<&str> {
        place(&self.texts, which).map(|place| self.texts[place].as_str())
    }

    pub(crate) fn set_text(&mut self, which: i32, value: String) -> Answer {
        let place = place(&self.texts, which)?;
        if value.is_empty() {
            return Err(Code::INVALID_VALUE.into());
        }
        self.texts[place] = value;
        Ok(())
    }

    pub(crate) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    pub(crate) fn set_slabs(&mut self, slabs: Vec<Slab>) {
        self.slabs = slabs;
    }

    /// How many kinds of slabs a caller says there are.
    pub(crate) fn slab_kinds(count: i32) -> Answer<usize> {
        let count = usize::try_from(count).ok().filter(|count| (1..=SLABS_MAX).contains(count));
        count.ok_or(Code::INVALID_VALUE.into())
    }

    pub(crate) fn allow_compat_mode(&self) -> bool {
        self.booleans[boolean::ALLOW_COMPAT_MODE]
    }

    pub(crate) fn set_allow_compat_mode(&mut self) {
        self.booleans[boolean::ALLOW_COMPAT_MODE] = true;
    }

    pub(crate) fn force_compat_mode(&self) -> bool {
        self.booleans[boolean::FORCE_COMPAT_MODE]
    }

    pub(crate) fn use_p2pdma(&self) -> bool {
        self.booleans[boolean::USE_PCIP2PDMA]
    }

    pub(crate) fn batch_size(&self) -> usize {
        self.sizes[size::BATCH_SIZE]
    }

    pub(crate) fn statistics_level(&self) -> i32 {
        self.sizes[size::PROFILE_STATS] as i32
    }

    pub(crate) fn direct_max_bytes(&self) -> u64 {
        (self.sizes[size::DIRECT_IO_MAX_KIB] as u64).saturating_mul(1024)
    }

    pub(crate) fn pinned_max_bytes(&self) -> u64 {
        (self.sizes[size::DEVICE_PINNED_MAX_KIB] as u64).saturating_mul(1024)
    }

    /// A size as the driver's properties tell it.
    pub(crate) fn property(&self, which: usize) -> u32 {
        u32::try_from(self.sizes[which]).unwrap_or(u32::MAX)
    }
}
