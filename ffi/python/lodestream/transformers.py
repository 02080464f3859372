"""transformers with the weights of the daemon: a state dict goes in, nothing is patched.

>>> import transformers, lodestream.transformers
>>> model = lodestream.transformers.from_pretrained(transformers.AutoModelForCausalLM, "/models/llama")
"""

import transformers

from .torch import load

__all__ = ["from_pretrained"]


def from_pretrained(model_class, path, *, config=None, **options):
    """What ``model_class.from_pretrained(path)`` gives, its weights taken from memory that all processes of the node share.

    path: a directory with ``config.json`` and safetensors files. config: taken from there unless given.
    options: those of ``from_pretrained``, such as ``dtype``.

    The weights cannot be written: a model that shall be trained has to be copied first (``copy.deepcopy``). Raises
    LodestreamError, and what ``from_pretrained`` raises.
    """
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path)
    return model_class.from_pretrained(None, config=config, state_dict=load(path), **options)
