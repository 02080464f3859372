"""A daemon under measurement: started with flags, asked over its socket, watched in /proc."""
import array
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 60
REQUEST_SECONDS_MAX = 600
# How long to wait between two looks at a state that the daemon does not announce.
LOOK_SECONDS = 0.02


class NodeError(RuntimeError):
    """The daemon did not do what was asked; the message ends with the last lines of its log."""


class Connection:
    """JSON-RPC over the socket: one request at a time. Descriptors that come along are closed at once."""

    def __init__(self, path, seconds_max=REQUEST_SECONDS_MAX):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(seconds_max)
        self.socket.connect(str(path))
        self.pending = b""
        self.next_id = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def call(self, method, **params):
        """The result; NodeError with the code if the daemon answers with an error."""
        self.next_id += 1
        request = {"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            line, newline, rest = self.pending.partition(b"\n")
            if not newline:
                self.pending += self._receive()
                continue
            self.pending = rest
            reply = json.loads(line)
            if reply.get("id") != self.next_id:
                continue  # a notification
            if "error" in reply:
                raise NodeError(f"{method}: {reply['error'].get('message')} {reply['error'].get('data')}")
            return reply["result"]

    def _receive(self):
        data, control, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(253 * 4))
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(payload[:len(payload) - len(payload) % descriptors.itemsize])
                for descriptor in descriptors:
                    os.close(descriptor)
        if not data:
            raise NodeError("the daemon closed the connection")
        return data


class Node:
    """`lodestream serve` on a private socket below a temporary directory, for the length of a `with` block."""

    def __init__(self, binary, roots, *flags, metrics=True):
        self.binary, self.roots, self.flags, self.metrics = binary, roots, flags, metrics
        self.process = None

    def __enter__(self):
        # Below /tmp whatever the work directory is: the path of a Unix socket has 107 bytes at most.
        self.directory = tempfile.TemporaryDirectory(prefix="lodestream-")
        base = pathlib.Path(self.directory.name)
        self.socket, self.log, self.state = base / "socket", base / "log", base / "state"
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.stop()
        self.directory.cleanup()

    def start(self):
        """Starts it, for the first time or again with the same socket, and waits until it is ready."""
        command = [self.binary, "serve", "--socket", self.socket, "--state-dir", self.state]
        for root in self.roots:
            command += ["--root", root]
        if self.metrics:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.metrics_address = f"127.0.0.1:{free.getsockname()[1]}"
            command += ["--metrics-listen", self.metrics_address]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*map(str, self.command(command)), *self.flags], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, env=self.environment)
        self.watch = os.pidfd_open(self.process.pid)
        self.until(lambda status: status["state"] == "ready", "readiness", START_SECONDS_MAX)

    # Of the daemon; None: that of this process.
    environment = None

    def command(self, command):
        """What starts the daemon: the command itself, unless it is to run somewhere else."""
        return command

    def stop(self, number=signal.SIGTERM):
        """Ends it with a signal, and with SIGKILL if that takes too long; → its exit status as subprocess gives it."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.watch)
            del self.watch
        return self.process.returncode

    def kill(self):
        """SIGKILL: nothing is drained."""
        self.process.kill()
        self.process.wait()

    def fail(self, message):
        tail = self.log.read_text(errors="replace").splitlines()[-8:]
        return NodeError("\n".join([message, *tail]))

    def connect(self):
        return Connection(self.socket)

    def status(self):
        with self.connect() as connection:
            return connection.call("node.status")

    def until(self, condition, what, seconds_max):
        """Asks for the status until `condition` holds for it; the daemon's end or the deadline ends the wait."""
        deadline = time.monotonic() + seconds_max
        while True:
            with contextlib.suppress(OSError):
                status = self.status()
                if condition(status):
                    return status
            if select.select([self.watch], [], [], LOOK_SECONDS)[0]:
                raise self.fail(f"the daemon ended before {what}")
            if time.monotonic() > deadline:
                raise self.fail(f"no {what} after {seconds_max} s")

    def pool_filled(self, seconds_max=300):
        """Waits for the ready pool; → the status then."""
        return self.until(lambda status: status["host"]["pool_bytes"] >= status["host"]["pool_target_bytes"] > 0,
                          "full ready pool", seconds_max)

    def load(self, source, **params):
        """Makes `source` resident; → (job, wall seconds from the request to the end of the job)."""
        with self.connect() as connection:
            begin = time.monotonic()
            job = connection.call("artifact.prefetch", source=str(source), **params)["job"]
            if job["state"] in ("queued", "running"):
                job = connection.call("job.wait", job=job["job"])["job"]
            seconds = time.monotonic() - begin
        if job["state"] != "done":
            raise self.fail(f"loading ended as {job['state']}: {job.get('error')}")
        return job, seconds

    def cpu_seconds(self):
        """utime + stime of all threads, those that have ended included."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def own_memory(self):
        """Resident bytes of the process itself, without regions and pool (which are shared memory)."""
        total = 0
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                total += int(value.split()[0]) << 10
        return total

    def metrics_page(self):
        """The text of the metrics page."""
        return urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10).read().decode()

    def shard_seconds(self):
        """{phase: seconds} of the data-plane threads so far, from the metrics page."""
        phases = {}
        for line in self.metrics_page().splitlines():
            if line.startswith("lodestream_shard_seconds_total{"):
                labels, _, value = line.rpartition(" ")
                phase = labels.split('phase="')[1].split('"')[0]
                phases[phase] = phases.get(phase, 0.0) + float(value)
        return phases
