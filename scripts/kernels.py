"""Compiles one CUDA source to PTX beside it, with NVRTC (scripts/kernels runs it).

The head of the PTX notes the version of the compiler and the SHA-256 of the source: tests/kernel.rs compares it.
"""

import ctypes
import hashlib
import pathlib
import sys

import nvidia.cuda_nvrtc

# Ampere: the oldest that Lodestream asks for. Newer GPUs take the same PTX; the driver assembles it for them.
OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++17"]


def load():
    folder = pathlib.Path(list(nvidia.cuda_nvrtc.__path__)[0]) / "lib"
    # NVRTC opens its builtins by name: they must be there already.
    for builtins in folder.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def compile_to_ptx(nvrtc, source, name):
    def call(function, *arguments):
        result = getattr(nvrtc, function)(*arguments)
        if result != 0:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise SystemExit(f"{function}: {nvrtc.nvrtcGetErrorString(result).decode()}")

    def text(size_function, text_function):
        size = ctypes.c_size_t()
        call(size_function, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(text_function, program, buffer)
        return buffer.value.decode()

    program = ctypes.c_void_p()
    call("nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    result = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").strip()
    if log:
        print(log, file=sys.stderr)
    if result != 0 or log:
        raise SystemExit(f"{name} does not compile without complaints")
    ptx = text("nvrtcGetPTXSize", "nvrtcGetPTX")
    major, minor = ctypes.c_int(), ctypes.c_int()
    call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return ptx, f"{major.value}.{minor.value}"


def main():
    path = pathlib.Path(sys.argv[1])
    source = path.read_bytes()
    ptx, version = compile_to_ptx(load(), source, path.name)
    head = [
        f"// Made from {path.name} by scripts/kernels with NVRTC {version}. Not to be changed by hand.",
        f"// options: {' '.join(option.decode() for option in OPTIONS)}",
        f"// source-sha256: {hashlib.sha256(source).hexdigest()}",
    ]
    # Written whole or not at all: the test would take half a file for the newest.
    partial = path.with_suffix(".ptx.partial")
    partial.write_text("\n".join(head) + "\n" + ptx.strip() + "\n")
    partial.replace(path.with_suffix(".ptx"))


main()
