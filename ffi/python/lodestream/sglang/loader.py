"""The loader class. Not run: see `lodestream.sglang`."""

import copy
import time

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors

from .._weights import stream


class Loader(DefaultModelLoader):
    """SGLang's default loader with another way to the tensors of safetensors files.

    They are views of memory that all processes of the node share, of which SGLang copies what it needs to its device: the ranks
    of a tensor-parallel model read its files once. Which files these are, and all that is done with tensors, stays the
    default loader's.
    """

    def __init__(self, load_config):
        # The default loader chooses files by the format, and does not know this class as one.
        load_config = copy.copy(load_config)
        load_config.load_format = LoadFormat.SAFETENSORS
        super().__init__(load_config)

    def _get_weights_iterator(
        self, source, *, resolved_source=None, startup_prefetch_started=False, startup_prefetch_active=False
    ):
        if resolved_source is None:
            folder, files, use_safetensors = self._prepare_weights(
                source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
            )
            if use_safetensors and source.model_config is not None:
                files = maybe_add_mtp_safetensors(
                    files, folder, "model.safetensors.index.json", source.model_config.hf_config
                )
        else:
            folder, files = resolved_source.hf_folder, list(resolved_source.weight_files)
            use_safetensors = resolved_source.use_safetensors
        if not use_safetensors:
            return super()._get_weights_iterator(
                source,
                resolved_source=resolved_source,
                startup_prefetch_started=startup_prefetch_started,
                startup_prefetch_active=startup_prefetch_active,
            )
        weights = stream(folder, files)
        if self.load_config.draft_model_idx is not None:
            return self._filter_mtp_weights(weights, source.prefix, self.load_config.draft_model_idx)
        if self.counter_before_loading_weights == 0.0:
            # What the time that is reported is counted from.
            self.counter_before_loading_weights = time.perf_counter()
        return ((source.prefix + name, tensor) for name, tensor in weights)
