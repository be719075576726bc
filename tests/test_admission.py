"""Windowed FIFO: its bound holds on random schedules, is reached, and does not hold for the rules it warns against."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.admission import Admission, WindowedFifo
from common.errors import UserError
from common.ledger import GroupState, Ledger


@dataclass
class Circulation:
    """The loop between actors and learner over the pure parts: each method makes one move that is possible."""

    policy: Admission
    groups_per_step: int
    free_at_sampling: bool = False
    adopt_late: bool = False
    lease_at_once: bool = False
    keep_leases: bool = False
    uneven_steps: bool = False
    ledger: Ledger = field(default_factory=Ledger)
    version: int = 0
    trained: list[int] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    saved: tuple[int, int, int] = (0, 0, 0)
    """The checkpoint: index into the journal, version, groups trained."""
    returned: int = 0
    worst: int = 0

    def lease(self, _: float) -> bool:
        number = self.ledger.first_queued()
        if number is None:
            out = self.ledger.active_count
            if self.free_at_sampling:
                out -= len(self.ledger.numbers(GroupState.SAMPLED))
            if not self.policy.admit(out):
                return False
            number = self.ledger.next_number
        elif not self.policy.admit(self.ledger.active_below(number)) and not self.lease_at_once:
            return False
        self.ledger.lease(number, worker="w", deadline=0.0, version=self.version)
        return True

    def _pick(self, state: GroupState, choice: float) -> int | None:
        numbers = self.ledger.numbers(state)
        return numbers[int(choice * len(numbers))] if numbers else None

    def _leased(self, choice: float, move: Callable[[int], object]) -> bool:
        number = self._pick(GroupState.LEASED, choice)
        if number is not None:
            move(number)
        return number is not None

    def finish(self, choice: float) -> bool:
        return self._leased(choice, self.ledger.finish)

    def lose(self, choice: float) -> bool:
        return self._leased(choice, lambda number: self.ledger.requeue(number, reason="lost"))

    def quarantine(self, choice: float) -> bool:
        return self._leased(choice, lambda number: self.ledger.quarantine(number, reason="bad"))

    def discard(self, choice: float) -> bool:
        number = self._pick(GroupState.FINISHED, choice)
        if number is not None:
            self.ledger.discard(number, reason="no spread")
        return number is not None

    def sample(self, _: float) -> bool:
        batch = self.policy.select(self.ledger.numbers(GroupState.FINISHED), self.ledger.head())
        for number in batch:
            granted = self.ledger.record(number).version - int(self.adopt_late)
            ahead = len(self.batches) // 2 if self.uneven_steps and not self.returned else len(self.batches)
            self.worst = max(self.worst, self.version + ahead - granted)
            self.ledger.sample(number)
        if batch:
            assert len(batch) == self.groups_per_step
            assert batch == sorted(batch)
            self.batches.append(batch)
        return bool(batch)

    def publish(self, _: float) -> bool:
        if not self.batches:
            return False
        batches = 2 if self.uneven_steps and not self.returned else 1
        for number in [number for batch in self.batches[:batches] for number in batch]:
            self.ledger.train(number)
            self.trained.append(number)
        del self.batches[:batches]
        self.version += 1
        return True

    def save(self, _: float) -> bool:
        self.saved = (self.ledger.length, self.version, len(self.trained))
        self.ledger.settle(self.ledger.length)
        return True

    def rewind(self, _: float) -> bool:
        """The learner returns to its checkpoint."""
        index, self.version, count = self.saved
        assert self.ledger.rewind(index, reason="rewind") == sorted(self.trained[count:])
        del self.trained[count:]
        for number in self.ledger.numbers(GroupState.SAMPLED):
            self.ledger.unsample(number)
        for number in self.ledger.numbers(GroupState.LEASED):
            self.ledger.requeue(number, reason="void")
            if self.keep_leases:  # its tokens to come are of the version that is current then
                self.ledger.lease(number, worker="w", deadline=0.0, version=self.version)
        self.batches.clear()
        self.returned += 1
        return True

    def lose_bytes(self, choice: float) -> bool:
        """Only ever found out when the learner returns: what it had sampled is not sampled any more."""
        self.rewind(choice)
        number = self._pick(GroupState.FINISHED, choice)
        if number is not None:
            self.ledger.requeue(number, reason="lost")
        return number is not None


MOVES = ["lease", "finish", "sample", "publish", "lose", "discard", "quarantine"]
SCHEDULES = st.lists(st.tuples(st.sampled_from(MOVES), st.floats(0, 0.999)), max_size=150)
WITH_REWINDS = st.lists(
    st.tuples(st.sampled_from([*MOVES[:4] * 4, *MOVES, "save", "rewind", "lose_bytes"]), st.floats(0, 0.999)),
    max_size=300,
)
POLICIES = st.builds(
    lambda p, b, w: WindowedFifo(groups_per_step=p, tickets=p + b, window=min(w, p + b)),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 8),
)


@settings(max_examples=300)
@given(POLICIES, SCHEDULES)
def test_random_schedules_keep_the_bound_and_every_invariant(
    policy: WindowedFifo, schedule: list[tuple[str, float]]
) -> None:
    loop = Circulation(policy, policy.groups_per_step)
    for move, choice in schedule:
        getattr(loop, move)(choice)
        assert loop.worst <= policy.staleness_bound
        assert loop.ledger.active_count <= policy.tickets
        assert sum(loop.ledger.counts().values()) == loop.ledger.next_number
    assert len(set(loop.trained)) == len(loop.trained) == loop.ledger.counts()[GroupState.TRAINED]
    # Progress: from any state, while actors produce, the learner goes on.
    target = loop.version + 3
    for _ in range(4 * policy.tickets + 4):
        while loop.lease(0.0):
            pass
        while loop.finish(0.5):
            pass
        loop.sample(0.0)
        loop.publish(0.0)
    assert loop.version >= target
    assert loop.worst <= policy.staleness_bound


@settings(max_examples=300)
@given(POLICIES, WITH_REWINDS)
def test_the_bound_holds_through_rewinds_and_nothing_is_trained_twice(
    policy: WindowedFifo, schedule: list[tuple[str, float]]
) -> None:
    loop = Circulation(policy, policy.groups_per_step)
    for move, choice in schedule:
        getattr(loop, move)(choice)
        assert loop.worst <= policy.staleness_bound
        assert len(set(loop.trained)) == len(loop.trained) == loop.ledger.counts()[GroupState.TRAINED]
        assert len(loop.trained) == loop.version * policy.groups_per_step
    target = loop.version + loop.ledger.active_count // policy.groups_per_step + 3
    for _ in range(4 * (policy.tickets + target)):
        while loop.lease(0.0):
            pass
        while loop.finish(0.5):
            pass
        loop.sample(0.0)
        loop.publish(0.0)
    assert loop.version >= target
    assert loop.worst <= policy.staleness_bound


def staleness_with_rewinds(policy: WindowedFifo, seed: int, naive: str = "") -> int:
    """The worst staleness over 300 random moves with a rewind now and then."""
    draw = random.Random(seed)
    loop = Circulation(policy, policy.groups_per_step, **({naive: True} if naive else {}))
    for _ in range(300):
        move = draw.choice(["lease", "lease", "finish", "finish", "sample", "publish"])
        getattr(loop, draw.choices([move, "save", "rewind"], [0.95, 0.02, 0.03])[0])(draw.random())
    return loop.worst


def test_the_bound_is_reached_with_rewinds_and_broken_by_rules_that_the_proof_does_not_allow() -> None:
    policy = WindowedFifo(groups_per_step=2, tickets=5, window=3)
    assert policy.staleness_bound == 3
    worst = {
        naive: max(staleness_with_rewinds(policy, seed, naive) for seed in range(150))
        for naive in ("", "lease_at_once", "keep_leases", "uneven_steps")
    }
    assert worst[""] == 3
    assert worst["lease_at_once"] > 3  # the queue served whatever is active below
    assert worst["keep_leases"] > 3  # tokens of the version to come, counted as of the grant
    assert worst["uneven_steps"] > 3  # two batches a step before the first rewind, one after


@pytest.mark.parametrize("max_staleness", range(6))
@pytest.mark.parametrize("groups_per_step", [1, 2, 3, 8, 32])
def test_for_staleness_gives_exactly_the_bound_asked_for(groups_per_step: int, max_staleness: int) -> None:
    policy = WindowedFifo.for_staleness(groups_per_step=groups_per_step, max_staleness=max_staleness)
    assert policy.staleness_bound == max_staleness
    assert policy.tickets >= groups_per_step


def slow_group_staleness(policy: Admission, groups_per_step: int, seed: int, naive: Sequence[str] = ()) -> int:
    """The worst staleness over 150 random rounds in which one group in twenty takes ten times as long."""
    draw = random.Random(seed)
    loop = Circulation(
        policy, groups_per_step, free_at_sampling="free_at_sampling" in naive, adopt_late="adopt_late" in naive
    )
    due: dict[int, float] = {}
    for now in range(150):
        while loop.lease(0.0):
            due[loop.ledger.next_number - 1] = now + (30.0 if draw.random() < 0.05 else 3.0 * draw.random())
        for number in loop.ledger.numbers(GroupState.LEASED):
            if due[number] <= now:
                loop.ledger.finish(number)
        loop.publish(0.0)  # of an earlier round: leases are granted while a step is under way
        while len(loop.batches) < 2 and loop.sample(0.0):
            pass
    return loop.worst


@pytest.mark.parametrize("max_staleness", range(5))
def test_the_bound_is_reached_and_not_exceeded_with_slow_groups(max_staleness: int) -> None:
    policy = WindowedFifo.for_staleness(groups_per_step=4, max_staleness=max_staleness)
    assert max(slow_group_staleness(policy, 4, seed) for seed in range(20)) == max_staleness


class WindowOverUntrained(WindowedFifo):
    """The naive window: the W oldest untaken groups, however far apart their numbers are."""

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        early = [number for number in finished if number < head]
        late = [number for number in finished if number > head][: self.window - 1]
        batch = (early + late)[: self.groups_per_step]
        return batch if len(batch) == self.groups_per_step else []


@pytest.mark.parametrize(
    ("policy", "naive"),
    [
        (WindowOverUntrained(groups_per_step=4, tickets=8, window=5), []),
        (WindowedFifo(groups_per_step=4, tickets=8, window=5), ["free_at_sampling"]),
        (WindowedFifo(groups_per_step=4, tickets=8, window=5), ["adopt_late"]),
        (WindowedFifo(groups_per_step=4, tickets=4, window=1), ["free_at_sampling"]),
    ],
)
def test_rules_that_break_the_proof_break_the_bound(policy: WindowedFifo, naive: list[str]) -> None:
    assert max(slow_group_staleness(policy, 4, seed, naive) for seed in range(20)) > policy.staleness_bound


def test_a_slow_group_is_overtaken_by_a_window_and_no_further() -> None:
    policy = WindowedFifo(groups_per_step=2, tickets=6, window=3)
    assert policy.select([1, 2, 3, 4], head=0) == [1, 2]
    assert policy.select([3, 4, 5], head=0) == []
    assert policy.select([0, 3, 4, 5], head=6) == [0, 3]
    assert policy.select([0], head=1) == []


@pytest.mark.parametrize(
    ("values", "needle"),
    [
        ({"groups_per_step": 0, "tickets": 4, "window": 1}, "groups_per_step is 0"),
        ({"groups_per_step": 4, "tickets": 3, "window": 1}, "at least 4 tickets"),
        ({"groups_per_step": 4, "tickets": 4, "window": 0}, "window is 0"),
        ({"groups_per_step": 4, "tickets": 4, "window": 5}, "at most 4"),
    ],
)
def test_what_would_deadlock_is_refused_with_the_way_out(values: dict[str, int], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        WindowedFifo(**values)


def test_negative_staleness_is_refused() -> None:
    with pytest.raises(UserError, match="max_staleness is -1"):
        WindowedFifo.for_staleness(groups_per_step=4, max_staleness=-1)
