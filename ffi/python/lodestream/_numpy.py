"""Tensors as numpy arrays: read-only views over host memory, copies of what is on a GPU."""

from __future__ import annotations

import math

import numpy

from ._error import LodestreamError
from ._native import Region

# safetensors' names of types that numpy has.
_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}

# Types of ml_dtypes, and what their bits come as without it.
_ML_TYPES = {
    "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3fn", "uint8"),
    "F8_E5M2": ("float8_e5m2", "uint8"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "uint8"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "uint8"),
    "F8_E8M0": ("float8_e8m0fnu", "uint8"),
}


def _types() -> dict[str, numpy.dtype]:
    table = {name: numpy.dtype(text) for name, text in _TYPES.items()}
    try:
        import ml_dtypes
    except ImportError:
        ml_dtypes = None
    for name, (type_name, bits) in _ML_TYPES.items():
        # Older versions of ml_dtypes lack some.
        found = getattr(ml_dtypes, type_name, None)
        table[name] = numpy.dtype(bits if found is None else found)
    return table


_TABLE = _types()


class Arrays:
    """The arrays of one region. Each keeps the region's memory mapped."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._all = numpy.asarray(region) if region.device == "host" else None

    def get(self, name: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> numpy.ndarray:
        """A tensor: its own type where numpy has it, else its bytes."""
        found = _TABLE.get(dtype)
        if found is None:
            # Block-quantised or smaller than a byte.
            return self.raw(offset, nbytes)
        if math.prod(shape) * found.itemsize != nbytes:
            raise LodestreamError("client.map", f"{name!r} has {nbytes} bytes, not those of its shape")
        return self.raw(offset, nbytes).view(found).reshape(shape)

    def raw(self, offset: int, nbytes: int) -> numpy.ndarray:
        """Bytes, as uint8."""
        if self._all is not None:
            return self._all[offset : offset + nbytes]
        return numpy.frombuffer(self._region.read(offset, nbytes), dtype=numpy.uint8)
