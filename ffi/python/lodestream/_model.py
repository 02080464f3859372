"""An attached artifact as a mapping from tensor names to arrays."""

import math
import os
from collections.abc import Mapping

import numpy

from ._error import LodestreamError
from ._region import check_descriptors, check_range, map_region

# safetensors' names of types that numpy has.
_DTYPES = {
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
_ML_DTYPES = {
    "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3fn", "uint8"),
    "F8_E5M2": ("float8_e5m2", "uint8"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "uint8"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "uint8"),
    "F8_E8M0": ("float8_e8m0fnu", "uint8"),
}


def _dtypes():
    table = {name: numpy.dtype(text) for name, text in _DTYPES.items()}
    try:
        import ml_dtypes
    except ImportError:
        ml_dtypes = None
    for name, (type_name, bits) in _ML_DTYPES.items():
        # Older versions of ml_dtypes lack some.
        found = getattr(ml_dtypes, type_name, None)
        table[name] = numpy.dtype(bits if found is None else found)
    return table


_TABLE = _dtypes()


class Model(Mapping):
    """A resident artifact: ``model[name]`` is a read-only array over the shared region, without a copy.

    metadata: strings of the files' own headers.
    dtypes: type of each tensor as its file has it, such as ``BF16``.
    files: bytes of the files that are resident whole, by name, as read-only uint8 arrays.
    digest: digest of the artifact, or None for a selection of one that was never read in full.
    timings_ms: milliseconds that the daemon spent, by phase.

    Arrays stay readable after ``close()``, which gives only the lease back.
    """

    def __init__(self, reply, fds, release):
        self._release = release
        self.lease = reply["lease"]
        self.digest = reply.get("digest")
        self.format = reply["format"]
        self.metadata = reply["metadata"]
        self.timings_ms = reply["timings_ms"]
        check_descriptors(reply["regions"], fds)
        regions = [map_region(region, fds) for region in reply["regions"]]
        self._regions = regions
        self._views = {}
        for view in reply["tensors"]:
            check_range(regions, view)
            self._views[view["name"]] = _Place(view)
        if len(self._views) != len(reply["tensors"]):
            raise LodestreamError("client.protocol", "two tensors have the same name")
        self.dtypes = {name: place.dtype for name, place in self._views.items()}
        self.files = {}
        for view in reply["files"]:
            check_range(regions, view)
            self.files[view["name"]] = _bytes(regions, view)

    def __getitem__(self, name):
        return self._views[name].array(self._regions)

    def __iter__(self):
        return iter(self._views)

    def __len__(self):
        return len(self._views)

    def __contains__(self, name):
        return name in self._views

    def __repr__(self):
        return f"<lodestream.Model {self.digest or 'without digest'}: {len(self)} tensors>"

    def tensors(self):
        """All tensors by name."""
        return dict(self)

    def close(self):
        """Gives the lease back. Can be called twice, and after the connection is closed."""
        release, self._release = self._release, None
        if release is not None:
            release(self.lease)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Place:
    """Where a tensor lies, and as what it is read. Checked once, when it is attached."""

    __slots__ = ("dtype", "_type", "_shape", "_view")

    def __init__(self, view):
        self.dtype = view["dtype"]
        self._view = view
        self._shape = tuple(view["shape"])
        self._type = _TABLE.get(self.dtype)
        if self._type is None:
            # Block-quantised or smaller than a byte: numpy has no type for it.
            self._type, self._shape = numpy.dtype("uint8"), (view["nbytes"],)
        elif math.prod(self._shape) * self._type.itemsize != view["nbytes"]:
            message = f"{view['name']!r} has {view['nbytes']} bytes, not those of its shape"
            raise LodestreamError("client.map", message)

    def array(self, regions):
        return _bytes(regions, self._view).view(self._type).reshape(self._shape)


def _bytes(regions, view):
    return regions[view["region"]][view["offset"] : view["offset"] + view["nbytes"]]


def attached(reply, fds, release):
    """The model of an attach reply. Closes the descriptors; gives the lease back if it cannot be mapped."""
    try:
        return Model(reply, fds, release)
    except (KeyError, TypeError, IndexError) as error:
        release(reply["lease"])
        message = f"the daemon's answer is not understood: {error!r}"
        raise LodestreamError("client.protocol", message) from error
    except LodestreamError:
        release(reply["lease"])
        raise
    finally:
        for fd in fds:
            os.close(fd)
