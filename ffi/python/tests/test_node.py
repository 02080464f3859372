"""Jobs, errors, interrupts, and a daemon that comes and goes."""

import gc
import os
import signal
import threading
import unittest

from support import Case, Child, large_model, some_model, until

import lodestream


class Jobs(Case):
    def test_prefetch_reports_waits_and_gives_the_job(self):
        path = large_model(self.root / "m.safetensors", 64)
        node = self.connect(self.daemon())
        seen = []
        job = node.prefetch(path, progress=seen.append, pin=True, priority=3, deadline=60)
        self.assertEqual((job["state"], job["bytes"]), ("done", path.stat().st_size))
        self.assertEqual((seen[-1]["state"], seen[-1]["job"]), ("done", job["job"]))
        self.assertEqual([entry["pinned"] for entry in node.list()], [True])
        self.assertEqual(node.job(job)["digest"], job["digest"])
        self.assertIn(job["job"], [other["job"] for other in node.jobs()])
        self.assertEqual(node.wait(job["job"])["state"], "done")
        with self.refused("artifact.pinned"):
            node.evict(path)
        self.assertFalse(node.unpin(path)["pinned"])
        self.assertTrue(node.pin(path)["pinned"])
        node.unpin(path)
        self.assertEqual(node.stat(path)["leases"], 0)
        self.assertEqual(node.evict(path)["state"], "resident")
        self.assertEqual(node.list(), [])

    def test_what_is_not_waited_for_goes_on_without_its_connection(self):
        path = large_model(self.root / "m.safetensors", 64)
        daemon = self.daemon()
        with daemon.connect() as node:
            job = node.prefetch(path, wait=False)
            self.assertIn(job["state"], ("queued", "running"))
        self.assertEqual(self.connect(daemon).wait(job, progress=lambda job: None)["state"], "done")

    def test_a_wait_can_end_before_its_job(self):
        path = large_model(self.root / "m.safetensors")
        node = self.connect(self.daemon())
        job = node.prefetch(path, wait=False)
        node.wait(job, timeout=0)
        self.assertEqual(node.wait(job)["state"], "done")
        for timeout in (-1, float("nan"), float("inf")):
            with self.refused("api.bad_params"):
                node.wait(job, timeout=timeout)

    def test_a_cancelled_job_is_an_error_to_who_waits_for_it(self):
        # A load may be faster than its cancellation; then the next one is tried.
        node = self.connect(self.daemon("--pages", "4k"))
        for attempt in range(8):
            path = large_model(self.root / f"{attempt}.safetensors")
            job = node.prefetch(path, wait=False)
            node.cancel(job)
            if node.wait(job)["state"] == "cancelled":
                break
            node.evict(path)
        else:
            self.fail("no job could be cancelled")
        self.assertEqual(node.job(job)["error"]["code"], "job.cancelled")

    def test_what_a_progress_function_raises_ends_the_job(self):
        node = self.connect(self.daemon("--pages", "4k"))

        def stop(job):
            raise KeyError(job["job"])

        for attempt in range(8):
            path = large_model(self.root / f"{attempt}.safetensors")
            with self.assertRaises(KeyError) as raised:
                node.attach(path, progress=stop)
            if node.wait(raised.exception.args[0])["state"] == "cancelled":
                break
            node.evict(path)
        else:
            self.fail("no job could be ended")

    def test_what_only_the_collector_frees_makes_room_for_a_load(self):
        first, second = (large_model(self.root / f"{name}.safetensors", 300) for name in "ab")
        node = self.connect(self.daemon())
        gc.disable()
        self.addCleanup(gc.enable)
        for load in (node.attach, node.prefetch):
            cycle = [node.attach(first, framework="np")["w"]]
            cycle.append(cycle)
            del cycle
            load(second)
        held = node.attach(second, framework="np")["w"]
        with self.refused("tier.host.over_budget"):
            node.attach(first)
        self.assertEqual(held.shape, (300 << 20,))

    def test_several_threads_use_one_node_and_a_load_keeps_nobody_waiting(self):
        path = large_model(self.root / "m.safetensors")
        some_model(self.root / "s.safetensors")
        node = self.connect(self.daemon())
        node.prefetch(self.root / "s.safetensors", progress=False)
        answered = []

        def ask(job):
            # On the thread that loads, while it loads; and on others.
            answered.append(node.attach(self.root / "s.safetensors", wait=False, framework="np").lease)

        threads = [threading.Thread(target=node.attach, args=(path,), kwargs={"progress": ask}) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertGreaterEqual(len(answered), 3)
        self.assertEqual(len({entry["source"] for entry in node.list()}), 2)


class Errors(Case):
    def test_each_has_its_code(self):
        some_model(self.root / "m.safetensors")
        (self.root / "bad.safetensors").write_bytes(b"\xff" * 100)
        node = self.connect(self.daemon())
        path = self.root / "m.safetensors"
        for code, call in [
            ("source.file.not_found", lambda: node.attach(self.root / "x")),
            ("source.file.outside_root", lambda: node.attach("/etc/hostname")),
            ("source.scheme_unsupported", lambda: node.attach("s3://bucket/m")),
            ("catalog.safetensors.header_too_large", lambda: node.attach(self.root / "bad.safetensors")),
            ("artifact.not_resident", lambda: node.attach(path, wait=False)),
            ("artifact.not_found", lambda: node.attach("sha256:00")),
            ("select.no_match", lambda: node.attach(path, select="x")),
            ("api.bad_params", lambda: node.attach(path, select={"name": "x"})),
            ("api.bad_params", lambda: node.attach(path, device="moon")),
            ("device.unavailable", lambda: node.attach(path, device="gpu:0")),
            ("device.unavailable", lambda: node.attach(path, device="cuda:7")),
            ("artifact.not_resident", lambda: node.evict(path)),
            ("job.not_found", lambda: node.job(99)),
            ("job.not_found", lambda: node.cancel(99)),
            ("client.connect", lambda: lodestream.connect("/nonexistent/s")),
            ("client.connect", lambda: lodestream.load(path, socket="/nonexistent/s")),
        ]:
            with self.subTest(code), self.refused(code):
                call()
        with self.assertRaises(lodestream.LodestreamError) as raised:
            node.attach(path, wait=False)
        error = raised.exception
        self.assertEqual((error.retryable, error.kept), (False, ""))
        self.assertIn("[artifact.not_resident]", str(error))
        with self.assertRaises(TypeError):
            node.attach(path, select=[object()])
        deep = []
        for _ in range(100):
            deep = [deep]
        with self.assertRaises(TypeError):
            node.attach(path, select=deep)
        self.assertEqual(node.list(), [])

    def test_a_closed_node_says_so(self):
        node = self.connect(self.daemon())
        node.close()
        node.close()
        with self.refused("client.disconnected"):
            node.status()

    def test_the_node_describes_itself_and_its_artifacts(self):
        path = self.root / "m.safetensors"
        some_model(path)
        node = self.connect(self.daemon())
        self.assertEqual(node.hello()["server"], f"lodestream {lodestream.__version__}")
        self.assertEqual(node.status()["state"], "ready")
        self.assertIn("drives", node.topology())
        found = node.resolve(path)
        self.assertEqual([tensor["name"] for tensor in found["tensors"]], [f"layer.{n}.weight" for n in range(4)])
        self.assertEqual(found["tensors"][0]["shape"], [5000])
        self.assertEqual((found["metadata"], found["resident"]), ({"format": "pt"}, []))
        self.assertEqual(node.list(), [], "nothing was loaded")


class Restart(Case):
    def test_the_next_call_connects_anew_and_what_was_attached_stays(self):
        path = self.root / "m.safetensors"
        contents = some_model(path)
        daemon = self.daemon()
        node = self.connect(daemon)
        model = node.attach(path, framework="np")
        daemon.end(signal.SIGKILL)
        with self.refused("client.connect"):
            node.status()
        daemon.start()
        # Its lease belonged to a connection that is gone; closing it must not end one of the new daemon.
        second = node.attach(path, framework="np")
        self.assertEqual(second.lease, model.lease)
        model.close()
        self.assertEqual(daemon.status()["leases"], 1)
        for held in (model, second):
            self.assertEqual({name: held[name].tobytes() for name in held}, contents)
        del model
        gc.collect()
        self.assertEqual(daemon.status()["leases"], 1)


class Interrupts(Case):
    SCRIPT = """
import signal, sys, lodestream
# Where the tests were started in the background, SIGINT is ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
node = lodestream.connect(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    {call}
    print("done", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.readline()
print(node.status()["state"], flush=True)
"""

    def interrupt(self, call, connections):
        """Interrupts a call to a daemon that does not answer; then it answers again."""
        path = large_model(self.root / "m.safetensors", 64)
        daemon = self.daemon()
        with Child(self.SCRIPT.replace("{call}", call), daemon.socket, path) as child:
            self.assertEqual(child.line(), "ready")
            daemon.send(signal.SIGSTOP)
            os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)
            child.tell()
            until(lambda: waits(child.process.pid) and sockets(child.process.pid) == connections, "call")
            child.process.send_signal(signal.SIGINT)
            self.assertEqual(child.line(), "interrupted")
            daemon.send(signal.SIGCONT)
            child.tell()
            self.assertEqual(child.line(), "ready")
            until(lambda: daemon.status()["jobs"] == 0, "end of the job")
            states = {job["state"] for job in self.connect(daemon).jobs()}
            self.assertLessEqual(states, {"cancelled"})

    def test_ctrl_c_ends_a_load_and_the_node_goes_on(self):
        self.interrupt("node.prefetch(sys.argv[2], progress=False)", 2)

    def test_ctrl_c_ends_a_call_that_is_not_answered(self):
        self.interrupt("node.status()", 1)


def sockets(pid):
    """Sockets of a process."""
    directory = f"/proc/{pid}/fd"
    links = [os.readlink(os.path.join(directory, name)) for name in os.listdir(directory)]
    return sum(link.startswith("socket:") for link in links)


def waits(pid):
    """Whether its first thread is in poll(2) or ppoll(2)."""
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0] in ("7", "271")


if __name__ == "__main__":
    unittest.main()
