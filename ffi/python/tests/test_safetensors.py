"""`lodestream.safetensors` beside the stock package, on the same files: through a real daemon and without one."""

import importlib
import itertools
import logging
import os
import pathlib
import shutil
import signal
import struct
import unittest
import warnings
import zipfile
from unittest import mock

import numpy
import safetensors
from support import ROOT, SIZES, Case, noise, until, write_model

import lodestream.safetensors
import lodestream.safetensors.numpy
from lodestream.safetensors import SafetensorError, safe_open

try:
    import torch
except ImportError:
    torch = None

FRAMEWORKS = ["np"] if torch is None else ["np", "pt"]
NOWHERE = "/nonexistent/socket"
LOGGER = "lodestream.safetensors"

SHAPES = {"scalar": [], "one": [7], "two": [5, 6], "three": [3, 4, 5], "empty": [0, 4]}

PLAIN = [
    0, 2, 4, -1, -5, -6, 99, 2**40, True, 1.0, "a", None, ..., numpy.int64(1),
    slice(None), slice(1, 3), slice(0, 99), slice(-2, None), slice(None, -1), slice(-99, 2), slice(3, 1), slice(2, 2),
    slice(None, None, 2), slice(1, 4, 3), slice(None, None, 99), slice(None, None, -1), slice(None, None, 0), slice(0, 2.5),
]  # fmt: skip
FEW = [1, -1, 9, None, ..., slice(None), slice(1, 3), slice(-2, None), slice(0, 4, 2), slice(0, 99)]
INDICES = [
    *PLAIN,
    (),
    [],
    *[(index,) for index in PLAIN],
    *[[index] for index in PLAIN],
    *itertools.product(FEW, repeat=2),
    *map(list, itertools.product(FEW, repeat=2)),
    *itertools.product([0, ..., slice(None), slice(1, 2), slice(0, 3, 2)], repeat=3),
    (0, 0, 0, 0),
    (..., 0, ...),
    {0: 1},
    ((0, 1), 0),
]


def content_of(tensor):
    """Type, shape and bytes."""
    if torch is not None and isinstance(tensor, torch.Tensor):
        raw = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8)
        return str(tensor.dtype), tuple(tensor.shape), raw.numpy().tobytes()
    return tensor.dtype.str, tensor.shape, tensor.tobytes()


def outcome(call):
    """What a call gives, or how it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of lists as indices.
            return content_of(call())
    except BaseException as error:  # The stock package's panics are no Exceptions.
        return type(error).__name__, str(error)


def bytes_read():
    """Bytes that this process has asked the kernel for with read calls so far."""
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


class Dropin(Case):
    def setUp(self):
        super().setUp()
        self.path = self.root / "model.safetensors"

    def tensors(self):
        tensors = {name: ("F32", shape, noise(len(name), 4 * int(numpy.prod(shape)))) for name, shape in SHAPES.items()}
        write_model(self.path, tensors, {"format": "pt", "ä": "ö"})

    def served(self, *flags, **options):
        """A daemon that this process finds without being told."""
        daemon = self.daemon(*flags, **options)
        self.finds(daemon.socket)
        return daemon

    def finds(self, socket):
        patch = mock.patch.dict(os.environ, {"LODESTREAM_SOCKET": str(socket)})
        patch.start()
        self.addCleanup(patch.stop)

    def resident(self, daemon):
        with daemon.connect() as node:
            return node.list()


class Whole(Dropin):
    def every_type(self):
        tensors = {}
        for number, dtype in enumerate(sorted(SIZES, key=lambda dtype: -SIZES[dtype])):
            content = bytes([0, 1] * 4) if dtype == "BOOL" else noise(number, int(8 * SIZES[dtype]))
            tensors[dtype] = (dtype, [2, 4], content)
        write_model(self.path, tensors)

    def check_equal(self, framework):
        with safetensors.safe_open(self.path, framework) as stock, safe_open(self.path, framework) as ours:
            self.assertEqual(ours.keys(), stock.keys())
            self.assertEqual(ours.offset_keys(), stock.offset_keys())
            self.assertEqual(ours.metadata(), stock.metadata())
            for name in stock.keys():
                self.assertEqual(
                    outcome(lambda: ours.get_tensor(name)), outcome(lambda: stock.get_tensor(name)), (framework, name)
                )
            for call in (lambda file: file.get_tensor("none"), lambda file: file.get_slice("none")):
                self.assertEqual(outcome(lambda: call(ours)), outcome(lambda: call(stock)))

    def check_slices(self, framework):
        with safetensors.safe_open(self.path, framework) as stock, safe_open(self.path, framework) as ours:
            for name in stock.keys():
                for index in (slice(0, 1), (slice(None), slice(2, 4)), (1, slice(None, None, 2))):
                    self.assertEqual(
                        outcome(lambda: ours.get_slice(name)[index]),
                        outcome(lambda: stock.get_slice(name)[index]),
                        (framework, name, index),
                    )

    def test_every_type_comes_as_from_the_stock_package(self):
        for socket in (NOWHERE, self.served().socket):
            self.finds(socket)
            for framework in FRAMEWORKS:
                self.every_type()
                self.check_equal(framework)
                self.check_slices(framework)
                self.tensors()
                self.check_equal(framework)

    def test_load_file_gives_all_tensors_as_the_stock_package_does(self):
        self.tensors()
        names = ["numpy"] if torch is None else ["numpy", "torch"]
        for socket in (NOWHERE, self.served().socket):
            self.finds(socket)
            for name in names:
                stock = importlib.import_module(f"safetensors.{name}").load_file(self.path)
                ours = importlib.import_module(f"lodestream.safetensors.{name}").load_file(self.path)
                self.assertEqual({name: content_of(ours[name]) for name in ours}, {n: content_of(stock[n]) for n in stock})

    def test_tensors_are_views_of_the_daemons_memory_and_outlive_it(self):
        self.tensors()
        daemon = self.served()
        expected = safetensors.numpy.load_file(self.path)
        for framework in FRAMEWORKS:
            with safe_open(self.path, framework, backend="daemon") as file:
                before = bytes_read()
                kept = file.get_tensors()
                self.assertLess(bytes_read() - before, 4096, "no tensor was read here")
            again = safe_open(self.path, framework).get_tensor("three")
            if framework == "np":
                self.assertFalse(kept["three"].flags.writeable)
            [entry] = self.resident(daemon)
            self.assertGreater(entry["leases"], 0)
            self.assertEqual(content_of(again), content_of(kept["three"]))
            if framework == FRAMEWORKS[-1]:
                daemon.end(signal.SIGKILL)
            for name, tensor in kept.items():
                self.assertEqual(content_of(tensor)[1:], content_of(expected[name])[1:])
            del kept, again

    def test_the_lease_ends_with_the_last_tensor(self):
        self.tensors()
        daemon = self.served()
        tensors = lodestream.safetensors.numpy.load_file(self.path)
        part = tensors["two"][1:]
        del tensors
        [entry] = self.resident(daemon)
        self.assertEqual(entry["leases"], 1)
        del part
        until(lambda: self.resident(daemon)[0]["leases"] == 0, "end of the lease")

    def test_a_file_that_the_daemon_does_not_reach_is_sent_open(self):
        self.tensors()
        outside = pathlib.Path(shutil.copytree(self.root, f"{self.root}-outside")) / "model.safetensors"
        self.addCleanup(shutil.rmtree, outside.parent)
        daemon = self.served()
        with safe_open(outside, "np", backend="daemon") as file:
            self.assertEqual(file.get_tensor("two").shape, (5, 6))
            self.assertEqual(len(self.resident(daemon)), 1)

    def test_a_link_of_a_hugging_face_cache_is_followed(self):
        self.tensors()
        (self.root / "blobs").mkdir()
        (self.root / "snapshots" / "main").mkdir(parents=True)
        self.path.rename(self.root / "blobs" / "0123abcd")
        link = self.root / "snapshots" / "main" / "model.safetensors"
        link.symlink_to("../../blobs/0123abcd")
        self.served()
        with safe_open(link, "np", backend="daemon") as file:
            self.assertFalse(file.get_tensor("two").flags.writeable, "from the daemon")

    def test_what_the_daemon_has_no_room_for_is_read_here_and_said(self):
        size = 600 << 20
        header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
        self.path.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(self.path, 8 + len(header) + size)
        self.served()
        with self.assertLogs(LOGGER, logging.WARNING) as logged:
            self.assertEqual(safe_open(self.path, "np").get_tensor("w").nbytes, size)
        self.assertIn("tier.host.over_budget", logged.output[0])
        with self.assertRaisesRegex(SafetensorError, "tier.host.over_budget"):
            safe_open(self.path, "np", backend="daemon").get_tensor("w")

    def test_without_a_daemon_it_is_read_here_silently_unless_one_is_asked_for(self):
        self.tensors()
        self.finds(NOWHERE)
        with self.assertNoLogs(LOGGER, logging.INFO):
            self.assertTrue(safe_open(self.path, "np").get_tensor("two").flags.writeable)
        with self.assertRaisesRegex(SafetensorError, "client.connect"):
            safe_open(self.path, "np", backend="daemon").get_tensor("two")

    def test_the_backend_pread_does_not_ask_the_daemon(self):
        self.tensors()
        daemon = self.served()
        with safe_open(self.path, "np", backend="pread") as file:
            self.assertTrue(file.get_tensor("two").flags.writeable)
        self.assertEqual(self.resident(daemon), [])

    def test_a_file_that_is_replaced_while_it_is_open_is_read_as_it_was_opened(self):
        self.tensors()
        expected = safetensors.numpy.load_file(self.path)["two"]
        self.served()
        with safe_open(self.path, "np") as file, self.assertLogs(LOGGER, logging.WARNING):
            other = write_model(self.root / "other", {"two": ("F32", [5, 6], bytes(120))})
            other.replace(self.path)
            self.assertEqual(content_of(file.get_slice("two")[1:3]), content_of(expected[1:3]))
            self.assertEqual(content_of(file.get_tensor("two")), content_of(expected))
        self.assertEqual(safe_open(self.path, "np").get_tensor("two").tobytes(), bytes(120))

    def test_a_file_without_the_extension_is_read_here(self):
        self.tensors()
        daemon = self.served()
        plain = self.path.rename(self.root / "model.bin")
        self.assertEqual(safe_open(plain, "np").get_tensor("two").shape, (5, 6))
        with self.assertRaisesRegex(SafetensorError, "extension"):
            safe_open(plain, "np", backend="daemon")
        self.assertEqual(self.resident(daemon), [])

    def test_what_is_no_safetensors_file_is_refused_as_by_the_stock_package(self):
        self.served()
        self.path.write_bytes(b"no header")
        for arguments in ((self.path, "np"), (self.path, "xx"), (self.root / "none", "np"), (self.path, "np", "cuda:0")):
            self.assertEqual(
                outcome(lambda: safe_open(*arguments)), outcome(lambda: safetensors.safe_open(*arguments)), arguments
            )
        self.tensors()
        self.assertEqual(
            outcome(lambda: safe_open(self.path, "np", backend="x")),
            outcome(lambda: safetensors.safe_open(self.path, "np", backend="x")),
        )


class Slices(Dropin):
    def check_indices(self, framework):
        with safetensors.safe_open(self.path, framework) as stock, safe_open(self.path, framework) as ours:
            for name in SHAPES:
                theirs, mine = stock.get_slice(name), ours.get_slice(name)
                self.assertEqual((mine.get_shape(), mine.get_dtype()), (theirs.get_shape(), theirs.get_dtype()))
                for index in INDICES:
                    self.assertEqual(
                        outcome(lambda: mine[index]), outcome(lambda: theirs[index]), (framework, name, index)
                    )

    def test_every_form_of_index_gives_what_the_stock_package_gives(self):
        self.tensors()
        for framework in FRAMEWORKS:
            self.finds(NOWHERE)
            self.check_indices(framework)
            daemon = self.served()
            self.check_indices(framework)
            self.assertEqual(self.resident(daemon), [], "a slice loads nothing")
            with safe_open(self.path, framework, backend="daemon") as file:
                file.get_tensor("one")
            self.check_indices(framework)

    def test_only_the_bytes_of_the_slice_are_read(self):
        rows, columns = 1024, 2048
        content = noise(3, 4 * columns) * rows
        write_model(self.path, {"w": ("F32", [rows, columns], content)})
        daemon = self.served()
        with safe_open(self.path, "np") as file:
            part = file.get_slice("w")
            part[0:1]  # Opens what it reads with.
            before = bytes_read()
            got = part[100:110, 5:9]
            # Beside it, what asking for the counter takes.
            self.assertLess(bytes_read() - before, 10 * 4 * 4 + 1024)
            self.assertEqual(got.tobytes(), numpy.frombuffer(content, "<f4").reshape(rows, columns)[100:110, 5:9].tobytes())
            self.assertEqual(self.resident(daemon), [])

    def test_of_a_resident_file_nothing_is_read(self):
        self.tensors()
        self.served()
        with safe_open(self.path, "np", backend="daemon") as first, safe_open(self.path, "np") as file:
            whole = first.get_tensor("two")
            part = file.get_slice("two")
            part[0:1]
            before = bytes_read()
            got = part[1:3]
            self.assertLess(bytes_read() - before, 1024)
            self.assertTrue(numpy.array_equal(got, whole[1:3]))
            self.assertFalse(got.flags.writeable, "a view of the daemon's memory")
            self.assertTrue(part[:, 1:3].flags.c_contiguous)


@unittest.skipUnless(os.environ.get("LODESTREAM_TEST_WHEEL"), "LODESTREAM_TEST_WHEEL is not set: it is built by scripts/test")
class Wheel(unittest.TestCase):
    def test_the_wheel_has_every_module_and_the_plugins_of_engines(self):
        [path] = pathlib.Path(os.environ["LODESTREAM_TEST_WHEEL"]).glob("lodestream-*.whl")
        package = ROOT / "ffi" / "python" / "lodestream"
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            [points] = [wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
        modules = {str(module.relative_to(package.parent)) for module in package.rglob("*.py")}
        self.assertEqual(modules - set(names), set())
        for group, module in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
            self.assertIn(f"[{group}]\nlodestream=lodestream.{module}:register", points.replace(" ", ""))


if __name__ == "__main__":
    unittest.main()
