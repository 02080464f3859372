"""An attached artifact as a mapping from tensor names to arrays."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from ._native import Attached
from ._progress import Progress, Shown

_FRAMEWORKS = {"np": "np", "numpy": "np", "pt": "pt", "torch": "pt", "pytorch": "pt"}
_MODULES = {"np": "lodestream._numpy", "pt": "lodestream._torch"}


def framework_of(name: Optional[str]) -> str:
    """``np`` or ``pt``. Without a name: ``pt`` if this process has imported torch."""
    if name is None:
        return "pt" if "torch" in sys.modules else "np"
    try:
        return _FRAMEWORKS[name]
    except KeyError:
        raise ValueError(f"framework is 'np' or 'pt', not {name!r}") from None


class Model(Mapping):
    """A resident artifact: ``model[name]`` is a tensor over the shared memory, without a copy.

    With ``framework="np"`` arrays are read-only. bfloat16 and float8 are the types of ``ml_dtypes`` if it is installed, else
    ``uint16`` and ``uint8``. What is on a GPU is copied to the host.

    With ``framework="pt"`` tensors are torch's, on the device that was asked for. They must not be written to: the memory is
    mapped read-only, and torch cannot know it. ``tensor.clone()`` can be.

    A simulated GPU gives copies on the host in both; ``simulated`` says so.

    A type that the framework lacks comes as its bytes, shape (nbytes,): ``Q4_K``, ``F6_E2M3``.

    Arrays stay readable for as long as they exist, whatever happens to the model, the connection or the daemon. The lease ends
    with ``close()``, with the connection, or when neither the model nor an array of it is left.
    """

    def __init__(self, attached: Attached, framework: str) -> None:
        self._attached = attached
        self._framework = framework
        arrays = importlib.import_module(_MODULES[framework]).Arrays
        regions = attached.regions()
        self._regions = [arrays(region) for region in regions]
        self._simulated = any(region.simulated for region in regions)
        self._device = regions[0].device if regions else "host"
        self._table = {name: place for name, *place in attached.tensors()}

    @property
    def framework(self) -> str:
        """``np`` or ``pt``."""
        return self._framework

    @property
    def device(self) -> str:
        """Where it is: ``host``, or ``gpu:`` and a UUID."""
        return self._device

    @property
    def simulated(self) -> bool:
        """Whether it is on a simulated GPU: arrays are copies on the host then."""
        return self._simulated

    @property
    def lease(self) -> int:
        """The lease's number, for the log."""
        return self._attached.lease

    @property
    def digest(self) -> Optional[str]:
        """Digest of the artifact (``sha256:…``); None for a selection of one that was never read in full."""
        return self._attached.digest

    @property
    def format(self) -> str:
        """``safetensors``, ``gguf`` or ``plain``."""
        return self._attached.format

    @property
    def metadata(self) -> dict[str, str]:
        """Strings of the files' own headers."""
        return self._attached.metadata

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds by phase: ``resolve``, ``load``, ``total`` of the daemon; ``request`` and ``map`` of this process."""
        return self._attached.timings_ms

    @property
    def dtypes(self) -> dict[str, str]:
        """Type of each tensor as its file has it, such as ``BF16``."""
        return {name: place[0] for name, place in self._table.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, slowest dimension first; of the part, if one was selected."""
        return {name: place[1] for name, place in self._table.items()}

    @property
    def files(self) -> dict[str, Any]:
        """Bytes of the files that are resident whole, by name, as uint8 arrays of shape (nbytes,)."""
        files = self._attached.files()
        return {name: self._regions[region].raw(offset, nbytes) for name, region, offset, nbytes in files}

    def __getitem__(self, name: str) -> Any:
        dtype, shape, region, offset, nbytes = self._table[name]
        return self._regions[region].get(name, dtype, shape, offset, nbytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __repr__(self) -> str:
        simulated = ", simulated" if self._simulated else ""
        return f"<lodestream.Model {self.digest or 'without digest'}: {len(self)} tensors on {self._device}{simulated}>"

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        return dict(self)

    def close(self) -> None:
        """Gives the lease back; arrays stay readable. Can be called twice, and after the connection is closed."""
        self._attached.release()

    def sleep(self) -> None:
        """Gives the memory on a GPU and the lease up; tensors must not be used until ``wake``. On the host tier only the lease."""
        self._attached.sleep()

    def wake(self, progress: Progress = True) -> None:
        """Takes the memory in again, at the same addresses: tensors of before are valid again. Loads if it must.

        LodestreamError ``client.map`` if the artifact is another now.
        """
        with Shown(progress) as show:
            self._attached.wake(show)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
