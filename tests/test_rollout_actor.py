"""The rollout actor's loop against a real replay buffer, without Ray: leases, weights, faults, drain, stop."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import pytest

from actors import rollout_actor
from actors.producer import Fault
from actors.rollout_actor import RolloutActor
from common.lease import Batch, FinishedGroup, Lease, LeaseReply
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from common.weight_store import Snapshot, digest
from learner.benchmarks.event_model import Workload
from learner.benchmarks.simulated_producer import MakeSimulated, SimulatedProducer

PATIENCE = 10.0


class Reference:
    """Stands for Ray's reference to the reply of a call."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def future(self) -> Any:
        return self._future


class Handle:
    """Stands for Ray's handle of the buffer: calls run on the buffer's own event loop."""

    def __init__(self, buffer: ReplayBuffer, loop: asyncio.AbstractEventLoop) -> None:
        self._buffer, self._loop = buffer, loop

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Reference:
                call = getattr(self._buffer, name)(*arguments)
                return Reference(asyncio.run_coroutine_threadsafe(call, self._loop))

        return Method

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name).remote(*arguments).future().result(PATIENCE)


class Scene:
    """A buffer, one actor in a thread, and the test as learner."""

    def __init__(self, handle: Handle, actor: RolloutActor) -> None:
        self.buffer, self.actor = handle, actor
        self.thread = Thread(target=actor.run, daemon=True)
        self.version = -1

    def publish(self, trained: list[int]) -> None:
        self.version += 1
        flat = np.full(5, self.version, np.float32)
        self.buffer.call("publish", Snapshot(self.version, digest(flat), [flat]), trained)

    def train(self) -> Batch:
        batch = self.buffer.call("sample")
        self.publish(batch.numbers)
        return batch

    def gauges(self) -> dict[str, float]:
        return self.buffer.call("gauges")

    def ends(self) -> bool:
        self.thread.join(PATIENCE)
        return not self.thread.is_alive()


def simulated(seconds: float = 0.002) -> MakeSimulated:
    workload = Workload(generation_seconds=seconds, cv=0.5, train_seconds=0.0, steps=1)
    return MakeSimulated(workload=workload, slots=2, payload_bytes=10)


@contextmanager
def scene(make: Callable[..., Any], **changed: Any) -> Iterator[Scene]:
    loop = asyncio.new_event_loop()
    looping = Thread(target=loop.run_forever, daemon=True)
    looping.start()
    values = {"groups_per_step": 2, "max_staleness": 1, "lease_seconds": 60.0, "drop_no_spread": False}
    store = SegmentStore("mock:///segments", memory_bytes=2**20)
    handle = Handle(ReplayBuffer(**{"store": store, **values, **changed}), loop)
    acting = Scene(handle, RolloutActor(name="a", buffer=handle, make=make))
    acting.thread.start()
    acting.publish([])
    try:
        yield acting
    finally:
        handle.call("close")
        acting.actor.stop()
        ended = acting.ends()
        loop.call_soon_threadsafe(loop.stop)
        looping.join()
        assert ended


@pytest.fixture(autouse=True)
def _objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_actor.ray, "get", lambda flat: flat)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_groups_come_within_the_bound_and_the_loop_ends_with_the_buffer() -> None:
    with scene(simulated()) as acting:
        numbers = [number for _ in range(20) for number in acting.train().numbers]
        assert numbers == list(range(40))
        gauges = acting.gauges()
        assert (gauges["violations"], gauges["late_results"], gauges["wasted_groups"]) == (0, 0, 0)
        acting.buffer.call("close")
        assert acting.ends()


def test_a_drained_actor_hands_in_what_it_has_and_ends() -> None:
    with scene(simulated(0.3)) as acting:
        until(lambda: acting.gauges()["groups_leased"] == 2)
        acting.buffer.call("drain", "a")
        assert acting.ends()
        gauges = acting.gauges()
        assert (gauges["groups_finished"], gauges["groups_leased"], gauges["wasted_groups"]) == (2, 0, 0)


def test_a_stopped_actor_ends_at_once() -> None:
    with scene(simulated(60.0)) as acting:
        until(lambda: acting.gauges()["groups_leased"] == 2)
        acting.actor.stop()
        assert acting.ends()


def test_leases_that_arrive_behind_a_stop_are_not_begun() -> None:
    with scene(simulated(60.0)) as acting:
        until(lambda: acting.gauges()["groups_leased"] == 2)
        acting.actor.stop()
        assert acting.ends()
        lease = Lease(7, 7, 1, 0, 60.0)
        acting.actor._leased(LeaseReply([lease], Snapshot(0, "", None), False))
        assert acting.actor._done()


def test_damaged_weights_are_fetched_again_and_never_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    healed = False

    def flips_a_bit(flat: np.ndarray) -> np.ndarray:
        damaged = flat.copy()
        damaged.view(np.uint32)[2] ^= 1
        return flat if healed or flat[0] != 1 else damaged

    monkeypatch.setattr(rollout_actor.ray, "get", flips_a_bit)
    monkeypatch.setattr(rollout_actor, "DAMAGED_SECONDS", 0.05)
    with scene(simulated()) as acting:
        acting.train()
        until(lambda: acting.gauges()["failed_leases"] > 0)  # leases that need version 1 go back
        gauges = acting.actor.gauges()
        assert gauges["version"] == 0
        assert gauges["damaged_weights"] >= 3
        healed = True
        for _ in range(4):
            assert max(acting.train().staleness) <= 1
        gauges = acting.gauges()
        assert (gauges["groups_trained"], gauges["groups_quarantined"], gauges["violations"]) == (10, 0, 0)
        until(lambda: acting.actor.gauges()["version"] >= 4)


class Faulty(SimulatedProducer):
    """Every third prompt is at fault."""

    def step(self) -> list[FinishedGroup | Fault]:
        return [
            Fault(group.number, group.attempt, "no good") if group.number % 3 == 0 else group
            for group in super().step()
        ]


def test_what_is_the_data_s_fault_is_tried_twice_and_quarantined() -> None:
    with scene(lambda name, wake: Faulty(simulated())) as acting:
        numbers = [number for _ in range(3) for number in acting.train().numbers]
        assert numbers == [1, 2, 4, 5, 7, 8]
        assert acting.buffer.call("quarantine")[0] == (0, "no good")


class Watched(SimulatedProducer):
    """Remembers what it was told to drop."""

    dropped: list[int]

    def drop(self, lease: Lease) -> None:
        self.dropped.append(lease.number)
        super().drop(lease)


def test_lost_leases_are_dropped_at_the_next_renewal() -> None:
    made: list[Watched] = []

    def make(name: str, wake: Callable[[], None]) -> Watched:
        made.append(Watched(simulated(60.0)))
        made[0].dropped = []
        return made[0]

    with scene(make, lease_seconds=0.3) as acting:
        until(lambda: acting.gauges()["groups_leased"] == 2)
        acting.buffer.call("return_worker", "a")
        until(lambda: len(made[0].dropped) >= 2)
        assert made[0].dropped[:2] == [0, 1]
        assert acting.actor.gauges()["longest_group_seconds"] == 0  # of those that were handed in


def test_a_group_longer_than_its_lease_is_renewed_until_its_hand_in_is_answered() -> None:
    with scene(simulated(1.0), lease_seconds=0.3) as acting:
        assert acting.train().numbers == [0, 1]
        gauges = acting.gauges()
        assert (gauges["expired_leases"], gauges["late_results"]) == (0, 0)
        assert acting.actor.gauges()["longest_group_seconds"] > 0.3


def test_the_loop_sleeps_while_it_has_nothing_to_do() -> None:
    steps = 0

    class Counted(SimulatedProducer):
        def step(self) -> list[FinishedGroup | Fault]:
            nonlocal steps
            steps += 1
            return super().step()

    with scene(lambda name, wake: Counted(simulated(60.0))) as acting:
        until(lambda: acting.gauges()["groups_leased"] == 2)
        before = steps
        time.sleep(0.3)
        assert steps - before <= 2
