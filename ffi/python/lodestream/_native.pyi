"""What the native part gives the package. Not for use from outside: arguments are not checked for convenience here."""

from typing import Any, Callable, List, Optional, Sequence

__version__: str

Job = dict[str, Any]
Progress = Optional[Callable[[Job], object]]
Select = Optional[Sequence[Any]]

def gpus() -> list[tuple[str, str, bool]]:
    """The GPUs that this process is shown, in the driver's order: (UUID, name, whether simulated). Makes no context."""

class Region:
    """One region of what is attached. It keeps the mapping, and the lease unless that was released."""

    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> str:
        """``host``, or ``gpu:`` and a UUID."""
    @property
    def simulated(self) -> bool: ...
    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    def dlpack(self, offset: int, nbytes: int) -> object:
        """Bytes as a DLPack capsule of type uint8 and shape (nbytes,), without a copy. IndexError outside of the region."""
    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of bytes, also from a GPU. LodestreamError ``client.map``, ``client.device``."""

class Attached:
    """What an attach gave."""

    @property
    def lease(self) -> int: ...
    @property
    def digest(self) -> Optional[str]: ...
    @property
    def format(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def timings_ms(self) -> dict[str, float]: ...
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int, int]]:
        """(name, dtype, shape, region, offset, nbytes) of each."""
    def files(self) -> list[tuple[str, int, int, int]]:
        """(name, region, offset, nbytes) of each."""
    def regions(self) -> list[Region]: ...
    def release(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self, progress: Progress) -> None: ...

class Node:
    """A connection to a daemon, or to an engine in this process."""

    def __init__(self, socket: str) -> None: ...
    @staticmethod
    def direct(device: str) -> Node: ...
    def close(self) -> None: ...
    def hello(self) -> dict[str, Any]: ...
    def status(self) -> dict[str, Any]: ...
    def topology(self) -> dict[str, Any]: ...
    def list(self) -> List[dict[str, Any]]: ...
    def jobs(self) -> List[Job]: ...
    def job(self, job: int) -> Job: ...
    def cancel(self, job: int) -> Job: ...
    def wait(self, job: int, timeout: Optional[float], progress: Progress) -> Job: ...
    def artifact(
        self, action: str, source: str, open: Sequence[str], device: str, select: Select
    ) -> dict[str, Any]: ...
    def resolve(self, source: str, open: Sequence[str]) -> dict[str, Any]: ...
    def prefetch(
        self,
        source: str,
        open: Sequence[str],
        device: str,
        select: Select,
        targets: Optional[Sequence[Any]],
        priority: int,
        deadline: Optional[float],
        detach: bool,
        pin: bool,
        wait: bool,
        progress: Progress,
    ) -> Job: ...
    def attach(
        self,
        source: str,
        open: Sequence[str],
        device: str,
        select: Select,
        wait: bool,
        verify: bool,
        progress: Progress,
    ) -> Attached: ...
