"""In place of ``safetensors``: the same names, whole tensors from memory that the daemon shares with every process.

>>> from lodestream.safetensors import safe_open
>>> with safe_open("/models/llama/model.safetensors", framework="pt") as f:
...     w = f.get_tensor("model.embed_tokens.weight")

What reads a file is here; all else (saving, parsing bytes in memory, errors) is the stock package's own, so that an
``except safetensors.SafetensorError`` catches what this module raises, too.
"""

from __future__ import annotations

from typing import Any

import safetensors as _stock
from safetensors import SafetensorError, deserialize, serialize, serialize_file

from ._open import safe_open

__all__ = ["SafetensorError", "deserialize", "safe_open", "serialize", "serialize_file"]


def __getattr__(name: str) -> Any:
    return getattr(_stock, name)
