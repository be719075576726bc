"""Segment stores whose threads a test holds up."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from common.segment_store import SegmentStore


class Gate:
    """Holds every `write` (or `read`) of a store's folder inside its thread; `begun` counts them."""

    def __init__(self, store: SegmentStore, name: str = "write") -> None:
        self.begun = 0
        self._through = threading.Semaphore(0)
        self._call: Callable[..., Any] = getattr(store._folder, name)
        setattr(store._folder, name, self._held)

    def let_through(self, calls: int = 1) -> None:
        self._through.release(calls)

    def _held(self, *arguments: Any) -> Any:
        self.begun += 1
        assert self._through.acquire(timeout=20.0)
        return self._call(*arguments)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)
