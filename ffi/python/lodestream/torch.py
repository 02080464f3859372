"""State dicts from the daemon, as ``torch.load`` gives them.

>>> import lodestream.torch
>>> state = lodestream.torch.load("/models/llama")
>>> model.load_state_dict(state, assign=True)
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch

from . import load as _load
from ._node import Device, Path

__all__ = ["load"]


def load(path: Path, device: Device = "cpu", **options: Any) -> Any:
    """The tensors of a model directory, or of a safetensors or GGUF file, by name; of another file what ``torch.save`` wrote.

    device, options: as in `lodestream.load`.

    Tensors are views of memory that all processes of the node share. **A write to one ends the process**: clone what shall
    change. What ``torch.save`` wrote is read from that memory with ``weights_only=True``, and is this process's own.

    Raises LodestreamError.
    """
    if os.path.isdir(path) or os.fsdecode(path).endswith((".safetensors", ".gguf")):
        return _load(path, framework="pt", device=device, **options).tensors()
    (content,) = _load(path, framework="np", **options).files.values()
    return torch.load(io.BufferedReader(_Bytes(content)), map_location=device, weights_only=True)


class _Bytes(io.RawIOBase):
    """Memory as a file that is read, without a copy of all of it."""

    def __init__(self, content):
        self._content = memoryview(content)
        self._position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer):
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
