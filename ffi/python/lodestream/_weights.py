"""The weights of a model as names and tensors, one after the other, as inference engines take them."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

from . import load

_INDEX = "model.safetensors.index.json"


def stream(folder: str, files: list[str]) -> Iterator[tuple[str, Any]]:
    """(name, torch tensor on the CPU) of each tensor; views of memory that must not be written.

    folder: the model's directory. files: those of its safetensors files that are wanted, as paths.

    Without a daemon the files are read in this process. Raises LodestreamError.
    """
    # All of a model's files are one artifact: the one that others have who name its directory.
    for path in [folder] if set(files) == _belonging(folder) else files:
        model = load(path, framework="pt", fallback="direct")
        for name in model:
            yield name, model[name]


def _belonging(folder):
    """The files that the daemon takes for a directory, as paths: those of its index, else all."""
    indices = glob.glob(os.path.join(glob.escape(folder), "*.safetensors.index.json"))
    named = os.path.join(folder, _INDEX)
    if named in indices:
        indices = [named]
    if not indices:
        return set(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if len(indices) > 1:
        return set()
    with open(indices[0]) as index:
        return {os.path.join(folder, name) for name in json.load(index)["weight_map"].values()}
