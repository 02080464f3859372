"""One request at a time over the daemon's socket: JSON-RPC lines, descriptors beside them."""

import array
import json
import os
import socket
import threading

from ._error import LodestreamError

REPLY_BYTES_MAX = 256 << 20
"""Longest line that is taken from a daemon."""

RECEIVE_BYTES = 256 << 10
FDS_MAX = 253
"""Most descriptors that the kernel carries in one message."""

# From Linux; the socket module has it as an attribute only in some builds.
MSG_CMSG_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0x40000000)


class Connection:
    """A connection to the daemon. Calls of several threads wait for each other."""

    def __init__(self, path):
        self._lock = threading.Lock()
        self._id = 0
        self._rest = bytearray()
        self._broken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            message = f"cannot reach the daemon at {path}: {error}; is `lodestream serve` running?"
            raise LodestreamError("client.connect", message, retryable=True) from error

    def close(self):
        self._socket.close()

    def call(self, method, params, progress=None):
        """The method's result and the descriptors that came with it, which the caller closes.

        progress is called with each ``job.progress`` that comes before the reply.
        """
        with self._lock:
            if self._broken or self._socket.fileno() < 0:
                raise LodestreamError("client.disconnected", "the connection is closed", retryable=True)
            self._id += 1
            request = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}
            # Until the reply is here, an exception leaves the stream in the middle of something.
            self._broken = True
            fds = []
            try:
                try:
                    self._socket.sendall(json.dumps(request).encode() + b"\n")
                except BrokenPipeError:
                    pass  # A daemon that refuses a line before its end answers why, then closes.
                reply = self._reply(fds, progress)
            except OSError as error:
                _close_all(fds)
                raise LodestreamError("client.disconnected", str(error), retryable=True) from error
            except BaseException:
                _close_all(fds)
                raise
            self._broken = False
            if "error" in reply:
                _close_all(fds)
                raise _error_of(reply["error"])
            return reply["result"], fds

    def _reply(self, fds, progress):
        while True:
            message = self._message(fds)
            if message.get("method") == "job.progress":
                if progress is not None:
                    progress(message["params"])
            elif "method" in message:
                continue  # A later version may notify of more.
            elif message.get("id") == self._id and ("result" in message) != ("error" in message):
                return message
            elif message.get("id") is None and "error" in message:
                return message  # The daemon could not read the request's id; there is only one request.
            else:
                raise _protocol("a reply to another request")

    def _message(self, fds):
        scanned = 0
        while True:
            end = self._rest.find(b"\n", scanned)
            if end >= 0:
                line = bytes(self._rest[:end])
                del self._rest[: end + 1]
                try:
                    message = json.loads(line)
                except ValueError as error:
                    raise _protocol(str(error)) from error
                if not isinstance(message, dict):
                    raise _protocol("not an object")
                return message
            scanned = len(self._rest)
            if scanned > REPLY_BYTES_MAX:
                raise _protocol(f"a line is longer than {REPLY_BYTES_MAX} bytes")
            self._receive(fds)

    def _receive(self, fds):
        space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        data, ancillary, flags, _ = self._socket.recvmsg(RECEIVE_BYTES, space, MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                fds.extend(received)
        if flags & socket.MSG_CTRUNC:
            raise _protocol("more descriptors came than one message can carry")
        if not data:
            raise LodestreamError(
                "client.disconnected", "the daemon closed the connection", retryable=True
            )
        self._rest += data


def _close_all(fds):
    while fds:
        os.close(fds.pop())


def _protocol(message):
    return LodestreamError("client.protocol", f"the daemon's answer is not understood: {message}")


def _error_of(error):
    data = error.get("data") or {}
    return LodestreamError(
        data.get("code", "internal"),
        data.get("message") or error.get("message", ""),
        bool(data.get("retryable", False)),
        data.get("kept", ""),
    )
