"""accelerate's empty models, filled with the weights of the daemon.

>>> import accelerate, lodestream.accelerate
>>> with accelerate.init_empty_weights():
...     model = transformers.AutoModelForCausalLM.from_config(config)
>>> lodestream.accelerate.load_checkpoint(model, "/models/llama")
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device

from ._node import Path
from .torch import load

__all__ = ["load_checkpoint"]


def load_checkpoint(model: torch.nn.Module, path: Path, device: Any = "cpu", *, strict: bool = True) -> None:
    """Puts the tensors of a model directory or file in the place of a model's parameters and buffers of the same names.

    On the CPU nothing is copied, and the parameters cannot be written; on another device they are copies. The model's
    tied weights are tied again. strict: raise KeyError for parameters of the model that ``path`` has not.

    Raises LodestreamError, and ValueError for a shape that is not the model's.
    """
    state = load(path)
    for name, tensor in state.items():
        set_module_tensor_to_device(model, name, device, value=tensor)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if strict and missing:
        raise KeyError(f"{path} has no {', '.join(missing)}")
