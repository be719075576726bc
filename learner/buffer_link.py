"""BufferLink: the learner's side of its calls to the replay buffer, one at a time, through the buffer's deaths.

The buffer is started again when it dies, from its files (`common.recovery`). What the learner did since is in no file:
the link keeps it, tells it first (`rejoin`), and makes the call again. A call that was under way fails; one that comes
when the buffer is there again, but was not told, is answered with `RejoinFirst`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError

from actors.failure import comes_back
from common.lease import Export, RejoinFirst, Sample
from common.weight_store import UNPUBLISHED, Snapshot, digest

RETRY_SECONDS = 0.2


class BufferLink:
    """Owned by the learner actor while it trains."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self._snapshot: Snapshot | None = None
        self._history: list[tuple[int, list[int]]] = []
        self._base: tuple[str, list[Any]] = "", []
        self.closed = False

    def sample(self) -> Sample:
        """Blocks until a batch may be taken; no numbers once the buffer is closed."""
        return self._call(lambda: self._buffer.sample.remote())

    def publish(self, version: int, flat: np.ndarray, trained: Sequence[int], base: Sequence[np.ndarray] = ()) -> None:
        """Publish weights and what they were trained on; `base` is what is frozen beside them, from now on."""
        if base:
            self._base = digest(*base), [ray.put(list(base))]
        name, handle = self._base
        self._snapshot = Snapshot(version=version, digest=digest(flat), payload=[ray.put(flat), *handle], base=name)
        self._history.append((version, list(trained)))
        try:
            self.closed = ray.get(self._buffer.publish.remote(self._snapshot, trained))
        except (ActorUnavailableError, RejoinFirst) as error:
            self._after(error)  # which publishes

    def set_aside(self, numbers: Sequence[int], reason: str) -> None:
        """Give a batch up. Should the buffer die meanwhile, it may come once more."""
        try:
            ray.get(self._buffer.set_aside.remote(numbers, reason))
        except (ActorUnavailableError, RejoinFirst) as error:
            self._after(error)

    def rewind(self, index: int, step: int) -> int:
        """Return the buffer to a checkpoint; the version to publish first."""
        return self._call(lambda: self._buffer.rewind.remote(index, step))

    def export(self) -> Export:
        """The buffer's part of a checkpoint."""
        return self._call(lambda: self._buffer.export.remote())

    def settle(self, index: int, version: int) -> None:
        """Checkpoints up to `version` are durable; none that may be returned to is older than entry `index`."""
        self._history = [done for done in self._history if done[0] > version]
        self._call(lambda: self._buffer.settle.remote(index))

    def _call(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return ray.get(call())
            except (ActorUnavailableError, RejoinFirst) as error:
                self._after(error)

    def _after(self, error: Exception) -> None:
        """Tell a buffer that came back what the learner did; nothing is sampled then. Any other error is raised."""
        asked = isinstance(error, RejoinFirst)
        if not asked and not comes_back(error):
            raise error
        if not asked and self._snapshot is None:  # nothing to tell
            time.sleep(RETRY_SECONDS)
            return
        while True:
            try:
                ray.get(self._buffer.rejoin.remote(self._snapshot or UNPUBLISHED, self._history, ()))
                return
            except ActorUnavailableError as again:
                if not comes_back(again):
                    raise
                time.sleep(RETRY_SECONDS)
