"""The machine under the measurement: caches, huge pages, memory, and a description without names."""
import contextlib
import mmap
import os
import pathlib
import platform

NR_HUGEPAGES = pathlib.Path("/proc/sys/vm/nr_hugepages")
SHMEM_ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
DROP_CACHES = pathlib.Path("/proc/sys/vm/drop_caches")
HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23


def is_root():
    return os.geteuid() == 0


def memory(field="MemAvailable"):
    """A field of /proc/meminfo in bytes (HugePages_* are counts and not for this)."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise KeyError(field)


def shmem_enabled():
    """The chosen word of `always within_size [advise] never …`."""
    try:
        return SHMEM_ENABLED.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "absent"


def huge_pages():
    """Number of 2 MiB pages the kernel holds."""
    try:
        return int(NR_HUGEPAGES.read_text())
    except OSError:
        return 0


@contextlib.contextmanager
def kept_settings():
    """Puts back the number of huge pages and `shmem_enabled` as they were (as root; others cannot change them)."""
    pages, shmem = huge_pages(), shmem_enabled()
    try:
        yield
    finally:
        if is_root():
            if huge_pages() != pages:
                NR_HUGEPAGES.write_text(str(pages))
            if shmem_enabled() != shmem:
                SHMEM_ENABLED.write_text(shmem)


def set_huge_pages(pages):
    """Asks for a number of huge pages; returns how many the kernel found."""
    NR_HUGEPAGES.write_text(str(pages))
    return huge_pages()


def evict(paths):
    """Drops these files from the page cache: all of them for root, the clean pages of the files for others."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if is_root():
        DROP_CACHES.write_text("3")


class Holder:
    """Keeps memory touched and gives it back just before a timed run.

    On a virtual machine, memory that sat free goes back to the host, and touching it again costs up to seconds per
    GiB. Memory that was freed a moment ago is still there: every contestant then finds the machine warm.
    """

    def __init__(self, size):
        self.size = size
        self.held = None

    def hold(self):
        """Touches up to `size` bytes, less if the machine has less to spare."""
        size = min(self.size, memory() - (2 << 30)) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if self.held is None and size > 0:
            self.held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.held.madvise(MADV_HUGEPAGE)
            self.held.madvise(MADV_POPULATE_WRITE)

    def free(self):
        if self.held is not None:
            self.held.close()
            self.held = None


def device_of(path):
    """The block device of a file's file system: name, scheduler, rotational; nothing that identifies the machine."""
    number = os.stat(path).st_dev
    directory = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not (directory / "queue").exists():
        directory = directory.resolve().parent
    facts = {}
    for name in ("scheduler", "rotational", "max_sectors_kb", "logical_block_size"):
        with contextlib.suppress(OSError):
            facts[name] = (directory / "queue" / name).read_text().strip()
    kind = directory.resolve().name.rstrip("0123456789")
    return f"{kind} ({', '.join(f'{key} {value}' for key, value in facts.items())})"


def filesystem_of(path):
    """Type of the file system that holds `path`."""
    path = os.path.realpath(path)
    best = ("", "unknown")
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if (path + "/").startswith(where.rstrip("/") + "/") and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def describe(path):
    """What a reader needs to judge the figures, without names of hosts or directories."""
    processor = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": f"{processor}, {len(os.sched_getaffinity(0))} CPUs",
        "memory": f"{memory('MemTotal') / (1 << 30):.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "file system": filesystem_of(path),
        "drive": device_of(path),
        "huge pages": str(huge_pages()),
        "shmem_enabled": shmem_enabled(),
    }
