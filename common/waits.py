"""Waits: how many seconds callers spent blocked in one place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Waits:
    """Adds up the seconds that callers spent blocked, those that still are included."""

    clock: Callable[[], float]
    done: float = 0.0
    since: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the wait of one caller."""
        started = self.clock()
        self.since.append(started)
        try:
            yield
        finally:
            self.since.remove(started)
            self.done += self.clock() - started

    def seconds(self) -> float:
        """Seconds so far, over all callers."""
        return self.done + sum(self.clock() - started for started in self.since)
