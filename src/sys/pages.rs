//! Kinds of memory pages, and which of them this machine gives.

use std::fmt;
use std::fs;

use super::mem::{HUGE_PAGE_BYTES, Memory};

/// Kind of pages that memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Reserved 2 MiB pages.
    Hugetlb,
    /// Transparent huge pages on memfd.
    Thp,
    /// 4 KiB pages.
    Small,
}

impl PageKind {
    /// `hugetlb`, `thp` or `4k`.
    pub fn as_str(self) -> &'static str {
        match self {
            PageKind::Hugetlb => "hugetlb",
            PageKind::Thp => "thp",
            PageKind::Small => "4k",
        }
    }

    /// Whether a page is 2 MiB.
    pub fn huge(self) -> bool {
        self != PageKind::Small
    }
}

impl fmt::Display for PageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether memory of this kind can be had now: tries it on one huge page, and says why not.
pub fn probe(kind: PageKind) -> Result<(), String> {
    match kind {
        PageKind::Small => Ok(()),
        PageKind::Hugetlb => one_page(kind).map(drop).map_err(|error| {
            format!(
                "no free 2 MiB huge page ({error}): reserve some (vm.nr_hugepages) or allow the daemon to"
            )
        }),
        PageKind::Thp => {
            let memory = one_page(kind).map_err(|error| error.to_string())?;
            if mapped_huge(&memory) {
                return Ok(());
            }
            let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
            let setting = setting.as_deref().unwrap_or("absent").trim().to_owned();
            Err(format!(
                "memfd gets no transparent huge pages: /sys/kernel/mm/transparent_hugepage/shmem_enabled is \
                 \"{setting}\"; set it to advise"
            ))
        }
    }
}

/// One page, touched: a limit on huge pages shows only then.
fn one_page(kind: PageKind) -> std::io::Result<Memory> {
    let memory = Memory::new(HUGE_PAGE_BYTES, kind)?;
    memory.populate(0, HUGE_PAGE_BYTES)?;
    Ok(memory)
}

/// Whether the kernel mapped `memory` with huge pages: `ShmemPmdMapped` of its line in smaps.
fn mapped_huge(memory: &Memory) -> bool {
    let Ok(smaps) = fs::read_to_string("/proc/self/smaps") else { return false };
    let start = format!("{:x}-", memory.address().as_ptr() as usize);
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    let line = lines.find(|line| line.starts_with("ShmemPmdMapped:"));
    line.is_some_and(|line| !line.contains(" 0 kB"))
}

/// Number of 2 MiB huge pages: all, and those that are free and not promised to anyone.
pub fn huge_pages() -> (u64, u64) {
    let read = |name: &str| -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    (read("nr_hugepages"), read("free_hugepages").saturating_sub(read("resv_hugepages")))
}

/// Sets the number of 2 MiB huge pages; the kernel may give fewer. Gives the number there is now.
///
/// The kernel gives up at the first page that it does not find at once. What it has freed and moved by then makes the
/// next attempt get further, so this goes on as long as it does.
pub fn set_huge_pages(count: u64) -> std::io::Result<u64> {
    loop {
        let before = huge_pages().0;
        fs::write("/proc/sys/vm/nr_hugepages", count.to_string())?;
        let now = huge_pages().0;
        if now == count || now <= before {
            return Ok(now);
        }
    }
}
