"""Read-only mappings of shared regions."""

import ctypes
import fcntl
import mmap
import os
import weakref

import numpy

from ._error import LodestreamError

ALIGN = 2 << 20
"""A region begins on a multiple of this: what huge pages need."""

PAGE_BYTES = 4096

# From linux/fcntl.h and asm-generic/mman-common.h; Python has not all of them.
F_GET_SEALS = 1034
F_SEAL_SHRINK = 0x0002
F_SEAL_WRITE = 0x0008
F_SEAL_FUTURE_WRITE = 0x0010
PROT_NONE = 0x0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_region(region, fds):
    """Maps the parts of a region one behind the other; a read-only uint8 array over them.

    region: one entry of ``regions`` of an attach reply. fds: the message's descriptors; they stay open.
    The range is unmapped when the last array over it is gone.
    """
    if region["device"] != "host":
        raise _cannot(f"a region lies on {region['device']}; this client maps host")
    parts = [(fds[part["fd"]], part["bytes"]) for part in region["parts"]]
    for fd, length in parts:
        _check_part(fd, length)
    length = sum(length for _, length in parts)
    if length == 0:
        return numpy.empty(0, dtype=numpy.uint8)
    reserved_length = (length + ALIGN - 1) // ALIGN * ALIGN + ALIGN
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = _mmap(None, reserved_length, PROT_NONE, anonymous, -1)
    start = (reserved + ALIGN - 1) // ALIGN * ALIGN
    address = start
    for fd, part_length in parts:
        # If this fails, the range stays reserved: the kernel may have left a hole in it, which another thread
        # can map something into, so it must not be unmapped.
        _mmap(address, part_length, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, fd)
        address += part_length
    pages = _pages_type(length).from_address(start)
    finalizer = weakref.finalize(pages, _libc.munmap, reserved, reserved_length)
    # At exit, arrays may still be in use by other threads; the kernel unmaps.
    finalizer.atexit = False
    # The array holds the view, the view holds `pages`. The view is read-only, so no flag makes the array writable.
    return numpy.frombuffer(memoryview(pages).toreadonly(), dtype=numpy.uint8)


def _pages_type(length):
    # A subclass, because an instance of a plain ctypes array cannot be referred to weakly.
    return type("Pages", (ctypes.c_ubyte * length,), {})


def _mmap(address, length, protection, flags, fd):
    mapped = _libc.mmap(address, length, protection, flags, fd, 0)
    if mapped == _MAP_FAILED:
        raise _cannot(os.strerror(ctypes.get_errno()))
    return mapped


def _check_part(fd, length):
    if length <= 0 or length % PAGE_BYTES:
        raise _cannot("a part is not a positive multiple of 4096 bytes")
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        raise _cannot("a descriptor is not memory that can be sealed") from error
    # Reading a page that was cut off kills the process.
    if not seals & F_SEAL_SHRINK:
        raise _cannot("a descriptor is not sealed against shrinking")
    if not seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        raise _cannot("a descriptor is not sealed against writing")
    # After the seals: only now the size cannot get smaller any more.
    if os.fstat(fd).st_size < length:
        raise _cannot("a descriptor is shorter than was said")


def check_descriptors(regions, fds):
    """Every descriptor belongs to exactly one part, and the parts of each region add up."""
    named = [part["fd"] for region in regions for part in region["parts"]]
    if sorted(named) != list(range(len(fds))):
        raise _cannot("the descriptors that came are not those that the regions name")
    for region in regions:
        total = sum(part["bytes"] for part in region["parts"])
        if total != region["bytes"]:
            raise _cannot(f"a region of {region['bytes']} bytes has parts of {total} bytes")


def check_range(regions, view):
    """The tensor or file lies inside its region."""
    index, offset, nbytes = view["region"], view["offset"], view["nbytes"]
    if not 0 <= index < len(regions) or offset < 0 or nbytes < 0 or offset + nbytes > regions[index].nbytes:
        raise _cannot(f"{view['name']!r} does not lie in its region")


def _cannot(message):
    return LodestreamError("client.map", f"cannot map what the daemon sent: {message}")
