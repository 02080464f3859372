"""A connection to the daemon of this node."""

import os
import sys

from ._connection import Connection
from ._error import LodestreamError
from ._model import attached

DEFAULT_SOCKET = "/run/lodestream/lodestream.sock"


def connect(socket=None):
    """Connects to the daemon at ``socket``; default: LODESTREAM_SOCKET, else /run/lodestream/lodestream.sock."""
    return Node(os.fspath(socket or os.environ.get("LODESTREAM_SOCKET") or DEFAULT_SOCKET))


class Node:
    """A connection. Leases end with it; arrays do not.

    A path is made absolute here; ``file:///…`` and, where an artifact is resident, ``sha256:…`` are taken too.
    ``select``: a list of globs over tensor names, or ``{"name": glob, "dim": 0, "of": 8, "index": 3}`` for a part.
    ``progress``: True for a line on stderr if it is a terminal, False for none, or a function that is called with
    a dict (``bytes``, ``total``, ``rate``, ``eta_ms``, ``bottleneck``, …).
    """

    def __init__(self, path):
        self._connection = Connection(path)

    def close(self):
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def attach(self, path, select=None, progress=True, device="host", wait=True):
        """A lease on an artifact, and its tensors. Loads it first if it must; raises if it must and not ``wait``."""
        request = {**_named(path), "device": device, "wait": wait, **_selected(select)}
        with _Progress(progress) as show:
            request["notify"] = show is not None
            reply, fds = self._connection.call("artifact.attach", request, show)
        return attached(reply, fds, self._release)

    def prefetch(
        self,
        path,
        select=None,
        progress=True,
        device="host",
        priority=0,
        deadline=None,
        detach=False,
        pin=False,
        wait=True,
    ):
        """Makes an artifact resident and gives its job as a dict. deadline: seconds. Not ``wait`` implies ``detach``."""
        request = {
            "source": _source(path),
            "device": device,
            "priority": priority,
            "detach": detach or not wait,
            "pin": pin,
            **_selected(select),
        }
        if deadline is not None:
            request["deadline_ms"] = round(deadline * 1000)
        job = self._call("artifact.prefetch", request)["job"]
        if not wait:
            return job
        if job["state"] in ("queued", "running"):
            with _Progress(progress) as show:
                request = {"job": job["job"], "notify": show is not None}
                job = self._call("job.wait", request, show)["job"]
        error = job.get("error")
        if error is not None:
            raise LodestreamError(
                error["code"], error["message"], error.get("retryable", False), error.get("kept", "")
            )
        if job["state"] != "done":
            raise LodestreamError("job.cancelled", "the job was cancelled", retryable=True)
        return job

    def list(self):
        """What is resident or loading, as dicts."""
        return self._call("artifact.list", {})["artifacts"]

    def status(self):
        """How the daemon is doing, as a dict."""
        return self._call("node.status", {})

    def evict(self, path, select=None, device="host"):
        """Evicts an artifact that nobody holds; gives it as it was."""
        return self._artifact("artifact.evict", path, select, device)

    def pin(self, path, select=None, device="host"):
        """The artifact is not evicted until it is unpinned."""
        return self._artifact("artifact.pin", path, select, device)

    def unpin(self, path, select=None, device="host"):
        """The artifact may be evicted again."""
        return self._artifact("artifact.unpin", path, select, device)

    def _artifact(self, method, path, select, device):
        return self._call(method, {**_named(path), "device": device, **_selected(select)})["artifact"]

    def _release(self, lease):
        try:
            self._call("lease.release", {"lease": lease})
        except LodestreamError as error:
            # A connection that is gone has ended its leases.
            if error.code != "client.disconnected":
                raise

    def _call(self, method, params, progress=None):
        result, fds = self._connection.call(method, params, progress)
        for fd in fds:
            os.close(fd)
        return result


def _source(path):
    text = os.fspath(path)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    return text if "://" in text else os.path.realpath(text)


def _named(path):
    if isinstance(path, str) and path.startswith("sha256:"):
        return {"digest": path}
    return {"source": _source(path)}


def _selected(select):
    if select is None:
        return {}
    return {"select": [select] if isinstance(select, (str, dict)) else list(select)}


class _Progress:
    """What to call with a job's progress, or None; wipes its line at the end."""

    def __init__(self, progress):
        self._function = progress if callable(progress) else None
        self._line = self._function is None and bool(progress) and sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self):
        return self._print if self._line else self._function

    def __exit__(self, *_):
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @staticmethod
    def _print(job):
        total, rate, eta = job["total"], job["rate"], job.get("eta_ms")
        text = f"{100 * job['bytes'] // max(total, 1):3} % of {total / 2**30:.2f} GiB, {rate / 2**30:.2f} GiB/s"
        if eta is not None:
            text += f", {eta / 1000:.1f} s left"
        if job.get("bottleneck"):
            text += f", {job['bottleneck']}-bound"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
