"""A forward pass of a real model (all-MiniLM-L6-v2, a BERT encoder) over tensors that are attached on a GPU, compared with the
same pass over tensors that stock `safetensors` has loaded there.

Started by `scripts/gpu-check`; the task is the first line on stdin. Needs PyTorch with CUDA and safetensors, and says so if they
are missing.
"""
import json
import sys

from importer import READ, CudaError, Driver, answer

# Width of a head of this model.
HEAD = 32
SEED, SENTENCES, TOKENS = 7, 4, 64


class Foreign:
    """Bytes of a device that somebody else has made, as PyTorch takes them without a copy. Never written to."""

    def __init__(self, address, size):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def encode(torch, weights, tokens):
    """The hidden states of the last layer."""
    from torch.nn import functional

    def linear(name, values):
        return functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, values):
        return functional.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    hidden = weights["embeddings.word_embeddings.weight"][tokens]
    hidden = hidden + weights["embeddings.position_embeddings.weight"][:tokens.shape[1]]
    hidden = norm("embeddings.LayerNorm", hidden + weights["embeddings.token_type_embeddings.weight"][0])
    layer = 0
    while f"encoder.layer.{layer}.output.dense.weight" in weights:
        name = f"encoder.layer.{layer}"

        def heads(part):
            return linear(f"{name}.attention.self.{part}", hidden).unflatten(-1, (-1, HEAD)).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"))
        mixed = linear(f"{name}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        hidden = norm(f"{name}.attention.output.LayerNorm", mixed + hidden)
        wide = functional.gelu(linear(f"{name}.intermediate.dense", hidden))
        hidden = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", wide) + hidden)
        layer += 1
    return hidden


def attached(torch, address, tensors, stock):
    """Views of the tensors of a region, of the types and shapes of the stock ones."""
    views = {}
    for tensor in tensors:
        like = stock[tensor["name"]]
        raw = torch.as_tensor(Foreign(address + tensor["offset"], tensor["nbytes"]), device=like.device)
        views[tensor["name"]] = raw.view(like.dtype).reshape(like.shape)
    return views


def run(task):
    import ctypes

    import torch
    from safetensors.torch import load_file

    if not torch.cuda.is_available():
        return answer(skipped="PyTorch has no CUDA here")
    place = torch.device("cuda:0")
    torch.cuda.init()
    driver = Driver(ctypes.CDLL("libcuda.so.1"), task["uuid"])
    address, _ = driver.take(task["fd"], task["bytes"], READ)
    stock = load_file(task["file"], device=str(place))
    ours = attached(torch, address, task["tensors"], stock)
    torch.manual_seed(SEED)
    words = stock["embeddings.word_embeddings.weight"].shape[0]
    tokens = torch.randint(words, (SENTENCES, TOKENS), device=place)
    with torch.inference_mode():
        wanted, found = encode(torch, stock, tokens), encode(torch, ours, tokens)
    torch.cuda.synchronize()
    answer(equal=bool(torch.equal(wanted, found)), finite=bool(wanted.isfinite().all()), layers=list(wanted.shape))


def main():
    task = json.loads(sys.stdin.readline())
    try:
        run(task)
    except ImportError as error:
        answer(skipped=f"PyTorch with CUDA and safetensors are not installed: {error}")
    except CudaError as error:
        answer(error=str(error))


if __name__ == "__main__":
    main()
