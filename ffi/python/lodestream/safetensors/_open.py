"""One file: its whole tensors from memory that the daemon shares, its slices from just their bytes of the file."""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any, Optional, Union

import safetensors
from safetensors import SafetensorError

from .. import LodestreamError, connect
from ._index import plain
from ._pieces import Reader

_log = logging.getLogger("lodestream.safetensors")

# The daemon does not reach the file by its path, or not with this process's rights: the open file may do.
_SEND_OPEN = frozenset(
    {
        "identity.cannot_act_as",
        "source.file.not_found",
        "source.file.outside_root",
        "source.file.permission_denied",
    }
)

# The daemon has no room for this file or this process, or is not there. All other codes say that something is wrong with the
# file, the drive or the memory: to read past the daemon would hide it.
_READ_HERE = frozenset(
    {
        "api.too_many_connections",
        "client.connect",
        "client.disconnected",
        "daemon.draining",
        "identity.unknown",
        "job.too_many",
        "lease.too_many",
        "source.file.changed",
        "tier.host.out_of_memory",
        "tier.host.over_budget",
    }
)

# What the daemon refuses in a header although the stock package has taken it, such as tensors that are not aligned.
_STRICTER = "catalog.safetensors."

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}

# Types that are views. Others are left to the stock reader, whose way of delivering or refusing them is the one that callers
# know: parts of bytes, and with numpy float8.
_NUMPY = "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 C64".split()
_TORCH = [*_NUMPY, *"F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0".split()]


class safe_open:
    """A safetensors file, opened lazily.

    filename: its path. framework: ``pt`` (``torch``) or ``np`` (``numpy``); others are served as the stock package does.
    device: where tensors of ``pt`` shall lie; other devices than the CPU get a copy.
    backend: ``mmap`` goes through the daemon where one serves this file, and else reads in this process as the stock
    package does; ``daemon`` raises where the daemon does not serve it; ``pread`` reads in this process.

    Through the daemon, the first ``get_tensor`` or ``get_tensors`` makes the whole file resident for every process of the
    node, and tensors are views of that memory. It cannot be written: numpy arrays say so, but **a write to such a torch
    tensor ends the process**; clone what shall change, or open with ``backend="pread"``. ``get_slice`` loads nothing: it
    reads just its bytes of the file, or none where the file is resident.

    The lease on the memory lasts as long as this object or one of its tensors is in use.

    Raises FileNotFoundError, and SafetensorError for a file or a request that is not right.
    """

    def __init__(
        self,
        filename: Union[str, "os.PathLike[str]"],
        framework: str,
        device: Union[str, int] = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        self._path = os.path.abspath(os.fsdecode(filename))
        stock_backend = "pread" if backend == "daemon" else backend
        self._stock = safetensors.safe_open(filename, framework, device=device, backend=stock_backend)
        self._reader = Reader(filename)
        self._framework = _FRAMEWORKS.get(framework)
        self._types = _types(self._framework)
        self._device = device
        self._insists = backend == "daemon"
        # Whether the daemon is still to be asked: for the file as it is, and for it to be loaded. A file without the
        # extension is not a model to it.
        served = bool(self._types) and self._path.endswith(".safetensors")
        if self._insists and not served:
            raise SafetensorError("the daemon serves files with the extension .safetensors, to pt and np")
        self._asks = self._loads = served and backend in ("mmap", "daemon")
        self._model = None

    def __enter__(self) -> safe_open:
        self._stock.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._asks = self._loads = False
        self._model = self._reader = None
        self._stock.__exit__(*exception)

    def keys(self) -> list[str]:
        """The names of the tensors, in the stock package's order."""
        return self._stock.keys()

    def offset_keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return self._stock.offset_keys()

    def metadata(self) -> Optional[dict[str, str]]:
        """The strings of the header, or None."""
        return self._stock.metadata()

    def get_tensor(self, name: str) -> Any:
        """One tensor, whole. Raises SafetensorError if there is none of this name."""
        model = self._attached(load=True)
        if model is None or not self._is_view(model, name):
            return self._stock.get_tensor(name)
        return self._placed(model[name])

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in the order of the file."""
        if self._attached(load=True) is None:
            return self._stock.get_tensors()
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> _Slice:
        """What can be indexed with integers and slices for a part of a tensor. Raises SafetensorError if there is none."""
        return _Slice(self, name, self._stock.get_slice(name))

    def _attached(self, load):
        """The resident file, or None where this process reads it itself, or where it would have to be loaded first."""
        if self._model is not None or not (self._loads if load else self._asks):
            return self._model
        self._asks, self._loads = False, self._loads and not load
        try:
            model = self._attach(load)
        except LodestreamError as error:
            if error.code != "artifact.not_resident":
                self._refused(error)
            return None
        if not self._is_the_same():
            # What is open here is the file of before, and so is what has to be delivered.
            model.close()
            self._refused(LodestreamError("source.file.changed", "it was replaced while it was open"))
            return None
        self._model = model
        return model

    def _attach(self, load):
        # Not closed: the connection ends with the lease, and that with the last tensor.
        node = connect()
        options = {"progress": False, "wait": load, "framework": self._framework}
        try:
            # A URI is taken as it is. A path would have its links resolved, and what a link of a Hugging Face cache leads to
            # has no extension.
            return node.attach(pathlib.PurePath(self._path).as_uri(), **options)
        except LodestreamError as error:
            if error.code not in _SEND_OPEN:
                raise
        return node.attach(self._path, open=True, **options)

    def _refused(self, error):
        self._loads = False
        if self._insists or not (error.code in _READ_HERE or error.code.startswith(_STRICTER)):
            raise SafetensorError(str(error)) from error
        # No daemon at all is how most machines are; anything else somebody may want to put right.
        level = logging.DEBUG if error.code == "client.connect" else logging.WARNING
        _log.log(level, "%s is read in this process: %s", self._path, error)

    def _is_the_same(self):
        """Whether the file that has this path now is the one that is open."""
        try:
            return _identity(os.stat(self._path)) == _identity(self._reader.stat())
        except OSError:
            return False

    def _is_view(self, model, name):
        return model.dtypes.get(name) in self._types

    def _placed(self, tensor):
        if self._framework == "np" or self._device == "cpu":
            return tensor
        return tensor.to(self._device)

    def _part(self, name, stock, index):
        reader, dtype, shape = self._reader, stock.get_dtype(), tuple(stock.get_shape())
        where = plain(index, shape) if dtype in self._types else None
        if where is None or reader is None:
            return stock[index]
        model = self._attached(load=False)
        if model is not None:
            return self._placed(_contiguous(model[name][where]))
        kind = self._types[dtype]
        return self._placed(_array(self._framework, kind, *reader.part(name, where, shape, kind.itemsize)))


class _Slice:
    """A tensor that is read when it is indexed, and only where."""

    def __init__(self, file, name, stock):
        self._file = file
        self._name = name
        self._stock = stock

    def get_shape(self) -> list[int]:
        """The tensor's shape, a list."""
        return self._stock.get_shape()

    def get_dtype(self) -> str:
        """The tensor's type as the file has it, such as ``F32``."""
        return self._stock.get_dtype()

    def __getitem__(self, index: Any) -> Any:
        return self._file._part(self._name, self._stock, index)


def _contiguous(part):
    """Itself if its elements lie one behind the other, else a copy: what the stock package gives can be reshaped."""
    if hasattr(part, "contiguous"):
        return part.contiguous()
    return part if part.flags.c_contiguous else part.copy()


def _types(framework):
    """The framework's types of what are views, by the names that files have for them."""
    if framework == "pt":
        from .. import _torch

        return {name: _torch._TABLE[name] for name in _TORCH}
    if framework == "np":
        from .. import _numpy

        # Without ml_dtypes there is no bfloat16, and the stock reader says so.
        return {name: kind for name in _NUMPY if (kind := _numpy._TABLE[name]).kind != "u" or name != "BF16"}
    return {}


def _array(framework, kind, flat, shape):
    """An array of the framework over bytes."""
    if framework == "np":
        return flat.view(kind).reshape(shape)
    import torch

    return (torch.frombuffer(flat, dtype=kind) if flat.size else torch.empty(0, dtype=kind)).reshape(shape)


def _identity(stat):
    """What tells a file from the one that took its place."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
