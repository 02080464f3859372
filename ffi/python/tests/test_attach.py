"""Attaching: types, views, and how long memory lives."""

import gc
import json
import os
import signal
import unittest

import numpy
from support import SIZES, Case, Child, mappings, noise, some_model, until, write_model

import lodestream

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None


def every_type(path):
    """A tensor of each type, shape (2, 4); → {dtype: bytes}."""
    contents = {dtype: noise(number, int(8 * size)) for number, (dtype, size) in enumerate(SIZES.items())}
    contents["BOOL"] = bytes([0, 1] * 4)
    # In the order of the sizes, so that each is aligned.
    order = sorted(contents, key=lambda dtype: -SIZES[dtype])
    write_model(path, {dtype: (dtype, [2, 4], contents[dtype]) for dtype in order})
    return contents


class Arrays(Case):
    def test_every_type_has_its_bytes_shape_and_numpy_type(self):
        contents = every_type(self.root / "m.safetensors")
        node = self.connect(self.daemon())
        model = node.attach(self.root / "m.safetensors", framework="np")
        self.assertEqual(set(model), set(contents))
        for dtype, content in contents.items():
            array = model[dtype]
            self.assertEqual(array.tobytes(), content, dtype)
            self.assertEqual(array.shape, (4,) if dtype == "F4" else (2, 4), dtype)
            self.assertEqual((model.dtypes[dtype], model.shapes[dtype]), (dtype, (2, 4)))
        types = {"F32": "float32", "C64": "complex64", "BOOL": "bool", "U64": "uint64", "I16": "int16", "F16": "float16"}
        for dtype, name in types.items():
            self.assertEqual(model[dtype].dtype.name, name)
        if ml_dtypes is None:
            self.assertEqual((model["BF16"].dtype.name, model["F8_E4M3"].dtype.name), ("uint16", "uint8"))
        else:
            self.assertEqual(
                [model[dtype].dtype.name for dtype in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")],
                ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])

    def test_scalars_empty_tensors_metadata_and_files(self):
        tensors = {"scalar": ("F32", [], noise(1, 4)), "empty": ("F32", [0, 5], b"")}
        path = write_model(self.root / "m.safetensors", tensors, {"format": "pt", "ä": "ö"})
        node = self.connect(self.daemon())
        with node.attach(path, framework="np") as model:
            self.assertEqual((model["scalar"].shape, model["scalar"].tobytes()), ((), tensors["scalar"][2]))
            self.assertEqual((model["empty"].shape, model["empty"].dtype.name), ((0, 5), "float32"))
            self.assertEqual(model.metadata, {"format": "pt", "ä": "ö"})
            self.assertEqual(model.files["m.safetensors"].tobytes(), path.read_bytes())
            self.assertEqual((model.format, model.device, model.simulated), ("safetensors", "host", False))
            self.assertTrue(model.digest.startswith("sha256:"))
            self.assertLessEqual({"resolve", "load", "total", "request", "map"}, set(model.timings_ms))
            with self.assertRaises(KeyError):
                model["x"]
            self.assertNotIn("x", model)
            digest = model.digest
        with node.attach(digest, framework="np") as again:
            self.assertEqual(again["scalar"].tobytes(), tensors["scalar"][2])

    def test_no_flag_makes_an_array_writable(self):
        some_model(self.root / "m.safetensors")
        model = self.connect(self.daemon()).attach(self.root / "m.safetensors", framework="np")
        array = model["layer.0.weight"]
        while isinstance(array, numpy.ndarray):
            self.assertFalse(array.flags.writeable)
            with self.assertRaises(ValueError):
                array.flags.writeable = True
            array = array.base
        with self.assertRaises(ValueError):
            model["layer.0.weight"][0] = 1

    def test_a_selection_and_a_part(self):
        rows = noise(3, 8 * 6 * 4)
        write_model(self.root / "m.safetensors", {"q": ("F32", [8, 6], rows), "k": ("F32", [6], noise(4, 24))})
        node = self.connect(self.daemon())
        whole = numpy.frombuffer(rows, "<f4").reshape(8, 6)
        for dim, part in ((0, whole[2:4]), (1, whole[:, 2:3])):
            of = 8 // 2 if dim == 0 else 6
            index = 1 if dim == 0 else 2
            select = {"name": "q", "dim": dim, "of": of, "index": index}
            model = node.attach(self.root / "m.safetensors", select=select, framework="np")
            self.assertEqual(list(model), ["q"])
            self.assertEqual(model["q"].tobytes(), part.tobytes())
            self.assertEqual(model["q"].shape, part.shape)
        self.assertEqual(set(node.attach(self.root / "m.safetensors", select="k", framework="np")), {"k"})

    def test_an_unknown_framework_is_refused(self):
        some_model(self.root / "m.safetensors")
        node = self.connect(self.daemon())
        with self.assertRaises(ValueError):
            node.attach(self.root / "m.safetensors", framework="jax")
        self.assertEqual(node.list(), [], "nothing was loaded for it")

    def test_a_link_keeps_its_extension(self):
        blob = self.root / "blobs" / "0123"
        contents = some_model(blob)
        snapshot = self.root / "snapshots" / "r"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
        node = self.connect(self.daemon())
        model = node.attach(snapshot / "model.safetensors", framework="np")
        self.assertEqual({name: model[name].tobytes() for name in model}, contents)

    def test_files_that_are_opened_here_need_no_root(self):
        import tempfile

        with tempfile.TemporaryDirectory() as elsewhere:
            path = os.path.join(elsewhere, "m.safetensors")
            contents = some_model(self.root / "m.safetensors")
            os.rename(self.root / "m.safetensors", path)
            node = self.connect(self.daemon())
            with self.refused("source.file.outside_root"):
                node.attach(path)
            for name in (path, elsewhere):
                model = node.attach(name, open=True, framework="np")
                self.assertEqual({name: model[name].tobytes() for name in model}, contents)
            self.assertEqual(len(node.resolve(path, open=True)["tensors"]), 4)
            with self.refused("source.file.not_found"):
                node.attach(path + "x", open=True)


class Lifetime(Case):
    def setUp(self):
        super().setUp()
        self.path = self.root / "m.safetensors"
        self.contents = some_model(self.path)

    def test_arrays_outlive_model_connection_and_a_killed_daemon_and_then_the_mapping_is_gone(self):
        daemon = self.daemon()
        before = mappings()
        with daemon.connect() as node:
            model = node.attach(self.path, framework="np")
            array = model["layer.2.weight"]
            self.assertGreater(mappings(), before)
            model.close()
            model.close()
        daemon.end(signal.SIGKILL)
        self.assertEqual(model["layer.1.weight"].tobytes(), self.contents["layer.1.weight"])
        del model, node
        gc.collect()
        self.assertEqual(array.tobytes(), self.contents["layer.2.weight"])
        view = array[10:20]
        del array
        gc.collect()
        self.assertEqual(view.tobytes(), self.contents["layer.2.weight"][40:80])
        self.assertGreater(mappings(), before)
        del view
        gc.collect()
        self.assertEqual(mappings(), before)

    def test_a_lease_ends_with_the_last_array(self):
        daemon = self.daemon()
        node = self.connect(daemon)
        array = node.attach(self.path, framework="np")["layer.0.weight"]
        gc.collect()
        with self.refused("artifact.leased"):
            node.evict(self.path)
        del array
        gc.collect()
        until(lambda: daemon.status()["leases"] == 0, "end of the lease")
        node.evict(self.path)
        # The node goes, and the array keeps the connection that the lease belongs to.
        array = daemon.connect().attach(self.path, framework="np")["layer.0.weight"]
        gc.collect()
        self.assertEqual(daemon.status()["leases"], 1)
        del array
        gc.collect()
        until(lambda: daemon.status()["leases"] == 0, "end of the lease")

    def test_leases_of_models_that_come_and_go_do_not_add_up(self):
        daemon = self.daemon()
        node = self.connect(daemon)
        # More than one connection may hold.
        for _ in range(300):
            node.attach(self.path, framework="np")
        gc.collect()
        until(lambda: daemon.status()["leases"] == 0, "end of the leases")

    def test_two_processes_read_the_same_memory_and_one_outlives_the_other(self):
        daemon = self.daemon()
        script = """
import sys, hashlib, lodestream
model = lodestream.connect(sys.argv[1]).attach(sys.argv[2], framework="np")
print(hashlib.sha256(b"".join(model[name].tobytes() for name in sorted(model))).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(b"".join(model[name].tobytes() for name in sorted(model))).hexdigest(), flush=True)
"""
        with Child(script, daemon.socket, self.path) as one, Child(script, daemon.socket, self.path) as two:
            first = one.line()
            self.assertEqual(two.line(), first)
            status = daemon.status()
            self.assertEqual((status["leases"], len(self.connect(daemon).list())), (2, 1))
            one.process.kill()
            daemon.end(signal.SIGKILL)
            two.tell()
            self.assertEqual(two.line(), first)

    def test_a_forked_child_reads_its_arrays_and_is_told_to_connect_anew(self):
        daemon = self.daemon()
        script = """
import gc, json, os, sys, lodestream
node = lodestream.connect(sys.argv[1])
model = node.attach(sys.argv[2], framework="np")
array = model["layer.0.weight"]
pid = os.fork()
if pid == 0:
    try:
        node.status()
        code = None
    except lodestream.LodestreamError as error:
        code = error.code
    try:
        node.attach(sys.argv[2])
    except lodestream.LodestreamError as error:
        again = error.code
    sum_before = int(array.view("u1").sum())
    model.close()
    own = lodestream.connect(sys.argv[1])
    fresh = int(own.attach(sys.argv[2], framework="np")["layer.0.weight"].view("u1").sum())
    del array, model
    node.close()
    gc.collect()
    print(json.dumps([code, again, sum_before, fresh]), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
# What the child did has ended nothing here.
print(json.dumps([node.status()["leases"], int(array.view("u1").sum())]), flush=True)
"""
        expected = sum(self.contents["layer.0.weight"])
        with Child(script, daemon.socket, self.path) as child:
            self.assertEqual(json.loads(child.line()), ["client.forked", "client.forked", expected, expected])
            self.assertEqual(json.loads(child.line()), [1, expected])


if __name__ == "__main__":
    unittest.main()
