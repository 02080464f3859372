"""The loader class. Not run: see `lodestream.vllm`."""

import copy
import time

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .._weights import stream


class Loader(DefaultModelLoader):
    """vLLM's default loader with another way to the tensors of safetensors files.

    They are views of memory that all processes of the node share, of which vLLM copies what it needs to its device: the ranks of a
    tensor-parallel model read its files once. Which files these are, downloads, prefixes, secondary weights and the check that
    all weights were loaded stay the default loader's.
    """

    def __init__(self, load_config):
        # The default loader chooses files by the format, and does not know the name that led here.
        load_config = copy.copy(load_config)
        load_config.load_format = "safetensors"
        super().__init__(load_config)

    def _get_weights_iterator(self, source):
        folder, files, use_safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not use_safetensors:
            return super()._get_weights_iterator(source)
        if self.counter_before_loading_weights == 0.0:
            # What the time that is reported is counted from.
            self.counter_before_loading_weights = time.perf_counter()
        return ((source.prefix + name, tensor) for name, tensor in stream(folder, files))
