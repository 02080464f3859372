//! A set of chunks.

/// Which chunks of an artifact a member has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    words: Vec<u64>,
    count: u32,
    total: u32,
}

impl Chunks {
    /// None of `total`.
    pub fn none(total: u32) -> Chunks {
        Chunks { words: vec![0; total.div_ceil(u64::BITS) as usize], count: 0, total }
    }

    /// All of `total`.
    pub fn all(total: u32) -> Chunks {
        let mut chunks = Chunks::none(total);
        for chunk in 0..total {
            chunks.insert(chunk);
        }
        chunks
    }

    /// Whether `chunk` is among them.
    pub fn has(&self, chunk: u32) -> bool {
        self.words.get((chunk / u64::BITS) as usize).is_some_and(|word| word >> (chunk % u64::BITS) & 1 == 1)
    }

    /// Adds `chunk`; whether it is new. One that the artifact does not have is not added.
    pub fn insert(&mut self, chunk: u32) -> bool {
        if chunk >= self.total || self.has(chunk) {
            return false;
        }
        self.words[(chunk / u64::BITS) as usize] |= 1 << (chunk % u64::BITS);
        self.count += 1;
        true
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many the artifact has.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Whether there is every one.
    pub fn is_complete(&self) -> bool {
        self.count == self.total
    }
}
