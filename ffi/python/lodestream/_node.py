"""The daemon of this node, or an engine in this process."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

from . import _native
from ._error import LodestreamError
from ._model import Model, framework_of
from ._progress import Progress, Shown

DEFAULT_SOCKET = "/run/lodestream/lodestream.sock"

# The daemon, or its GPU, has no room beside what is in use.
_NO_ROOM = frozenset({"tier.gpu.over_budget", "tier.host.over_budget"})

Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
Select = Union[None, str, dict, Sequence[Union[str, dict]]]
Device = Any  # A text, a number, or torch's own object.
Job = dict  # The API's object, as a dict.


def connect(socket: Optional[Path] = None, *, fallback: Optional[str] = None, device: Device = "host") -> Node:
    """Connects to the daemon at ``socket``; default: LODESTREAM_SOCKET, else /run/lodestream/lodestream.sock.

    ``fallback="direct"``: where no daemon can be reached, an engine in this process instead, for loads to ``device``.
    LodestreamError ``client.connect`` without one.
    """
    if fallback not in (None, "direct"):
        raise ValueError(f"fallback is None or 'direct', not {fallback!r}")
    path = os.fsdecode(socket or os.environ.get("LODESTREAM_SOCKET") or DEFAULT_SOCKET)
    try:
        return Node(_native.Node(path), direct=False)
    except LodestreamError as error:
        if fallback is None or error.code != "client.connect":
            raise
    return direct(device)


def direct(device: Device = "host") -> Node:
    """An engine in this process, for where no daemon runs: files are read with this process's rights, as the daemon reads them.

    Nothing is shared with other processes, and nothing stays resident: each attach reads anew, and the memory is free when the
    last array is gone. ``device``: the host, or the one GPU that loads may go to.
    """
    return Node(_native.Node.direct(_device(device)), direct=True)


def load(
    path: Path,
    *,
    framework: Optional[str] = None,
    device: Device = "host",
    select: Select = None,
    fallback: Optional[str] = None,
    socket: Optional[Path] = None,
    progress: Progress = True,
    open: bool = False,
) -> Model:
    """A model by way of the daemon: attached if it is resident, else loaded first. See ``Node.attach``.

    ``fallback="direct"``: where no daemon can be reached, it is read in this process. The connection ends with the model.
    """
    node = connect(socket, fallback=fallback, device=device)
    attach = dict(select=select, progress=progress, device=device, framework=framework, open=open)
    if node.is_direct:
        with node:
            return node.attach(path, **attach)
    return node.attach(path, **attach)


class Node:
    """A connection. Leases end with it; arrays do not. Several threads may use it; loads do not keep other calls waiting.

    path: made absolute here; ``file:///…`` and, where an artifact is resident, ``sha256:…`` are taken too.
    select: a list of globs over tensor names, or ``{"name": glob, "dim": 0, "of": 8, "index": 3}`` for a part.
    device: ``host`` or ``cpu``; ``cuda``, ``cuda:1`` or 1 (a GPU as this process numbers it); ``gpu:GPU-<uuid>``.
    open: open the files here and send them, so that this process's rights and its view of the file system decide.
    progress: True for a line on stderr if it is a terminal, False for none, or a function that is called with a dict
    (``bytes``, ``total``, ``rate``, ``eta_ms``, ``bottleneck``, …). What it raises ends the wait.

    A daemon that was restarted is connected to anew by the next call. Ctrl-C during a load ends its job, unless somebody else
    waits for it. Errors are LodestreamError, with the codes of docs/errors.md; in a process that was forked after it had
    connected ``client.forked``.
    """

    def __init__(self, native: _native.Node, direct: bool) -> None:
        self._native = native
        self._direct = direct

    @property
    def is_direct(self) -> bool:
        """Whether this is an engine in this process."""
        return self._direct

    def close(self) -> None:
        """Ends the connection and its leases. Can be called twice."""
        self._native.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(
        self,
        path: Path,
        select: Select = None,
        progress: Progress = True,
        device: Device = "host",
        wait: bool = True,
        *,
        framework: Optional[str] = None,
        verify: bool = False,
        open: bool = False,
    ) -> Model:
        """A lease on an artifact, and its tensors. Loads it first if it must; ``artifact.not_resident`` if it must and not ``wait``.

        framework: ``np`` for numpy, ``pt`` for torch; default: ``pt`` if this process has imported torch.
        verify: compare what is in memory with the checksums of when it arrived, before it is handed out.
        """
        framework = framework_of(framework)
        named = (*self._source(path, open), _device(device), _select(select))
        with Shown(progress) as show:
            attached = _with_room(lambda: self._native.attach(*named, wait, verify, show))
        return Model(attached, framework)

    def prefetch(
        self,
        path: Path,
        select: Select = None,
        progress: Progress = True,
        device: Device = "host",
        priority: int = 0,
        deadline: Optional[float] = None,
        detach: bool = False,
        pin: bool = False,
        wait: bool = True,
        *,
        targets: Optional[Sequence[dict]] = None,
        open: bool = False,
    ) -> Job:
        """Makes an artifact resident and gives its job as a dict.

        priority: larger goes first. deadline: seconds. detach: the job goes on when the wait for it is interrupted; not
        ``wait`` implies it. pin: not evicted until ``unpin``. targets: several GPUs from one read of the files, each
        ``{"device": …, "select": […]}``, instead of device and select.
        """
        if targets is not None:
            targets = [{**target, "device": _device(target["device"])} for target in targets]
        named = (*self._source(path, open), _device(device), _select(select))
        with Shown(progress if wait else False) as show:
            return _with_room(
                lambda: self._native.prefetch(
                    *named, targets, priority, deadline, detach or not wait, pin, wait, show
                )
            )

    def resolve(self, path: Path, *, open: bool = False) -> dict[str, Any]:
        """What an artifact is made of, without loading it: a dict.

        ``tensors``: list of ``{name, dtype, shape, file, nbytes}``; ``files``: list of ``{name, bytes}``; ``metadata``; ``format``;
        ``bytes``; ``digest`` where it is known; ``resident``: the devices that have all of it.
        """
        return self._native.resolve(*self._source(path, open))

    def hello(self) -> dict[str, Any]:
        """Who the daemon is, for whom it takes this process, its limits, devices and features."""
        return self._native.hello()

    def status(self) -> dict[str, Any]:
        """How the daemon is doing."""
        return self._native.status()

    def topology(self) -> dict[str, Any]:
        """NUMA nodes, drives, network cards and GPUs of this node."""
        return self._native.topology()

    def list(self) -> List[dict[str, Any]]:
        """What is resident or loading, most recently used first."""
        return self._native.list()

    def stat(self, path: Path, select: Select = None, device: Device = "host", *, open: bool = False) -> dict[str, Any]:
        """One artifact that is resident or loading."""
        return self._artifact("stat", path, select, device, open)

    def evict(self, path: Path, select: Select = None, device: Device = "host", *, open: bool = False) -> dict[str, Any]:
        """Evicts an artifact that nobody holds; gives it as it was."""
        return self._artifact("evict", path, select, device, open)

    def pin(self, path: Path, select: Select = None, device: Device = "host", *, open: bool = False) -> dict[str, Any]:
        """The artifact is not evicted until it is unpinned."""
        return self._artifact("pin", path, select, device, open)

    def unpin(self, path: Path, select: Select = None, device: Device = "host", *, open: bool = False) -> dict[str, Any]:
        """The artifact may be evicted again."""
        return self._artifact("unpin", path, select, device, open)

    def jobs(self) -> List[Job]:
        """Jobs that run or have ended lately, newest first."""
        return self._native.jobs()

    def job(self, job: Union[int, Job]) -> Job:
        """A job, by its number or as it was before."""
        return self._native.job(_number(job))

    def wait(self, job: Union[int, Job], timeout: Optional[float] = None, progress: Progress = False) -> Job:
        """Waits until a job has ended, or ``timeout`` seconds; gives it as it is then. Ctrl-C ends the wait, not the job."""
        with Shown(progress) as show:
            return self._native.wait(_number(job), timeout, show)

    def cancel(self, job: Union[int, Job]) -> Job:
        """Cancels a job, unless another user waits for it; gives it as it is then."""
        return self._native.cancel(_number(job))

    def _artifact(self, action: str, path: Path, select: Select, device: Device, open: bool) -> dict[str, Any]:
        return self._native.artifact(action, *self._source(path, open), _device(device), _select(select))

    def _source(self, path: Path, opened: bool) -> Tuple[str, List[str]]:
        """How the daemon is told of an artifact: its name, and the files to send."""
        text = os.fsdecode(path)
        if "://" in text or text.startswith("sha256:"):
            return text, []
        # This process may follow any link; an engine, like the daemon, only those that stay below a root.
        if opened or (self._direct and os.path.isfile(text)):
            return text, _files(text)
        return _absolute(text), []


def _with_room(load: Callable[[], Any]) -> Any:
    """Loads; once more where there was no room and the collector has found something: it may have been arrays of a model."""
    try:
        return load()
    except LodestreamError as error:
        if error.code not in _NO_ROOM or not gc.collect():
            raise
    return load()


def _absolute(text: str) -> str:
    real = os.path.realpath(text)
    if os.path.splitext(real)[1] == os.path.splitext(text)[1] or os.path.isdir(real):
        return real
    # The file of a Hugging Face snapshot is a link to one without an extension, which says what it is.
    head, tail = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(head), tail)


def _files(text: str) -> list[str]:
    path = os.path.abspath(text)
    if not os.path.isdir(path):
        return [path]
    with os.scandir(path) as entries:
        return sorted(entry.path for entry in entries if entry.is_file() and not entry.name.startswith("."))


def _select(select: Select) -> Optional[list]:
    if select is None:
        return None
    return [select] if isinstance(select, (str, dict)) else list(select)


def _device(device: Device) -> str:
    text = f"cuda:{device}" if isinstance(device, int) else str(device)
    if text in ("host", "cpu"):
        return "host"
    kind, _, number = text.partition(":")
    if kind != "cuda":
        return text
    if not number:
        # torch's current device, without making it initialise the GPU.
        torch = sys.modules.get("torch")
        number = str(torch.cuda.current_device()) if torch is not None and torch.cuda.is_initialized() else "0"
    gpus = _native.gpus()
    if not number.isdecimal() or int(number) >= len(gpus):
        raise LodestreamError("device.unavailable", f"{text} is not available: this process is shown {len(gpus)} GPUs")
    return f"gpu:{gpus[int(number)][0]}"


def _number(job: Union[int, Job]) -> int:
    return job["job"] if isinstance(job, dict) else job
