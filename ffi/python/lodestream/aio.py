"""The same for asyncio: calls wait on threads, and the loop goes on.

>>> from lodestream import aio
>>> async with await aio.connect() as node:
...     model = await node.attach("/models/llama")

A cancelled task ends the load that it waits for, as Ctrl-C does.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any, Callable, Optional

from . import _node
from ._model import Model
from ._progress import Progress, Shown


async def connect(*arguments: Any, **options: Any) -> Node:
    """As ``lodestream.connect``."""
    return Node(await asyncio.to_thread(_node.connect, *arguments, **options))


async def direct(*arguments: Any, **options: Any) -> Node:
    """As ``lodestream.direct``."""
    return Node(await asyncio.to_thread(_node.direct, *arguments, **options))


async def load(path: _node.Path, *, progress: Progress = True, **options: Any) -> Model:
    """As ``lodestream.load``."""
    return await _waited(functools.partial(_node.load, path, **options), progress)


async def _waited(call: Callable[..., Any], progress: Progress) -> Any:
    """Runs a call that may load on a thread; ends it when the task is cancelled."""
    cancelled = threading.Event()
    with Shown(progress) as show:

        def report(job: dict) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if show is not None:
                show(job)

        try:
            return await asyncio.to_thread(call, progress=report)
        except asyncio.CancelledError:
            cancelled.set()
            raise


class Node:
    """A ``lodestream.Node`` whose calls are awaited. Models are those of ``lodestream``: their arrays need no waiting."""

    def __init__(self, node: _node.Node) -> None:
        self._node = node

    @property
    def is_direct(self) -> bool:
        """Whether this is an engine in this process."""
        return self._node.is_direct

    async def __aenter__(self) -> Node:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As ``lodestream.Node.close``."""
        await asyncio.to_thread(self._node.close)

    async def attach(
        self, path: _node.Path, select: _node.Select = None, progress: Progress = True, **options: Any
    ) -> Model:
        """As ``lodestream.Node.attach``."""
        return await _waited(functools.partial(self._node.attach, path, select, **options), progress)

    async def prefetch(
        self, path: _node.Path, select: _node.Select = None, progress: Progress = True, **options: Any
    ) -> _node.Job:
        """As ``lodestream.Node.prefetch``."""
        return await _waited(functools.partial(self._node.prefetch, path, select, **options), progress)

    async def wait(self, job: Any, timeout: Optional[float] = None, progress: Progress = False) -> _node.Job:
        """As ``lodestream.Node.wait``."""
        return await _waited(functools.partial(self._node.wait, job, timeout), progress)


def _threaded(name: str) -> Callable[..., Any]:
    method = getattr(_node.Node, name)

    @functools.wraps(method)
    async def call(self: Node, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(method, self._node, *arguments, **options)

    return call


for _name in ("resolve", "hello", "status", "topology", "list", "stat", "evict", "pin", "unpin", "jobs", "job", "cancel"):
    setattr(Node, _name, _threaded(_name))
