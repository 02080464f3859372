"""Attach to models that a Lodestream daemon keeps resident on this node, without a copy.

>>> import lodestream
>>> with lodestream.connect() as node:
...     model = node.attach("/models/llama")
...     w = model["model.embed_tokens.weight"]
"""

from ._error import LodestreamError
from ._model import Model
from ._native import __version__
from ._node import Node, connect, direct, load

__all__ = ["LodestreamError", "Model", "Node", "__version__", "connect", "direct", "load"]
