"""What a learner and actors say to a replay buffer, without Ray, and the clock it goes by."""

import asyncio

from common.lease import FinishedGroup, Lease
from common.replay_buffer import ReplayBuffer
from common.weight_store import Snapshot


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def weights(version: int) -> Snapshot:
    return Snapshot(version, f"digest {version}", [f"ref {version}"])


def result(lease: Lease, *, spread: float = 1.0, oldest: int | None = None) -> FinishedGroup:
    oldest = lease.version if oldest is None else oldest
    return FinishedGroup(lease.number, lease.attempt, b"group %d" % lease.number, spread, oldest, 4)


async def grant(buffer: ReplayBuffer, want: int, worker: str = "a") -> list[Lease]:
    return (await asyncio.wait_for(buffer.lease(worker, want), 30.0)).leases


async def fill(buffer: ReplayBuffer, want: int) -> list[int]:
    """Numbers of the groups that an actor was granted and handed in."""
    leases = await grant(buffer, want)
    return (await buffer.submit("a", [result(lease) for lease in leases])).accepted
