"""The rollout actor's loop against a real replay buffer, without Ray: leases, weights, faults, drain, stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from buffer_fixtures import PATIENCE, WHEN, Handle, living
from ray.exceptions import ActorUnavailableError, OwnerDiedError

from actors import rollout_actor
from actors.producer import Fault
from actors.rollout_actor import RolloutActor
from common.lease import FinishedGroup, Lease, LeaseReply, RejoinFirst, Sample
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from common.weight_store import Snapshot, digest
from learner.benchmarks.event_model import Workload
from learner.benchmarks.simulated_producer import MakeSimulated, SimulatedProducer


class Scene:
    """A buffer, one actor in a thread, and the test as learner."""

    def __init__(self, handle: Handle, actor: RolloutActor) -> None:
        self.buffer, self.actor = handle, actor
        self.thread = Thread(target=actor.run, daemon=True)
        self.version = -1
        self.history: list[tuple[int, list[int]]] = []

    def publish(self, trained: list[int]) -> None:
        self.version += 1
        self.history.append((self.version, trained))
        self.asks("publish", self.snapshot(), trained)

    def snapshot(self) -> Snapshot:
        flat = np.full(5, self.version, np.float32)
        return Snapshot(self.version, digest(flat), [flat])

    def asks(self, name: str, *arguments: Any) -> Any:
        """A call of the learner; a buffer that came back is told first what it did."""
        while True:
            try:
                return self.buffer.call(name, *arguments)
            except (ActorUnavailableError, RejoinFirst):
                self.buffer.call("rejoin", self.snapshot(), self.history, [])
                if name == "publish":
                    return None

    def train(self) -> Sample:
        batch = self.asks("sample")
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
def scene(make: Callable[..., Any], folder: Path | str = "mock:///segments", **changed: Any) -> Iterator[Scene]:
    """A buffer that shall come back needs a real `folder`."""
    values = {"groups_per_step": 2, "max_staleness": 1, "lease_seconds": 60.0, "drop_no_spread": False, **changed}
    with living(lambda: ReplayBuffer(**{"store": SegmentStore(folder, memory_bytes=2**20), **values})) as handle:
        acting = Scene(handle, RolloutActor(name="a", buffer=handle, make=make))
        acting.thread.start()
        acting.publish([])
        try:
            yield acting
        finally:
            handle.call("close")
            acting.actor.stop()
            assert acting.ends()


@pytest.fixture(autouse=True)
def _objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_actor.ray, "get", lambda flat: flat)
    monkeypatch.setattr(rollout_actor, "RETRY_SECONDS", 0.01)


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
        seen = acting.actor.gauges()
        assert seen["longest_group_seconds"] > 0.3
        assert (seen["rollout_group_seconds_bucket{le=0.25}"], seen["rollout_group_seconds_bucket{le=+Inf}"]) == (0, 2)
        assert 0.6 < seen["rollout_group_seconds_sum"] <= 2 * seen["longest_group_seconds"]
        assert seen["weights_adopt_seconds_bucket{le=+Inf}"] >= 1
        assert seen["weights_adopt_seconds_sum"] > 0


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


class FaultyOnce(SimulatedProducer):
    """Its first prompt is at fault, once."""

    faulty = True

    def step(self) -> list[FinishedGroup | Fault]:
        ended = super().step()
        if self.faulty and ended and ended[0].number == 0:
            self.faulty = False
            ended[0] = Fault(0, ended[0].attempt, "no good")
        return ended


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["lease", "submit", "renew", "fail"])
def test_the_buffer_may_be_gone_for_any_call(name: str, when: str, tmp_path: Path) -> None:
    """The actor tells the one that comes back what it holds and makes its call again; nothing is lost or done twice.

    A lease that was granted, noted and never heard of would else wait for its deadline.
    """
    make = partial(lambda name, wake, made: FaultyOnce(made), made=simulated(0.2 if name == "renew" else 0.002))
    with scene(make, tmp_path, lease_seconds=0.15 if name == "renew" else 60.0) as acting:
        acting.buffer.dies(name, when)
        numbers = [number for _ in range(6) for number in acting.train().numbers]
        assert sorted(numbers) == list(range(12))
        until(lambda: acting.buffer.lives == 2)
        numbers += [number for _ in range(2) for number in acting.train().numbers]
        assert sorted(numbers) == list(range(16))
        gauges = acting.gauges()
        assert (gauges["groups_trained"], gauges["groups_quarantined"]) == (16, 0)
        assert (gauges["lost_groups"], gauges["violations"]) == (0, 0)


def test_an_actor_that_is_stopped_while_the_buffer_is_gone_ends(tmp_path: Path) -> None:
    with scene(simulated(60.0), tmp_path) as acting:
        until(lambda: len(acting.actor._leases) == 2)  # it knows of them too
        acting.buffer.dies("renew", "before")
        acting.actor._events.put(lambda: setattr(acting.actor, "_renewed", 0.0))  # renews at once
        until(lambda: acting.buffer.lives == 2)
        acting.actor.stop()
        assert acting.ends()


def test_weights_whose_learner_died_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = True

    def owner_is_dead(flat: np.ndarray) -> np.ndarray:
        if lost and flat[0] == 1:
            raise OwnerDiedError("00" * 28, "an owner", "a call")
        return flat

    monkeypatch.setattr(rollout_actor.ray, "get", owner_is_dead)
    monkeypatch.setattr(rollout_actor, "DAMAGED_SECONDS", 0.05)
    with scene(simulated()) as acting:
        acting.train()
        until(lambda: acting.gauges()["failed_leases"] > 0)  # leases that need version 1 go back
        gauges = acting.actor.gauges()
        assert (gauges["version"], gauges["damaged_weights"]) == (0, 0)
        lost = False
        for _ in range(4):
            assert max(acting.train().staleness) <= 1
        gauges = acting.gauges()
        assert (gauges["groups_trained"], gauges["groups_quarantined"], gauges["violations"]) == (10, 0, 0)
