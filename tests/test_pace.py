"""Pace: rates of counters, and what a row of metrics gets beside its own values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.metrics import CATALOGUE
from learner.pace import COUNTERS, IN_ROWS, Pace, Rate


def test_a_rate_is_that_of_the_last_window() -> None:
    rate = Rate(window=10.0)
    assert rate.per_second is None
    for second in range(100):
        rate.see(float(second), 5.0 * second if second < 50 else 250.0 + (second - 50))
        if second == 0:
            assert rate.per_second is None
    assert rate.per_second == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 100)), min_size=2, max_size=50))
def test_a_rate_lies_between_its_slowest_and_fastest_stretch(steps: list[tuple[float, float]]) -> None:
    rate, now, total = Rate(window=15.0), 0.0, 0.0
    for wait, more in steps:
        now, total = now + wait, total + more
        rate.see(now, total)
    slopes = [more / wait for wait, more in steps[1:]]
    found = rate.per_second
    assert found is not None
    assert min(slopes) * (1 - 1e-6) - 1e-6 <= found <= max(slopes) * (1 + 1e-6) + 1e-6


def test_a_counter_that_began_anew_gives_no_negative_rate() -> None:
    rate = Rate()
    for now, total in ((0.0, 100.0), (1.0, 110.0), (2.0, 3.0)):
        rate.see(now, total)
    assert rate.per_second is None
    rate.see(3.0, 7.0)
    assert rate.per_second == 4.0


def test_a_step_says_who_waited_and_for_how_long() -> None:
    pace = Pace()
    assert pace.beside("step", {}, 0.0) == {}
    for now, done, learner, rollout in ((0.0, 0.0, 0.0, 0.0), (10.0, 250.0, 2.5, 10.0)):
        gauges = {"rollout_completions": done, "learner_wait_seconds": learner, "rollout_wait_seconds": rollout}
        pace.see(now, {**gauges, "rollout_actors": 4.0, "rollout_actors_wanted": 4.0, "weights_damaged": 0.0})
    row = pace.beside("step", {}, 10.0)
    assert row["rollout_completions_per_second"] == 25.0
    assert (row["learner_wait_share"], row["rollout_wait_share"]) == (0.25, 0.25)
    assert row["rollout_wait_seconds"] == 10.0
    assert set(row) == set(IN_ROWS) - {"warm_start_tokens_per_second"}
    assert pace.beside("started", {}, 10.0) == {}


def test_a_warm_start_step_says_its_tokens_per_second() -> None:
    pace = Pace()
    assert pace.beside("warm_start", {"warm_start_tokens": 0.0}, 0.0) == {}
    assert pace.beside("warm_start", {"warm_start_tokens": 900.0}, 2.0) == {"warm_start_tokens_per_second": 450.0}


def test_shares_stay_shares() -> None:
    pace = Pace()
    for now in (0.0, 1.0):
        pace.see(now, dict.fromkeys(COUNTERS, 5.0 * now))
    row = pace.beside("step", {}, 1.0)
    assert (row["learner_wait_share"], row["rollout_wait_share"]) == (1.0, 1.0)


def test_what_is_counted_is_in_the_catalogue() -> None:
    assert {name for name in IN_ROWS if not name.endswith(("_share", "_per_second"))} <= set(CATALOGUE)
