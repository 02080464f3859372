"""What the tests share: models with known bytes, and a real daemon."""

import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest

import lodestream

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARY = pathlib.Path(os.environ.get("LODESTREAM_TEST_BINARIES", ROOT / "target" / "debug")) / "lodestream"
WAIT_SECONDS = 60
LOOK_SECONDS = 0.01

# Bytes of an element of each type that safetensors has; less than one in quarters.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F16": 2, "BF16": 2, "F32": 4,
    "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "F4": 0.5,
}


def write_model(path, tensors, metadata=None):
    """A safetensors file. tensors: {name: (dtype, shape, bytes)}, in the order in which they lie in the file."""
    header, offset = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, content in tensors.values():
            file.write(content)
    return path


def noise(seed, length):
    """Bytes that follow from a seed."""
    import random

    return random.Random(seed).randbytes(length)


def some_model(path, seed=1, elements=5000):
    """A small model; → {name: bytes}."""
    tensors = {f"layer.{number}.weight": ("F32", [elements], noise(seed + number, 4 * elements)) for number in range(4)}
    write_model(path, tensors, {"format": "pt"})
    return {name: content for name, (_, _, content) in tensors.items()}


def large_model(path, mib=192):
    """A file of zeros that takes no room on the drive: large enough to be caught in mid-load."""
    write_model(path, {"w": ("U8", [mib << 20], b"")})
    header = path.read_bytes().replace(b'"data_offsets": [0, 0]', b'"data_offsets": [0, %d]' % (mib << 20))
    text = header[8:].rstrip(b" ")
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + (mib << 20))
    return path


def mappings():
    """Mappings of shared regions in this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:" in line and "r--s" in line for line in maps)


def until(condition, what):
    """Looks until it holds."""
    import time

    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {WAIT_SECONDS} s")
        select.select([], [], [], LOOK_SECONDS)


class Daemon:
    """A daemon for the models below `root`; killed when it goes out of scope."""

    def __init__(self, root, *flags, environment=None):
        self._directory = tempfile.mkdtemp(prefix="ls")
        self.socket = os.path.join(self._directory, "s")
        self._flags = ["--root", str(root), "--host-budget", "512MiB", "--ready-pool", "0", *flags]
        self._environment = {**os.environ, **(environment or {})}
        self.process = None
        self.start()

    def start(self):
        self.log = open(os.path.join(self._directory, "log"), "ab")
        self.process = subprocess.Popen(
            [BINARY, "serve", "--socket", self.socket, *self._flags],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self._environment)

        def ready():
            if self.process.poll() is not None:
                raise AssertionError(pathlib.Path(self.log.name).read_text())
            with contextlib.suppress(lodestream.LodestreamError), self.connect() as node:
                return node.status()["state"] == "ready"

        until(ready, "daemon")

    def connect(self):
        return lodestream.connect(self.socket)

    def status(self):
        with self.connect() as node:
            return node.status()

    def send(self, number):
        self.process.send_signal(number)

    def end(self, number=signal.SIGKILL):
        """Ends it and waits."""
        if self.process.poll() is None:
            # One that is stopped does not take SIGTERM.
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        shutil.rmtree(self._directory)


class Case(unittest.TestCase):
    """A test with a directory for models."""

    def setUp(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="lodestream-", dir=os.environ.get("LODESTREAM_TEST_MODELS")))
        self.addCleanup(shutil.rmtree, self.root)

    def daemon(self, *flags, **options):
        daemon = Daemon(self.root, *flags, **options)
        self.addCleanup(daemon.__exit__)
        return daemon

    def connect(self, daemon):
        node = daemon.connect()
        self.addCleanup(node.close)
        return node

    @contextlib.contextmanager
    def refused(self, code):
        """The code that a call must be refused with; gives the exception's holder."""
        with self.assertRaises(lodestream.LodestreamError) as raised:
            yield raised
        self.assertEqual(raised.exception.code, code, str(raised.exception))


class Child:
    """Another Python process that runs `script`, one line in and one line out at a time."""

    def __init__(self, script, *arguments, environment=None):
        # pip or PYTHONPATH: the child must find the same package.
        package = str(pathlib.Path(lodestream.__file__).parent.parent)
        tests = str(pathlib.Path(__file__).parent)
        path = os.pathsep.join([package, tests])
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": path, **(environment or {})})

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the child ended with {self.process.wait()}")
        return line.strip()

    def tell(self, text=""):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        if sys.exc_info()[0] is not None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
