"""Simulated GPUs: a test runs itself again in a process whose libcuda is the simulated one. Nothing here ran on a real GPU."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from support import BINARY, Case, some_model, until

import lodestream

INSIDE = "CUDA_SIM_DIR"
DEVICES = [{"memory_bytes": 256 << 20}, {"memory_bytes": 256 << 20}]


def simulated(test):
    """Runs the test in a process that has simulated GPUs."""

    def run(self):
        if INSIDE in os.environ:
            return test(self)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as machine:
            libraries = pathlib.Path(machine) / "lib"
            libraries.mkdir()
            (libraries / "libcuda.so.1").symlink_to(BINARY.parent / "libcuda_sim.so")
            (libraries / "libnvidia-ml.so.1").symlink_to(BINARY.parent / "libnvml_sim.so")
            environment = {
                **os.environ, INSIDE: machine, "LD_LIBRARY_PATH": str(libraries),
                "CUDA_SIM_DEVICES": json.dumps(DEVICES), "PYTHONPATH": os.pathsep.join(sys.path)}
            name = f"{pathlib.Path(__file__).stem}.{self.id().split('.', 1)[-1]}"
            ran = subprocess.run(
                [sys.executable, "-m", "unittest", name], cwd=pathlib.Path(__file__).parent, env=environment,
                capture_output=True, text=True)
            self.assertEqual(ran.returncode, 0, ran.stderr)

    run.__name__ = test.__name__
    return run


class Simulated(Case):
    def setUp(self):
        super().setUp()
        self.path = self.root / "m.safetensors"
        self.contents = some_model(self.path)

    def node(self):
        return self.connect(self.daemon("--gpu-budget", "128MiB"))

    def assert_read(self, model):
        self.assertEqual({name: model[name].tobytes() for name in model}, self.contents)

    @simulated
    def test_tensors_are_copies_and_said_to_be_simulated(self):
        node = self.node()
        uuids = [uuid for uuid, _, _ in lodestream._native.gpus()]
        self.assertEqual(len(uuids), 2)
        for device, place in [("cuda:1", 1), ("cuda", 0), (1, 1), (f"gpu:{uuids[0]}", 0)]:
            model = node.attach(self.path, device=device, framework="np", progress=False)
            self.assertEqual((model.device, model.simulated), (f"gpu:{uuids[place]}", True))
            self.assert_read(model)
            self.assertFalse(model["layer.0.weight"].flags.writeable)
            self.assertIn("simulated", repr(model))
            self.assertEqual(model.files, {})
        with self.refused("device.unavailable"):
            node.attach(self.path, device="cuda:2")

    @simulated
    def test_what_sleeps_gives_its_memory_up_and_wakes(self):
        node = self.node()
        model = node.attach(self.path, device="cuda:0", framework="np", progress=False)
        lease = model.lease
        model.sleep()
        with self.refused("client.device"):
            model["layer.0.weight"]
        node.evict(self.path, device="cuda:0")
        model.wake(progress=False)
        self.assert_read(model)
        self.assertNotEqual(model.lease, lease)
        model.close()
        node.evict(self.path, device="cuda:0")

    @simulated
    def test_memory_goes_with_the_model(self):
        node = self.node()
        model = node.attach(self.path, device="cuda:0", framework="np", progress=False)
        del model
        gc.collect()
        until(lambda: node.status()["leases"] == 0, "end of the lease")
        node.evict(self.path, device="cuda:0")

        def held():
            return sum(gpu["held_bytes"] + gpu["resident_bytes"] for gpu in node.status()["gpus"])

        until(lambda: held() == 0, "free device")

    @simulated
    def test_one_read_fills_several(self):
        node = self.node()
        targets = [
            {"device": f"cuda:{rank}", "select": [{"name": "*", "dim": 0, "of": 2, "index": rank}]} for rank in range(2)]
        self.assertEqual(node.prefetch(self.path, targets=targets, progress=False)["state"], "done")
        for rank, target in enumerate(targets):
            model = node.attach(self.path, device=rank, select=target["select"], wait=False, framework="np")
            half = len(self.contents["layer.0.weight"]) // 2
            expected = self.contents["layer.0.weight"][rank * half : (rank + 1) * half]
            self.assertEqual(model["layer.0.weight"].tobytes(), expected)

    @simulated
    def test_a_forked_child_leaves_the_driver_alone(self):
        node = self.node()
        model = node.attach(self.path, device="cuda:0", framework="np", progress=False)
        pid = os.fork()
        if pid == 0:
            node.close()
            del node, model
            gc.collect()
            os._exit(0)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assert_read(model)

    @simulated
    def test_an_engine_in_this_process_loads_to_its_gpu(self):
        model = lodestream.load(
            self.path, socket="/nonexistent/s", fallback="direct", device="cuda:1", framework="np", progress=False)
        self.assertTrue(model.simulated)
        self.assert_read(model)

    @simulated
    def test_torch_gets_copies_on_the_host(self):
        try:
            import torch
        except ImportError:
            self.skipTest("torch is not installed")
        model = self.node().attach(self.path, device="cuda:0", framework="pt", progress=False)
        tensor = model["layer.1.weight"]
        self.assertEqual((tensor.device.type, tensor.dtype), ("cpu", torch.float32))
        self.assertEqual(tensor.numpy().tobytes(), self.contents["layer.1.weight"])


if __name__ == "__main__":
    unittest.main()
