"""In place of ``safetensors.numpy``."""

from __future__ import annotations

import os
from typing import Any, Union

import numpy as np
import safetensors.numpy as _stock
from safetensors.numpy import load, save, save_file

from ._open import safe_open

__all__ = ["load", "load_file", "save", "save_file"]


def load_file(filename: Union[str, "os.PathLike[str]"], *, backend: str = "mmap") -> dict[str, np.ndarray]:
    """All tensors of a file by name, as arrays of their shapes; read-only where they come from the daemon's memory.

    Raises what `lodestream.safetensors.safe_open` raises, which also says what ``backend`` is.
    """
    with safe_open(filename, framework="np", backend=backend) as file:
        return file.get_tensors()


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)
