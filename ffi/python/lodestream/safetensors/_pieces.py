"""Parts of a tensor read from its file: where the bytes of an index lie, and no more of them than that."""

import itertools
import json
import math
import os
import struct

import numpy
from safetensors import SafetensorError

GAP_BYTES = 4096
"""Bytes between two pieces that are read through if they are fewer: the drive reads whole pages anyway."""

LENGTH = struct.Struct("<Q")


class Reader:
    """An open file whose header the stock package has taken. It is closed when nothing uses this any more."""

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._header = None

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def stat(self):
        """What the kernel says of the file, as it was opened."""
        return os.fstat(self._descriptor)

    def part(self, name, index, shape, itemsize):
        """Bytes of a tensor's part, row-major, as a uint8 array, and the part's shape.

        index: an integer, not negative, or a slice whose bounds are in ``shape`` for each dimension from the first on.
        shape, itemsize: those of the whole tensor; bytes.
        """
        ranges = [range(size)[entry] if isinstance(entry, slice) else range(entry, entry + 1) for entry, size in
                  zip(index + (slice(None),) * (len(shape) - len(index)), shape)]  # fmt: skip
        counts = [len(chosen) for chosen in ranges]
        flat = numpy.empty(math.prod(counts) * itemsize, dtype=numpy.uint8)
        if flat.size:
            strides = [itemsize * math.prod(shape[place + 1 :]) for place in range(len(shape))]
            self._read(self._begin(name), ranges, strides, flat.view(f"V{itemsize}").reshape(counts))
        kept = [count for place, count in enumerate(counts) if place >= len(index) or isinstance(index[place], slice)]
        return flat, kept

    def _read(self, begin, ranges, strides, target):
        outer = _together(ranges, strides, target.itemsize)
        span = _span(ranges[outer:], strides[outer:], target.itemsize)
        steps = [chosen.step * stride for chosen, stride in zip(ranges[outer:], strides[outer:])]
        first = begin + sum(chosen.start * stride for chosen, stride in zip(ranges, strides))
        spare = numpy.empty(span, dtype=numpy.uint8)
        for place in itertools.product(*(range(len(chosen)) for chosen in ranges[:outer])):
            piece = target[(*place, ...)]  # With the ellipsis a view, also where it is one element.
            whole = span == piece.nbytes
            into = piece.reshape(-1).view(numpy.uint8) if whole else spare
            offset = sum(number * chosen.step * stride for number, chosen, stride in zip(place, ranges, strides))
            self._fill(into, first + offset)
            if not whole:
                piece[...] = numpy.ndarray(piece.shape, piece.dtype, buffer=spare, strides=steps)

    def _fill(self, into, offset):
        done = 0
        while done < into.nbytes:
            read = os.preadv(self._descriptor, [into[done:]], offset + done)
            if read == 0:
                raise SafetensorError("the file is shorter than it was when it was opened")
            done += read

    def _begin(self, name):
        """Where a tensor begins in the file, bytes."""
        if self._header is None:
            [length] = LENGTH.unpack(os.pread(self._descriptor, LENGTH.size, 0))
            text = numpy.empty(length, dtype=numpy.uint8)
            self._fill(text, LENGTH.size)
            self._header = LENGTH.size + length, json.loads(text.tobytes())
        data, header = self._header
        return data + header[name]["data_offsets"][0]


def _together(ranges, strides, itemsize):
    """The first dimension from which on all pieces are so near to each other that they are read at once."""
    outer = len(ranges)
    while outer > 0:
        within = _span(ranges[outer:], strides[outer:], itemsize)
        chosen, stride = ranges[outer - 1], strides[outer - 1]
        if len(chosen) > 1 and chosen.step * stride - within >= GAP_BYTES:
            break
        outer -= 1
    return outer


def _span(ranges, strides, itemsize):
    """Bytes from the first piece's begin to the last one's end."""
    return itemsize + sum((len(chosen) - 1) * chosen.step * stride for chosen, stride in zip(ranges, strides))
