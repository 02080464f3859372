"""In place of ``safetensors.torch``."""

from __future__ import annotations

import os
import types
from typing import Any, Union

import safetensors.torch as _stock
import torch
from safetensors.torch import load, save, save_file, save_model

from ._open import safe_open

__all__ = ["load", "load_file", "load_model", "save", "save_file", "save_model"]


def load_file(
    filename: Union[str, "os.PathLike[str]"], device: Union[str, int] = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, as tensors of their shapes on ``device``.

    On the CPU they share the daemon's memory, which cannot be written: see `lodestream.safetensors.safe_open`, also for
    what is raised and for ``backend``.
    """
    with safe_open(filename, framework="pt", device=device, backend=backend) as file:
        return file.get_tensors()


# The stock function (which names are missing or too many, tensors that share memory), with the `load_file` of this module.
load_model = types.FunctionType(
    _stock.load_model.__code__, {**vars(_stock), "load_file": load_file}, "load_model", _stock.load_model.__defaults__
)
load_model.__kwdefaults__ = _stock.load_model.__kwdefaults__
load_model.__doc__ = _stock.load_model.__doc__


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)
