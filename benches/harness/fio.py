"""fio as the reference: an O_DIRECT sequential read of the same files."""
import dataclasses
import itertools
import json
import os
import subprocess

BLOCKS = (1 << 20, 2 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8, 16)
ENGINES = ("io_uring", "libaio")


class FioError(RuntimeError):
    pass


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run fio."""
    block_bytes: int
    depth: int
    huge: bool
    engine: str = "io_uring"

    def __str__(self):
        return f"{self.engine}, {self.block_bytes >> 20} MiB × {self.depth}, {'mmaphuge' if self.huge else 'malloc'}"


def command(paths, setting):
    """One job that reads the files from first to last, each byte once."""
    # fio's separator of file names is a colon; one inside a name is escaped.
    names = ":".join(str(path).replace(":", "\\:") for path in paths)
    return [
        "fio", "--name=read", "--rw=read", "--direct=1", f"--ioengine={setting.engine}", f"--bs={setting.block_bytes}",
        f"--iodepth={setting.depth}", f"--filename={names}", "--file_service_type=sequential", "--readonly",
        "--invalidate=0", "--output-format=json",
    ] + (["--iomem=mmaphuge"] if setting.huge else [])


def read(paths, setting):
    """Reads the files once. → {"bytes", "seconds", "cpu_seconds"}"""
    run = subprocess.run(command(paths, setting), capture_output=True, text=True)
    # Lines of warning may stand before the document.
    text = run.stdout[run.stdout.find("{"):]
    if run.returncode != 0 or not text.startswith("{"):
        raise FioError(f"fio ({setting}) failed: {(run.stderr or run.stdout).strip()[-400:]}")
    job = json.loads(text)["jobs"][0]
    if job["error"]:
        raise FioError(f"fio ({setting}) ended with error {job['error']}")
    seconds = job["read"]["runtime"] / 1000
    size = job["read"]["io_bytes"]
    expected = sum(os.path.getsize(path) for path in paths)
    # Whole blocks only: fio leaves out the unaligned tail of each file.
    if size < expected - len(paths) * setting.block_bytes or seconds <= 0:
        raise FioError(f"fio ({setting}) read {size} of {expected} bytes")
    return {"bytes": size, "seconds": seconds, "cpu_seconds": seconds * (job["usr_cpu"] + job["sys_cpu"]) / 100}


def usable(paths):
    """The best kind of fio that works here: io_uring before libaio, huge pages before malloc."""
    failures = []
    for huge, engine in itertools.product((True, False), ENGINES):
        setting = Setting(BLOCKS[0], DEPTHS[0], huge, engine)
        try:
            read(paths[-1:], setting)
            return setting
        except FioError as error:
            failures.append(str(error))
    raise FioError("; ".join(failures))


def best(paths, blocks=BLOCKS, depths=DEPTHS):
    """Tries every block size with every depth, twice each in two passes. → (setting, {setting: best GB/s})"""
    base = usable(paths)
    rates = {}
    for _ in range(2):
        for block_bytes, depth in itertools.product(blocks, depths):
            setting = dataclasses.replace(base, block_bytes=block_bytes, depth=depth)
            result = read(paths, setting)
            rates[setting] = max(rates.get(setting, 0.0), result["bytes"] / result["seconds"] / 1e9)
    return max(rates, key=rates.get), rates
