"""Loads without a daemon."""

import gc
import json
import os
import threading
import unittest

from support import Case, Child, large_model, mappings, some_model

import lodestream


def threads():
    return len(os.listdir("/proc/self/task"))


class Direct(Case):
    def setUp(self):
        super().setUp()
        self.path = self.root / "m.safetensors"
        self.contents = some_model(self.path)

    def assert_read(self, model):
        self.assertEqual({name: model[name].tobytes() for name in model}, self.contents)

    def test_load_reads_here_if_there_is_no_daemon_and_leaves_nothing_behind(self):
        before, running = mappings(), threads()
        model = lodestream.load(
            self.path, socket="/nonexistent/s", fallback="direct", framework="np", progress=False)
        self.assertEqual(threads(), running, "the engine has ended")
        self.assert_read(model)
        self.assertFalse(model["layer.0.weight"].flags.writeable)
        self.assertEqual(model.metadata, {"format": "pt"})
        array = model["layer.3.weight"]
        model.close()
        del model
        gc.collect()
        self.assertEqual(array.tobytes(), self.contents["layer.3.weight"])
        del array
        gc.collect()
        self.assertEqual(mappings(), before)

    def test_load_goes_through_the_daemon_if_there_is_one(self):
        daemon = self.daemon()
        model = lodestream.load(self.path, socket=daemon.socket, fallback="direct", framework="np")
        self.assert_read(model)
        self.assertEqual(daemon.status()["leases"], 1)
        # What the daemon refuses is not read behind its back.
        with self.refused("source.file.outside_root"):
            lodestream.load("/etc/hostname", socket=daemon.socket, fallback="direct")

    def test_a_node_over_an_engine_can_do_what_others_can(self):
        with lodestream.direct() as node:
            self.assertTrue(node.is_direct)
            found = node.resolve(self.path)
            self.assertEqual(len(found["tensors"]), 4)
            part = node.attach(
                self.path, select={"name": "layer.1.*", "dim": 0, "of": 5, "index": 2}, framework="np")
            self.assertEqual(part["layer.1.weight"].tobytes(), self.contents["layer.1.weight"][8000:12000])
            seen = []
            self.assert_read(node.attach(self.path, framework="np", progress=seen.append))
            self.assertEqual(seen[-1]["state"], "done")
            # A directory goes by its path.
            self.assert_read(node.attach(self.root, framework="np"))
            self.assertEqual(node.list(), [], "nothing stays resident")
            self.assertEqual(node.status()["leases"], 0)
            with self.refused("source.file.not_found"):
                node.attach(self.root / "x")
        with self.refused("client.disconnected"):
            node.resolve(self.path)

    def test_links_may_lead_anywhere(self):
        link = self.root / "link.safetensors"
        blob = self.root / "blob"
        os.rename(self.path, blob)
        link.symlink_to(blob)
        with lodestream.direct() as node:
            self.assert_read(node.attach(link, framework="np"))

    def test_several_threads_attach_the_same_at_once(self):
        large = large_model(self.root / "l.safetensors", 32)
        failed = []

        def attach():
            try:
                for _ in range(5):
                    assert node.attach(large, framework="np", progress=False)["w"].nbytes == 32 << 20
                    self.assert_read(node.attach(self.path, framework="np", progress=False))
            except BaseException as error:
                failed.append(error)

        with lodestream.direct() as node:
            running = [threading.Thread(target=attach) for _ in range(3)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        self.assertEqual(failed, [])

    def test_a_forked_child_is_told_and_can_end(self):
        script = """
import json, os, sys, lodestream
node = lodestream.direct()
model = node.attach(sys.argv[1], framework="np")
pid = os.fork()
if pid == 0:
    codes = []
    for call in (node.status, lambda: node.attach(sys.argv[1])):
        try:
            call()
        except lodestream.LodestreamError as error:
            codes.append(error.code)
    total = int(model["layer.0.weight"].view("u1").sum())
    node.close()
    del node, model
    print(json.dumps([codes, total]), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(node.status()["state"], flush=True)
"""
        with Child(script, self.path) as child:
            total = sum(self.contents["layer.0.weight"])
            self.assertEqual(json.loads(child.line()), [["client.forked"] * 2, total])
            self.assertEqual(child.line(), "ready")

    def test_an_unknown_fallback_is_refused(self):
        with self.assertRaises(ValueError):
            lodestream.connect("/nonexistent/s", fallback="magic")


if __name__ == "__main__":
    unittest.main()
