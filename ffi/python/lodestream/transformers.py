"""transformers with the weights of the daemon: a state dict goes in, nothing is patched.

>>> import transformers, lodestream.transformers
>>> model = lodestream.transformers.from_pretrained(transformers.AutoModelForCausalLM, "/models/llama")
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import transformers

from ._node import Path
from .torch import load

__all__ = ["from_pretrained"]


def from_pretrained(
    model_class: type, path: Path, *, config: Optional[transformers.PretrainedConfig] = None, **options: Any
) -> transformers.PreTrainedModel:
    """What ``model_class.from_pretrained(path)`` gives, its weights taken from memory that all processes of the node share.

    path: a directory with ``config.json`` and safetensors files. config: taken from there unless given.
    options: those of ``from_pretrained``, such as ``dtype``.

    The weights cannot be written: a model that shall be trained has to be copied first (``copy.deepcopy``). Raises
    LodestreamError, and what ``from_pretrained`` raises.
    """
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path)
    if not issubclass(model_class, transformers.PreTrainedModel):
        # An Auto class takes weights by their path only; the one that it chooses for a configuration takes them from a dict.
        with torch.device("meta"):
            chosen = model_class.from_config(config)
        model_class, config = type(chosen), chosen.config
    return model_class.from_pretrained(None, config=config, state_dict=load(path), **options)
