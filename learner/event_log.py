"""EventLog: what a run has told so far, for whoever waits for news of it.

An event is its kind and its values, e.g. `("warning", {"text": "..."})`. There is one listener: whoever asks for the
events from a number on has those before it, and they are forgotten.
"""

import asyncio
from collections.abc import Callable
from typing import Any

Event = tuple[str, dict[str, Any]]


class EventLog:
    """Owned by the controller, lives as long as it, in one event loop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._forgotten = 0
        self._newest: dict[str, dict[str, Any]] = {}
        self._news = asyncio.Condition()

    async def tell(self, kind: str, values: dict[str, Any]) -> None:
        async with self._news:
            self._events.append((kind, values))
            self._newest[kind] = values
            self._news.notify_all()

    async def warn(self, text: str) -> None:
        await self.tell("warning", {"text": text})

    def warner(self) -> Callable[[str], None]:
        """`warn` for other threads; called in the event loop."""
        loop = asyncio.get_running_loop()

        def warn(text: str) -> None:
            telling = self.warn(text)
            try:
                asyncio.run_coroutine_threadsafe(telling, loop)
            except RuntimeError:  # the run is over, and nobody listens
                telling.close()

        return warn

    async def after(self, number: int) -> list[Event]:
        """Those from `number` on; blocks until there is one.

        Raises:
            ValueError: when some of them are forgotten already.
        """
        if number < self._forgotten:
            raise ValueError(f"events before number {self._forgotten} are forgotten, and {number} was asked for")
        async with self._news:
            del self._events[: number - self._forgotten]
            self._forgotten = number
            await self._news.wait_for(lambda: bool(self._events))
            return list(self._events)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Block until something is so, which comes with an event."""
        async with self._news:
            await self._news.wait_for(holds)

    def newest(self, kind: str) -> dict[str, Any]:
        """Values of the newest event of a kind; nothing before there is one."""
        return self._newest.get(kind, {})
