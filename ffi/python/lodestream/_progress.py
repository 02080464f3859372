"""The line that shows how far a load is."""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, Optional, Union

Progress = Union[bool, Callable[[dict], object]]

BAR_CELLS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


class Shown:
    """What to call with a job's progress, or None; wipes its line at the end."""

    def __init__(self, progress: Progress) -> None:
        self._function: Optional[Callable[[dict], object]] = progress if callable(progress) else None
        self._line = self._function is None and bool(progress) and sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Optional[Callable[[dict], object]]:
        return self._print if self._line else self._function

    def __exit__(self, *_: object) -> None:
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @staticmethod
    def _print(job: dict) -> None:
        print(f"\r\x1b[K{line(job)}", end="", file=sys.stderr, flush=True)


def line(job: dict[str, Any]) -> str:
    """``llama:  45%|██████████▊             | 1.80/4.00 GiB [00:02<00:03, 0.90 GiB/s, storage]``"""
    name = os.path.basename(job["artifact"].rstrip("/"))
    done, total = job["bytes"], job["total"]
    share = done / total if total else 0.0
    text = f"{name}: {100 * share:3.0f}%|{_bar(share)}| {done / 2**30:.2f}/{total / 2**30:.2f} GiB"
    eta = job.get("eta_ms")
    left = "?" if eta is None else _clock(eta)
    details = [f"{_clock(job['elapsed_ms'])}<{left}", f"{job['rate'] / 2**30:.2f} GiB/s"]
    if job.get("bottleneck"):
        details.append(job["bottleneck"])
    return f"{text} [{', '.join(details)}]"


def _bar(share: float) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * BAR_CELLS * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(BAR_CELLS)


def _clock(milliseconds: float) -> str:
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes:02}:{seconds:02}"
