"""One process of the demo: attaches to a model and proves it equal, byte for byte, to what stock safetensors reads.

    demo_client.py SOCKET DIR

Prints one JSON line after attaching and comparing, then compares again for each line on its standard input: the daemon
may be dead by then.
"""
import json
import pathlib
import sys
import time

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy for safetensors)
import numpy
import safetensors

import lodestream


def compare(model, directory):
    """Tensors and bytes that are equal; SystemExit names the first that is not."""
    seen, size = set(), 0
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as stock:
            for name in stock.keys():
                theirs, ours = stock.get_tensor(name), model[name]
                same = theirs.dtype == ours.dtype and theirs.shape == ours.shape and numpy.array_equal(
                    theirs.reshape(-1).view(numpy.uint8), ours.reshape(-1).view(numpy.uint8))
                if not same:
                    raise SystemExit(f"tensor {name} differs from what safetensors reads")
                seen.add(name)
                size += theirs.nbytes
    if seen != set(model.keys()):
        raise SystemExit(f"the sets of tensors differ: {sorted(seen ^ set(model.keys()))[:3]}")
    return {"tensors": len(seen), "bytes": size}


def main():
    socket, directory = sys.argv[1:]
    node = lodestream.connect(socket)
    begin = time.perf_counter()
    model = node.attach(directory, progress=False)
    arrays = model.tensors()
    attach_ms = (time.perf_counter() - begin) * 1000
    assert len(arrays) == len(model.keys())
    print(json.dumps({"attach_ms": attach_ms, **compare(model, directory)}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(compare(model, directory)), flush=True)


if __name__ == "__main__":
    main()
