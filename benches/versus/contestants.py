"""The loaders, one process each. Run by `benches/versus/run`, not by hand.

    contestants.py NAME KEEP TOUCH PATH…

NAME is a key of LOADERS; KEEP: `kept` holds every tensor until the end, `thrown` lets each go; TOUCH: what is done with
the bytes of each tensor: `views` nothing, `pages` one byte of each 4 KiB is read, `bytes` all are read. The process imports
what it needs, prints `ready`, waits for a line, loads, and prints one JSON object: seconds, bytes, cpu_seconds,
peak_rss_bytes (of this process), tensors. It ends when its standard input does, so that another can come second.
"""
import json
import os
import resource
import sys
import time

PAGE_BYTES = 4096


def torch_bytes(tensor):
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def safetensors_mmap(paths, kept):
    import torch  # noqa: F401  safetensors imports it with the first file: that is not loading
    from safetensors import safe_open

    def load():
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
    return load


def safetensors_pread(paths, kept):
    import torch  # noqa: F401  safetensors imports it with the first file: that is not loading
    from safetensors import safe_open

    def load():
        for path in paths:
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
    return load


def runai(paths, kept):
    from runai_model_streamer import SafetensorsStreamer

    def load():
        with SafetensorsStreamer() as streamer:
            # What is not kept may be written over by what comes next: made for tensors that are let go.
            streamer.stream_files(paths, owned=kept)
            yield from streamer.get_tensors()
    return load


def fastsafetensors(paths, kept):
    from fastsafetensors import SafeTensorsFileLoader

    def load():
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: paths})
        buffers = loader.copy_files_to_device()
        for name in loader.get_keys():
            yield name, buffers.get_tensor(name)
    return load


def instanttensor(paths, kept):
    import instanttensor
    import torch

    def load():
        with instanttensor.safe_open(paths, framework="pt", device=torch.device("cuda", 0)) as file:
            yield from file.tensors()
    return load


def tensorizer(paths, kept):
    from tensorizer import TensorDeserializer

    def load():
        for path in paths:
            deserializer = TensorDeserializer(path, device="cpu")
            yield from deserializer.items()
    return load


def torch_load(paths, kept):
    import torch

    def load():
        for path in paths:
            yield from torch.load(path, map_location="cpu", weights_only=True).items()
    return load


def lodestream_node(paths, kept):
    import lodestream

    node = lodestream.connect()

    def load():
        yield from node.attach(os.path.dirname(paths[0]), framework="pt", progress=False).tensors().items()
    return load


def lodestream_in_process(paths, kept):
    import lodestream

    node = lodestream.direct()

    def load():
        yield from node.attach(os.path.dirname(paths[0]), framework="pt", progress=False).tensors().items()
    return load


# name: what imports, and gives the function that yields (name, torch tensor).
LOADERS = {
    "lodestream": lodestream_node,
    "lodestream in process": lodestream_in_process,
    "safetensors mmap": safetensors_mmap,
    "safetensors pread": safetensors_pread,
    "runai": runai,
    "fastsafetensors": fastsafetensors,
    "instanttensor": instanttensor,
    "tensorizer": tensorizer,
    "torch.load": torch_load,
}


def peak_rss_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def touch(tensor, how):
    flat = torch_bytes(tensor)
    if how == "pages":
        int(flat[::PAGE_BYTES].sum())
    elif how == "bytes":
        # Whole words: as fast as memory, where a sum of bytes is not.
        whole = flat[: flat.size // 8 * 8]
        int(whole.view("u8").max(initial=0)) if whole.ctypes.data % 8 == 0 else int(flat.max(initial=0))
    return flat.size


def main():
    name, keep, how, *paths = sys.argv[1:]
    # Some loaders import it only when they give their first tensor: no loader's time contains that.
    import torch  # noqa: F401

    load = LOADERS[name](paths, keep == "kept")
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, begin = cpu_seconds(), time.monotonic()
    kept, size, count = [], 0, 0
    for _, tensor in load():
        size += touch(tensor, how)
        count += 1
        if keep == "kept":
            kept.append(tensor)
    seconds = time.monotonic() - begin
    print(json.dumps({"seconds": seconds, "bytes": size, "cpu_seconds": cpu_seconds() - cpu,
                      "peak_rss_bytes": peak_rss_bytes(), "tensors": count}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
