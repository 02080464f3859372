"""Torch tensors over the shared memory. Skipped where torch is not installed."""

import gc
import pickle
import signal
import unittest

from support import SIZES, Case, mappings, some_model, write_model
from test_attach import every_type

import lodestream

try:
    import torch
except ImportError:
    torch = None


@unittest.skipIf(torch is None, "torch is not installed")
class Tensors(Case):
    def bytes_of(self, tensor):
        return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())

    def test_every_type_has_its_bytes_shape_and_torch_type(self):
        contents = every_type(self.root / "m.safetensors")
        model = self.connect(self.daemon()).attach(self.root / "m.safetensors")
        self.assertEqual(model.framework, "pt", "torch has been imported")
        for dtype, content in contents.items():
            tensor = model[dtype]
            self.assertEqual(self.bytes_of(tensor), content, dtype)
            if dtype != "F4":
                self.assertEqual((tuple(tensor.shape), tensor.element_size()), ((2, 4), SIZES[dtype]), dtype)
            # Each has a storage of its own, so that saving one saves no others.
            self.assertEqual(tensor.untyped_storage().nbytes(), len(content))
        expected = {
            "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F32": torch.float32,
            "BOOL": torch.bool, "I64": torch.int64, "C64": torch.complex64, "U8": torch.uint8}
        self.assertEqual({dtype: model[dtype].dtype for dtype in expected}, expected)
        self.assertEqual(set(model.tensors()), set(contents))

    def test_the_device_is_named_as_torch_names_it(self):
        some_model(self.root / "m.safetensors")
        node = self.connect(self.daemon())
        for device in ("cpu", torch.device("cpu"), "host"):
            model = node.attach(self.root / "m.safetensors", device=device, framework="pt")
            self.assertEqual(model["layer.0.weight"].device, torch.device("cpu"))

    def test_scalars_and_empty_tensors(self):
        write_model(self.root / "m.safetensors", {"e": ("F32", [0, 5], b""), "s": ("BF16", [], b"\x80\x3f")})
        model = self.connect(self.daemon()).attach(self.root / "m.safetensors", framework="torch")
        self.assertEqual((model["s"].shape, model["s"].item()), (torch.Size([]), 1.0))
        self.assertEqual((model["e"].shape, model["e"].dtype), (torch.Size([0, 5]), torch.float32))

    def test_tensors_outlive_everything_and_then_the_mapping_is_gone(self):
        contents = some_model(self.root / "m.safetensors")
        daemon = self.daemon()
        before = mappings()
        with daemon.connect() as node:
            tensor = node.attach(self.root / "m.safetensors", framework="pt")["layer.2.weight"]
        daemon.end(signal.SIGKILL)
        view = tensor[100:200]
        del node, tensor
        gc.collect()
        self.assertEqual(self.bytes_of(view), contents["layer.2.weight"][400:800])
        self.assertGreater(mappings(), before)
        self.assertEqual(pickle.loads(pickle.dumps(view.clone())).shape, (100,))
        del view
        gc.collect()
        self.assertEqual(mappings(), before)

    def test_a_capsule_that_nobody_takes_is_freed(self):
        some_model(self.root / "m.safetensors")
        node = self.connect(self.daemon())
        before = mappings()
        region = node.attach(self.root / "m.safetensors")._attached.regions()[0]
        capsule = region.dlpack(0, 8)
        for offset, nbytes in ((region.nbytes, 1), (2**64 - 1, 2), (0, 2**63)):
            with self.assertRaises(IndexError):
                region.dlpack(offset, nbytes)
        del region
        gc.collect()
        self.assertGreater(mappings(), before)
        del capsule
        gc.collect()
        self.assertEqual(mappings(), before)

    def test_a_load_without_a_daemon(self):
        contents = some_model(self.root / "m.safetensors")
        model = lodestream.load(
            self.root / "m.safetensors", socket="/nonexistent/s", fallback="direct", framework="pt", progress=False)
        self.assertEqual({name: self.bytes_of(model[name]) for name in model}, contents)


if __name__ == "__main__":
    unittest.main()
