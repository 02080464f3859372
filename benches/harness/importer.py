"""A process that imports a region of a GPU by its descriptor, through the driver's own calls: what any program could do.

Started by `scripts/gpu-check` as text (`python3 -c`), so that it also runs as a user who may not read this directory. Its first
line on stdin says what it is to do, as JSON; each line of its output is one answer. Standard library only.
"""
import ctypes
import hashlib
import json
import mmap
import os
import sys
import time

MIB = 1 << 20
POSIX_FD = 1
READ, READ_WRITE = 1, 3
# `CU_MEMHOSTREGISTER_PORTABLE`, `CU_STREAM_NON_BLOCKING`.
PORTABLE, NON_BLOCKING = 1, 1
PINNED_BYTES, PINNED_COPIES, PINNED_ROUNDS = 256 * MIB, 8, 3
# What is written to find out whether anybody sees it.
MARK = 0xA5
# Of the memory that is free, as much is filled with the mark.
SHARE = 0.5


class Properties(ctypes.Structure):
    """`CUmemAllocationProp`."""
    _fields_ = [("type", ctypes.c_int), ("handles", ctypes.c_int), ("place", ctypes.c_int), ("device", ctypes.c_int),
                ("windows", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8)]


class Access(ctypes.Structure):
    """`CUmemAccessDesc`."""
    _fields_ = [("place", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int)]


class CudaError(RuntimeError):
    pass


class Driver:
    """The driver, with the primary context of one device current."""

    def __init__(self, library, uuid):
        self.library = library
        self.call("cuInit", 0)
        count, number = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        for index in range(count.value):
            self.call("cuDeviceGet", ctypes.byref(number), index)
            found = (ctypes.c_ubyte * 16)()
            self.call("cuDeviceGetUuid_v2", found, number)
            if bytes(found).hex() == uuid.partition("-")[2].replace("-", ""):
                break
        else:
            raise CudaError(f"there is no {uuid} here")
        self.device = number.value
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            known = self.library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
            raise CudaError(f"{name} answered {text.value.decode() if known else code}")

    def map(self, handle, size, flags):
        """→ the address."""
        address = ctypes.c_ulonglong()
        self.call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0),
                  ctypes.c_ulonglong(0), ctypes.c_ulonglong(0))
        self.call("cuMemMap", address, ctypes.c_size_t(size), ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0))
        access = Access(1, self.device, flags)
        self.call("cuMemSetAccess", address, ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1))
        return address.value

    def take_apart(self, address, handle, size):
        self.call("cuMemUnmap", ctypes.c_ulonglong(address), ctypes.c_size_t(size))
        self.call("cuMemRelease", handle)
        self.call("cuMemAddressFree", ctypes.c_ulonglong(address), ctypes.c_size_t(size))

    def take(self, fd, size, flags):
        """Imports and maps; → (address, handle)."""
        handle = ctypes.c_ulonglong()
        self.call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), POSIX_FD)
        return self.map(handle, size, flags), handle

    def make(self, size):
        """New memory; → (address, handle)."""
        properties, handle = Properties(1, POSIX_FD, 1, self.device), ctypes.c_ulonglong()
        self.call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), ctypes.c_ulonglong(0))
        return self.map(handle, size, READ_WRITE), handle

    def read(self, address, size):
        target = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", target, ctypes.c_ulonglong(address), ctypes.c_size_t(size))
        return target.raw

    def write(self, address, data):
        self.call("cuMemcpyHtoD_v2", ctypes.c_ulonglong(address), data, ctypes.c_size_t(len(data)))
        self.call("cuCtxSynchronize")

    def fill(self, address, size):
        self.call("cuMemsetD8_v2", ctypes.c_ulonglong(address), ctypes.c_ubyte(MARK), ctypes.c_size_t(size))
        self.call("cuCtxSynchronize")

    def free(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


def answer(**fields):
    print(json.dumps(fields), flush=True)


def attempt(act):
    """What the driver says to something that it may refuse."""
    try:
        act()
    except CudaError as error:
        return str(error)
    return None


def hold(driver, task):
    """Maps a region read-only and answers each line with the digest of its beginning."""
    address, _ = driver.take(task["fd"], task["bytes"], READ)
    for _ in sys.stdin:
        answer(digest=hashlib.sha256(driver.read(address, task["span"])).hexdigest())


def write(driver, task):
    """Writes one byte, through a mapping with or without the right to."""
    address, _ = driver.take(task["fd"], task["bytes"], READ_WRITE if task["writable"] else READ)
    before = driver.read(address, 1)[0]
    refused = attempt(lambda: driver.write(address, bytes([before ^ 1])))
    # After a refusal the context may be lost: who asks next is another process.
    answer(refused=refused)


def soil(driver, task):
    """Fills memory that is free with a mark and gives it back; then takes as much again and looks for the mark."""
    size = min(int(driver.free() * SHARE), task["most"]) // (2 * MIB) * (2 * MIB)
    address, handle = driver.make(size)
    driver.fill(address, size)
    driver.take_apart(address, handle, size)
    address, handle = driver.make(size)
    found = sum(driver.read(address + at, min(16 * MIB, size - at)).count(MARK) for at in range(0, size, 16 * MIB))
    # The mark stays behind in what the next one gets.
    driver.fill(address, size)
    answer(size=size, found=found)


def pinned(driver, _):
    """The best rate of copies from pinned memory, bytes per second: registered, and the driver's own where it has such."""
    area = mmap.mmap(-1, PINNED_BYTES)
    area.write(b"\1" * PINNED_BYTES)
    registered = ctypes.addressof(ctypes.c_ubyte.from_buffer(area))
    driver.call("cuMemHostRegister_v2", ctypes.c_void_p(registered), ctypes.c_size_t(PINNED_BYTES), PORTABLE)
    sources = {"registered": registered}
    with_own = ctypes.c_void_p()
    if hasattr(driver.library, "cuMemAllocHost_v2"):
        driver.call("cuMemAllocHost_v2", ctypes.byref(with_own), ctypes.c_size_t(PINNED_BYTES))
        sources["of the driver"] = with_own.value
    target, _ = driver.make(PINNED_BYTES)
    stream = ctypes.c_void_p()
    driver.call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
    rates = {}
    for kind, source in sources.items():
        for _ in range(PINNED_ROUNDS):
            begin = time.perf_counter()
            for _ in range(PINNED_COPIES):
                driver.call("cuMemcpyHtoDAsync_v2", ctypes.c_ulonglong(target), ctypes.c_void_p(source),
                            ctypes.c_size_t(PINNED_BYTES), stream)
            driver.call("cuStreamSynchronize", stream)
            rate = PINNED_COPIES * PINNED_BYTES / (time.perf_counter() - begin)
            rates[kind] = max(rates.get(kind, 0), rate)
    answer(rates=rates)


def main():
    task = json.loads(sys.stdin.readline())
    # Loaded before the rights go: what may be read is not the question.
    library = ctypes.CDLL("libcuda.so.1")
    if task.get("user") is not None:
        os.setgroups([])
        os.setgid(task["user"])
        os.setuid(task["user"])
    try:
        {"hold": hold, "write": write, "soil": soil, "pinned": pinned}[task["do"]](Driver(library, task["uuid"]), task)
    except CudaError as error:
        answer(error=str(error))


if __name__ == "__main__":
    main()
