"""vLLM's weights from the daemon: ``vllm serve /models/llama --load-format lodestream``.

**Not run**: no test here starts vLLM, which needs a GPU. It is written against vLLM 0.33; a test compares it with the source of that
package.
"""

__all__ = ["register"]


def register() -> None:
    """Makes the load format known. vLLM calls it in each of its processes (entry point group ``vllm.general_plugins``)."""
    # Here, not above: vLLM loads its plugins before it has loaded itself.
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import Loader

    register_model_loader("lodestream")(Loader)
