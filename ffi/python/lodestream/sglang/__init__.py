"""SGLang's weights from the daemon: ``sglang serve --model-path /models/llama --load-format lodestream``.

**Not run**: no test here starts SGLang, which needs a GPU. It is written against SGLang 0.5.23; a test compares it with the source
of that package.
"""

__all__ = ["register"]

_FORMAT = "lodestream"


def register() -> None:
    """Makes the load format known. SGLang calls it in each of its processes (entry point group ``sglang.srt.plugins``)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_load_format_choices

    add_load_format_choices([_FORMAT])
    # There is no registry of loaders. A class in the place of a format is taken as the loader, but a text is looked up in a
    # closed list first: here it becomes the class before.
    target = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
    HookRegistry.register(target, _verify_load_format, HookType.AROUND)


def _verify_load_format(original, config):
    if config.load_format == _FORMAT:
        from .loader import Loader

        config.load_format = Loader
    return original(config)
