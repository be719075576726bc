"""Scaling policy: against a run whose learner and actors have given speeds."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.scaling_policy import REMEMBER, WORTH, Reading, ScalingPolicy

WINDOW = 30.0


@dataclass
class Run:
    """Actors that make `rate` groups a second, a learner that takes up to `appetite`; new actors take `delay` s."""

    rate: float
    appetite: float
    actors: int = 1
    delay: float = 0.0
    seconds: float = 0.0
    learner_waited: float = 0.0
    actors_waited: float = 0.0
    finished: float = 0.0
    arrives: float = 0.0
    at_once: float = math.inf
    """Most groups a second that the staleness bound allows."""

    def play(self, policy: ScalingPolicy, windows: int) -> list[int]:
        """The numbers of actors after each change."""
        changes = []
        for _ in range(round(windows * WINDOW)):
            self.seconds += 1
            working = self.actors if self.seconds >= self.arrives else 0
            made = min(self.rate * working, self.at_once)
            taken = min(made, self.appetite)
            self.finished += taken
            self.learner_waited += 1 - taken / self.appetite
            self.actors_waited += working * (1 - taken / made) if made else 0.0
            proposal = policy.propose(
                Reading(
                    self.seconds, self.learner_waited, self.actors_waited, self.finished, 0.0, 0.0, working, self.actors
                )
            )
            if proposal is not None:
                self.actors, reason = proposal
                changes.append(self.actors)
                self.arrives = self.seconds + self.delay
                sent_back = self.at_once < math.inf or not worth_more(self.rate, self.appetite, self.actors)
                assert reason in ("learner_waits", "rollout_waits") or (reason == "useless" and sent_back)
        return changes


def worth_more(rate: float, appetite: float, actors: int) -> bool:
    """Whether as many as the policy tries next bring the share of their number that it asks of them."""
    fed = min(1.0, rate * actors / appetite)
    tried = max(math.ceil(actors / max(fed, 0.5)), actors + 1)
    return min(1.0, rate * tried / appetite) >= fed * (1 + WORTH * (tried / actors - 1)) * (1 - 1e-6)


@given(st.floats(0.05, 3.0), st.integers(1, 12), st.integers(12, 24), st.floats(0, 100))
@example(1.78125, 1, 12, 0.0)  # a third brings 12.3 % and is not worth it
def test_it_finds_as_many_as_feed_the_learner_and_stays(rate: float, least: int, most: int, delay: float) -> None:
    run = Run(rate, appetite=4.0, actors=least, delay=delay)
    policy = ScalingPolicy(least=least, most=most, window=WINDOW)
    run.play(policy, 60)
    needed = min(max(math.ceil(4.0 / rate), least), most)
    found = run.actors
    assert least <= found <= most
    if found < needed:  # the learner hardly waits
        assert 1 - min(1.0, rate * found / 4.0) <= 0.1 or not worth_more(rate, 4.0, found)
    assert found <= max(needed, least) * 2 + 1  # more is too much only where actors stand still over half their time
    assert len(run.play(policy, 2 * REMEMBER)) <= 6


def test_a_number_that_was_too_few_is_not_tried_again_at_once() -> None:
    run = Run(rate=1.9, appetite=4.0, actors=2)  # 2 are too few by a little; 3 are too many by a little
    policy = ScalingPolicy(least=1, most=8, window=WINDOW)
    assert run.play(policy, REMEMBER) == []  # the learner waits for 5 % of its time: let be
    run.rate = 1.0
    assert run.play(policy, 4)[0] == 4  # twice as many at most
    run.rate = 100.0
    assert run.play(policy, REMEMBER - 4) == [3], "2 were too few"


@given(st.integers(1, 8), st.floats(0.2, 0.99), st.floats(0, 40))
def test_more_that_make_no_more_are_sent_back(actors: int, share: float, delay: float) -> None:
    """Under a bound that allows no more groups at once, the learner waits however many there are."""
    run = Run(rate=4.0 * share / actors, appetite=4.0, actors=actors, delay=delay, at_once=4.0 * share)
    policy = ScalingPolicy(least=1, most=32, window=WINDOW)
    changes = run.play(policy, 3 * REMEMBER)
    assert max([*changes, actors]) <= 2 * actors
    assert sum(run.play(policy, 1) == [] for _ in range(2 * REMEMBER)) >= 12, "it tries again now and then"
    assert run.actors <= 2 * actors


def test_more_that_make_more_stay() -> None:
    run = Run(rate=1.0, appetite=4.0)
    assert run.play(ScalingPolicy(least=1, most=8, window=WINDOW), 12) == [2, 4]


def test_nothing_is_judged_while_actors_are_missing() -> None:
    policy = ScalingPolicy(least=1, most=8, window=WINDOW)
    for second in range(200):
        working = 1 if second % 20 < 18 else 0
        assert policy.propose(Reading(second, second, 0, 0, 0, 0, working, 1)) is None


@pytest.mark.parametrize(("ready", "expected"), [(0.5, (2, "learner_waits")), (1.0, None)])
def test_a_learner_that_waits_though_a_batch_is_ready_is_not_short_of_actors(
    ready: float, expected: tuple[int, str] | None
) -> None:
    policy = ScalingPolicy(least=1, most=8, window=WINDOW)
    assert policy.propose(Reading(0, 0, 0, 0, 0, ready, 1, 1)) is None
    assert policy.propose(Reading(30, 30, 0, 0, 0, ready, 1, 1)) is None, "the first window"
    assert policy.propose(Reading(60, 60, 0, 0, 0, ready, 1, 1)) == expected


def test_groups_that_grow_too_old_want_fewer() -> None:
    policy = ScalingPolicy(least=2, most=8, window=WINDOW)
    policy.propose(Reading(-40, 0, 0, 0, 0, 3, 3, 3))
    policy.propose(Reading(0, 0, 0, 0, 0, 3, 3, 3))
    assert policy.propose(Reading(30, 1, 0, 100, 10, 3, 3, 3)) == (2, "stale")
    policy.propose(Reading(31, 1, 0, 100, 10, 3, 2, 2))
    policy.propose(Reading(62, 1, 0, 100, 10, 3, 2, 2))
    assert policy.propose(Reading(93, 1, 0, 200, 90, 3, 2, 2)) is None  # the least
