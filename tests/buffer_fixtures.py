"""A replay buffer that dies on command and goes on from its files, behind a handle like Ray's; no Ray is needed."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from common.errors import RunError
from common.replay_buffer import ReplayBuffer

PATIENCE = 20.0
WHEN = ("before", "after", "noted")


def unavailable() -> ActorUnavailableError:
    """What Ray raises for a call that an actor, which is started again, did not answer."""
    return ActorUnavailableError("its process ended", b"\0" * 16)


class Reference:
    """Stands for Ray's reference to the reply of a call."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def future(self) -> Any:
        return self._future


class Handle:
    """Stands for Ray's handle of the buffer: calls run on the buffer's own event loop."""

    def __init__(self, make: Callable[[], ReplayBuffer], loop: asyncio.AbstractEventLoop) -> None:
        self._make, self._loop = make, loop
        self._buffer = make()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._deaths: dict[str, str] = {}
        self.lives = 1

    def dies(self, name: str, when: str) -> None:
        """The next call of the name gets no reply. `when` the buffer dies is one of `WHEN`: `noted` is in its files."""
        self._deaths[name] = when

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Reference:
                return Reference(asyncio.run_coroutine_threadsafe(self._answer(name, arguments), self._loop))

        return Method

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name).remote(*arguments).future().result(PATIENCE)

    async def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        when = self._deaths.pop(name, "")
        if when == "before":
            await self._die()
            raise unavailable()
        call = asyncio.ensure_future(getattr(self._buffer, name)(*arguments))
        self._under_way.add(call)
        try:
            reply = await call
        except asyncio.CancelledError as error:
            raise unavailable() from error
        finally:
            self._under_way.discard(call)
        if when == "noted":
            await self._buffer._store.write([])
        if when:
            await self._die()
            raise unavailable()
        return reply

    async def _die(self) -> None:
        """What is being written is finished first; a file that is cut short is another test's."""
        store = self._buffer._store
        await store.settle()
        store._folder.write = store._folder.delete = _dead  # type: ignore[method-assign]
        for call in self._under_way:
            call.cancel()
        self._buffer = self._make()
        self.lives += 1


def _dead(*_: Any) -> Any:
    raise RunError("the dead do not write")


@contextmanager
def living(make: Callable[[], ReplayBuffer]) -> Iterator[Handle]:
    """A buffer on an event loop of its own."""
    loop = asyncio.new_event_loop()
    looping = Thread(target=loop.run_forever, daemon=True)
    looping.start()

    async def begin() -> Handle:
        return Handle(make, loop)

    try:
        yield asyncio.run_coroutine_threadsafe(begin(), loop).result(PATIENCE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        looping.join()


def without_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.get` and `ray.put` of this process: what was put is its own reference."""

    def get(value: Any) -> Any:
        return value.future().result(PATIENCE) if isinstance(value, Reference) else value

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", lambda value: value)
