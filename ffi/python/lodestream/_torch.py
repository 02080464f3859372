"""Tensors as torch tensors over the shared memory, on the host and on GPUs.

torch knows no read-only tensors: memory of the host tier is mapped read-only, so that writing into a tensor ends the
process with a signal; writing into one on a GPU is an error of the device. ``tensor.clone()`` can be written.
"""

from __future__ import annotations

import math

import torch
from torch.utils.dlpack import from_dlpack

from ._error import LodestreamError
from ._native import Region

# safetensors' names, torch's, and the type of the same size for a torch that lacks it.
_TYPES = {
    "BOOL": ("bool", "uint8"),
    "U8": ("uint8", "uint8"),
    "I8": ("int8", "int8"),
    "U16": ("uint16", "int16"),
    "I16": ("int16", "int16"),
    "U32": ("uint32", "int32"),
    "I32": ("int32", "int32"),
    "U64": ("uint64", "int64"),
    "I64": ("int64", "int64"),
    "F16": ("float16", "float16"),
    "BF16": ("bfloat16", "bfloat16"),
    "F32": ("float32", "float32"),
    "F64": ("float64", "float64"),
    "C64": ("complex64", "complex64"),
    "F8_E4M3": ("float8_e4m3fn", "uint8"),
    "F8_E5M2": ("float8_e5m2", "uint8"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "uint8"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "uint8"),
    "F8_E8M0": ("float8_e8m0fnu", "uint8"),
}

_TABLE = {name: getattr(torch, own, getattr(torch, bits)) for name, (own, bits) in _TYPES.items()}
# Two elements in a byte: torch counts bytes in the last dimension.
_F4 = getattr(torch, "float4_e2m1fn_x2", None)


class Arrays:
    """The tensors of one region. Each has a storage of its own, and keeps the region's memory mapped."""

    def __init__(self, region: Region) -> None:
        self._region = region
        if region.device != "host" and not region.simulated and not torch.cuda.is_available():
            raise LodestreamError("client.device", "this torch cannot use GPUs: attach with framework=\"np\", or to the host")

    def get(self, name: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
        """A tensor: its own type where torch has it, else its bytes."""
        found = _TABLE.get(dtype)
        if dtype == "F4" and _F4 is not None and shape and shape[-1] % 2 == 0:
            found, shape = _F4, (*shape[:-1], shape[-1] // 2)
        if found is None:
            # Block-quantised or smaller than a byte.
            return self.raw(offset, nbytes)
        if math.prod(shape) * found.itemsize != nbytes:
            raise LodestreamError("client.map", f"{name!r} has {nbytes} bytes, not those of its shape")
        raw = self.raw(offset, nbytes)
        if offset % found.itemsize:
            # No safetensors file has such a tensor.
            raw = raw.clone()
        return raw.view(found).reshape(shape)

    def raw(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes, as uint8."""
        if self._region.simulated:
            # A simulated GPU is in no framework: its bytes are copied to the host.
            copy = self._region.read(offset, nbytes)
            return torch.frombuffer(bytearray(copy), dtype=torch.uint8) if copy else torch.empty(0, dtype=torch.uint8)
        return from_dlpack(self._region.dlpack(offset, nbytes))
