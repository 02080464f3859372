"""The client against a daemon that answers as each test says."""

import gc
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy  # noqa: E402
from fake import FUTURE_WRITE, SHRINK, Fake, attach_reply, memory  # noqa: E402

import lodestream  # noqa: E402

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None


def mappings():
    with open("/proc/self/maps") as maps:
        return sum("memfd:fake" in line for line in maps)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def attach_to(reply, fds, use=lambda model: model, **options):
    """Attaches, uses the model while the daemon lives, and outlives it."""

    def answer(method, params):
        if method == "artifact.attach":
            return [("reply", reply, fds)]
        return [("reply", {})]

    with Fake(answer) as fake:
        with lodestream.connect(fake.path) as node:
            result = use(node.attach("/models/m", **options))
    return result, fake.requests


class Attach(unittest.TestCase):
    def test_arrays_lie_across_parts_and_outlive_model_connection_and_daemon(self):
        content = numpy.arange(3 * 1024, dtype="<f4").tobytes()
        fds = [memory(content[:4096]), memory(content[4096:])]
        tensors = [
            ("a", "F32", [2, 3], 0, 24),
            ("b", "F32", [1100], 4000, 4400),
            ("scalar", "F32", [], 4, 4),
            ("empty", "F32", [0, 5], 8, 0),
            ("unaligned", "F32", [2], 3, 8),
        ]
        before = mappings()
        model, _ = attach_to(attach_reply([4096, 8192], tensors, [("m.safetensors", 0, 100)]), fds)
        self.assertEqual(list(model), ["a", "b", "scalar", "empty", "unaligned"])
        self.assertEqual((len(model), "a" in model, "x" in model), (5, True, False))
        self.assertEqual((model["a"].dtype, model["a"].shape), (numpy.dtype("<f4"), (2, 3)))
        self.assertEqual(model["scalar"], 1.0)
        self.assertEqual(model["empty"].shape, (0, 5))
        self.assertEqual(model["unaligned"].tobytes(), content[3:11])
        self.assertEqual(model.files["m.safetensors"].tobytes(), content[:100])
        self.assertEqual((model.metadata, model.digest), ({"format": "pt"}, "sha256:00"))
        with self.assertRaises(KeyError):
            model["x"]
        b = model.tensors()["b"]
        del model
        gc.collect()
        self.assertTrue(numpy.array_equal(b, numpy.arange(1000, 2100, dtype="<f4")))
        self.assertEqual(mappings(), before + 2)
        del b
        gc.collect()
        self.assertEqual(mappings(), before, "unmapped with the last array")

    def test_no_flag_makes_an_array_writable(self):
        model, _ = attach_to(attach_reply([4096], [("a", "U8", [8], 0, 8)]), [memory(b"x" * 4096)])
        for array in (model["a"], model["a"].base):
            self.assertFalse(array.flags.writeable)
            with self.assertRaises(ValueError):
                array.flags.writeable = True
        with self.assertRaises(ValueError):
            model["a"][0] = 1

    def test_every_type(self):
        widths = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
        widths.update({"F16": 2, "F32": 4, "F64": 8, "C64": 8, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1})
        tensors = [(name, name, [3], 0, 3 * width) for name, width in widths.items()]
        tensors += [("Q4_K", "Q4_K", [256], 0, 144), ("F4", "F4", [6], 0, 3)]
        model, _ = attach_to(attach_reply([4096], tensors), [memory(b"\0\x3f" * 2048)])
        for name, width in widths.items():
            self.assertEqual((model[name].itemsize, model[name].shape), (width, (3,)), name)
            self.assertEqual(model.dtypes[name], name)
        self.assertEqual((model["Q4_K"].dtype, model["Q4_K"].shape), (numpy.dtype("uint8"), (144,)))
        self.assertEqual(model["F4"].shape, (3,))
        if ml_dtypes is None:
            self.assertEqual((model["BF16"].dtype, model["BF16"][0]), (numpy.dtype("<u2"), 0x3F00))
            self.assertEqual(model["F8_E4M3"].dtype, numpy.dtype("uint8"))
        else:
            self.assertEqual((model["BF16"].dtype.name, float(model["BF16"][0])), ("bfloat16", 0.5))
            self.assertEqual(model["F8_E4M3"].dtype.name, "float8_e4m3fn")

    def test_what_does_not_fit_is_refused_and_the_lease_given_back(self):
        def region(change):
            reply = attach_reply([4096])
            change(reply["regions"][0])
            return reply

        good = memory
        page = b"x" * 4096
        regular = os.open(__file__, os.O_RDONLY)
        cases = {
            "no descriptor": (attach_reply([4096]), []),
            "a descriptor too many": (attach_reply([4096]), [good(page), good(page)]),
            "an index past the end": (
                region(lambda r: r["parts"][0].update(fd=1)),
                [good(page)],
            ),
            "one descriptor twice": (
                region(lambda r: r.update(parts=r["parts"] * 2, bytes=8192)),
                [good(page)],
            ),
            "parts that do not add up": (region(lambda r: r.update(bytes=8192)), [good(page)]),
            "more bytes than the memory has": (attach_reply([8192]), [good(page)]),
            "memory that can shrink": (attach_reply([4096]), [memory(page, FUTURE_WRITE)]),
            "memory that can be written": (attach_reply([4096]), [memory(page, SHRINK)]),
            "a file": (attach_reply([4096]), [regular]),
            "another tier": (region(lambda r: r.update(device="gpu:GPU-0")), [good(page)]),
            "a tensor past the end": (attach_reply([4096], [("t", "U8", [97], 4000, 97)]), [good(page)]),
            "a negative offset": (attach_reply([4096], [("t", "U8", [1], -1, 1)]), [good(page)]),
            "a shape of other bytes": (attach_reply([4096], [("t", "F32", [2], 0, 4)]), [good(page)]),
            "a file past the end": (attach_reply([4096], [], [("f", 1, 4096)]), [good(page)]),
        }
        for what, (reply, fds) in cases.items():
            with self.subTest(what):
                before = descriptors() - len(fds)
                codes = []

                def answer(method, params, reply=reply, fds=fds):
                    return [("reply", reply, fds) if method == "artifact.attach" else ("reply", {})]

                with Fake(answer) as fake:
                    with lodestream.connect(fake.path) as node:
                        with self.assertRaises(lodestream.LodestreamError) as raised:
                            node.attach("/models/m")
                        codes.append(raised.exception.code)
                self.assertEqual(codes, ["client.map"], raised.exception)
                self.assertEqual(fake.requests[-1], ("lease.release", {"lease": 7}))
                self.assertEqual(descriptors(), before, "every descriptor is closed")

    def test_close_gives_the_lease_back_once(self):
        def use(model):
            with model:
                array = model["a"]
            model.close()
            return array

        reply = attach_reply([4096], [("a", "U8", [3], 0, 3)])
        array, requests = attach_to(reply, [memory(b"abc")], use)
        self.assertEqual(array.tobytes(), b"abc")
        self.assertEqual([method for method, _ in requests], ["artifact.attach", "lease.release"])

    def test_the_request_says_what_was_asked(self):
        selection = [{"name": "*.q", "dim": 0, "of": 2, "index": 1}]
        _, requests = attach_to(attach_reply([]), [], select=selection, wait=False)
        expected = {"source": "/models/m", "device": "host", "wait": False, "select": selection, "notify": False}
        self.assertEqual(requests[0], ("artifact.attach", expected))

    def test_closing_a_model_after_its_connection_is_no_error(self):
        model, _ = attach_to(attach_reply([]), [])
        model.close()


class Calls(unittest.TestCase):
    def test_errors_keep_what_the_daemon_said_and_the_connection(self):
        data = {"code": "artifact.leased", "message": "in use", "retryable": True, "kept": "all of it"}
        answers = [[("error", data)], [("reply", {"artifacts": []})]]
        with Fake(lambda *_: answers.pop(0)) as fake, lodestream.connect(fake.path) as node:
            with self.assertRaises(lodestream.LodestreamError) as raised:
                node.evict("sha256:ab")
            error = raised.exception
            self.assertEqual(
                (error.code, error.message, error.retryable, error.kept),
                ("artifact.leased", "in use", True, "all of it"),
            )
            self.assertEqual(node.list(), [])
        self.assertEqual(fake.requests[0][1], {"digest": "sha256:ab", "device": "host"})

    def test_prefetch_waits_reports_progress_and_raises_why_it_failed(self):
        job = {"job": 3, "state": "running", "bytes": 1, "total": 2, "rate": 1.0}
        progress = b'{"jsonrpc":"2.0","method":"job.progress","params":{"job":3,"bytes":1}}\n'
        other = b'{"jsonrpc":"2.0","method":"new.thing","params":{}}\n'
        error = {"code": "source.file.short_read", "message": "short", "retryable": True}

        def answer(method, params):
            if method == "artifact.prefetch":
                return [("reply", {"job": job})]
            failed = {"job": {**job, "state": "failed", "error": error}}
            return [("raw", other), ("raw", progress[:20]), ("raw", progress[20:]), ("reply", failed)]

        seen = []
        with Fake(answer) as fake, lodestream.connect(fake.path) as node:
            with self.assertRaises(lodestream.LodestreamError) as raised:
                node.prefetch("/models/m", progress=seen.append, deadline=1.5, pin=True)
            self.assertEqual(raised.exception.code, "source.file.short_read")
            self.assertEqual(node.prefetch("/models/m", wait=False)["state"], "running")
        self.assertEqual(seen, [{"job": 3, "bytes": 1}])
        self.assertEqual(fake.requests[0][1]["deadline_ms"], 1500)
        self.assertEqual(fake.requests[1], ("job.wait", {"job": 3, "notify": True}))
        self.assertTrue(fake.requests[2][1]["detach"])

    def test_a_stream_that_cannot_be_followed_is_not_used_again(self):
        for line, code in [
            (b"nonsense\n", "client.protocol"),
            (b'{"jsonrpc":"2.0","id":99,"result":{}}\n', "client.protocol"),
            (b"[]\n", "client.protocol"),
            (b'{"jsonrpc":"2.0",', "client.disconnected"),
        ]:
            with self.subTest(line):
                with Fake(lambda *_, line=line: [("raw", line), ("close", None)]) as fake:
                    with lodestream.connect(fake.path) as node:
                        for expected in (code, "client.disconnected"):
                            with self.assertRaises(lodestream.LodestreamError) as raised:
                                node.status()
                            self.assertEqual(raised.exception.code, expected)

    def test_nobody_listening_is_said_with_the_path(self):
        with self.assertRaises(lodestream.LodestreamError) as raised:
            lodestream.connect("/nonexistent/s")
        self.assertEqual(raised.exception.code, "client.connect")
        self.assertIn("/nonexistent/s", str(raised.exception))


if __name__ == "__main__":
    unittest.main()
