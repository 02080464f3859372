"""What processes beside the daemon can do with a region of a GPU: attach it, hand its descriptor to a program, ask that."""
import array
import contextlib
import hashlib
import json
import pathlib
import socket
import subprocess
import sys

from .node import Connection, NodeError

HERE = pathlib.Path(__file__).resolve().parent
IMPORTER, FORWARD = HERE / "importer.py", HERE / "forward.py"
# How much of a region is compared, bytes.
SPAN_MAX = 64 << 20
STOP_SECONDS_MAX = 60
DESCRIPTORS_MAX = 16


class Lease(Connection):
    """A lease on one artifact on a GPU: `fd` of its region, and the reply."""

    def __init__(self, path, source, **params):
        super().__init__(path)
        self.fds = array.array("i")
        self.reply = self.call("artifact.attach", source=str(source), **params)
        (self.fd,) = self.fds
        (self.region,) = self.reply["regions"]

    def _receive(self):
        data, control, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(DESCRIPTORS_MAX * self.fds.itemsize))
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.fds.frombytes(payload[:len(payload) - len(payload) % self.fds.itemsize])
        if not data:
            raise NodeError("the daemon closed the connection")
        return data

    def __exit__(self, *_):
        # This process goes on: that nothing is mapped any more is known only because it says so.
        with contextlib.suppress(OSError, NodeError):
            self.call("lease.release", lease=self.reply["lease"])
        super().__exit__()
        socket.close(self.fd)

    def task(self, **fields):
        """What a program is told to import it."""
        return {"fd": self.fd, "bytes": self.region["bytes"], "uuid": self.region["device"].removeprefix("gpu:")} | fields

    def expected(self, directory):
        """(how many bytes, their digest) of the beginning of the region, as the files say: zeros between tensors."""
        span = min(SPAN_MAX, self.region["bytes"])
        content, data = bytearray(span), {}
        for path in sorted(directory.glob("*.safetensors")):
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                for name, tensor in json.loads(file.read(header)).items():
                    if name != "__metadata__":
                        data[name] = (path, 8 + header + tensor["data_offsets"][0])
        for tensor in self.reply["tensors"]:
            offset, path_and_start = tensor["offset"], data[tensor["name"]]
            size = max(0, min(tensor["nbytes"], span - offset))
            if size:
                with open(path_and_start[0], "rb") as file:
                    file.seek(path_and_start[1])
                    content[offset:offset + size] = file.read(size)
        return span, hashlib.sha256(content).hexdigest()


class Program:
    """A process of its own that carries out one task; `answers` of it as they come."""

    def __init__(self, path, task, fd=None):
        # As text: it may run as a user who cannot read the file.
        code = [str(path)] if path == FORWARD else ["-c", path.read_text()]
        self.process = subprocess.Popen([sys.executable, *code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, pass_fds=[] if fd is None else [fd])
        self.say(json.dumps(task))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait(STOP_SECONDS_MAX)
        return {"error": f"ended with {code}: {self.process.stderr.read().strip()[-400:]}"}

    def ask(self):
        """The next answer of one who waits for a line before each."""
        try:
            self.say("")
        except BrokenPipeError:
            pass
        return self.answer()


def run(path, task, fd=None):
    """The one answer of a program."""
    with Program(path, task, fd) as program:
        return program.answer()
