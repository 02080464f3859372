"""A daemon for tests: one connection on a real socket, real sealed memory, answers as the test says."""

import array
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading

F_ADD_SEALS = 1033
SHRINK, GROW, FUTURE_WRITE = 0x2, 0x4, 0x10
SEALED = SHRINK | GROW | FUTURE_WRITE


def memory(content, seals=SEALED):
    """A memfd with this content, padded to whole pages, and these seals."""
    fd = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, (len(content) + 4095) // 4096 * 4096)
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def attach_reply(parts, tensors=(), files=()):
    """An attach reply: one region of parts with these sizes."""
    return {
        "lease": 7,
        "digest": "sha256:00",
        "format": "safetensors",
        "regions": [
            {
                "device": "host",
                "bytes": sum(parts),
                "pages": "4k",
                "parts": [{"fd": index, "bytes": length} for index, length in enumerate(parts)],
            }
        ],
        "tensors": [
            {"name": name, "dtype": dtype, "shape": shape, "region": 0, "offset": offset, "nbytes": nbytes}
            for name, dtype, shape, offset, nbytes in tensors
        ],
        "files": [
            {"name": name, "region": 0, "offset": offset, "nbytes": nbytes} for name, offset, nbytes in files
        ],
        "metadata": {"format": "pt"},
        "timings_ms": {"total": 0.5},
        "a_later_field": 1,
    }


class Fake:
    """answer(method, params) gives a list of ("reply", result, fds), ("error", data), ("raw", bytes)."""

    def __init__(self, answer):
        self.requests = []
        self._answer = answer
        self._directory = tempfile.mkdtemp()
        self.path = os.path.join(self._directory, "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Waits until the client has closed its connection."""
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self._directory)

    def _serve(self):
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                self.requests.append((request["method"], request["params"]))
                for step in self._answer(request["method"], request["params"]):
                    if not self._send(connection, request["id"], step):
                        return

    @staticmethod
    def _send(connection, number, step):
        kind, content, fds = (*step, ())[:3]
        if kind == "close":
            return False
        if kind == "reply":
            content = {"jsonrpc": "2.0", "id": number, "result": content}
        elif kind == "error":
            error = {"code": -32000, "message": content["message"], "data": content}
            content = {"jsonrpc": "2.0", "id": number, "error": error}
        line = content if kind == "raw" else json.dumps(content).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = connection.sendmsg([line], ancillary)
        if sent < len(line):
            connection.sendall(line[sent:])
        for fd in fds:
            os.close(fd)
        return True
