"""The event model against what can be worked out by hand, and the policies' promises under it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.admission import ADMISSIONS, WindowedFifo
from common.errors import UserError
from learner.benchmarks.event_model import Outcome, Workload, simulate

ROOT = Path(__file__).parents[1]
CONSTANT = Workload(groups_per_step=4, slots=4, generation_seconds=2.0, cv=0.0, train_seconds=3.0, steps=10)


def outcome(name: str, eta: int, workload: Workload, **more: object) -> Outcome:
    policy = ADMISSIONS[name](groups_per_step=workload.groups_per_step, max_staleness=eta)
    return simulate(policy, workload, **more)  # pyright: ignore[reportArgumentType]


def test_synchronous_steps_take_generation_and_training() -> None:
    found = outcome("windowed_fifo", 0, CONSTANT)
    assert found.seconds == pytest.approx(10 * (2 + 3))
    assert found.idle == pytest.approx(2 / 5)
    assert found.staleness == [0] * 40
    half = outcome("windowed_fifo", 0, replace(CONSTANT, slots=2))  # two rounds of generation
    assert half.seconds == pytest.approx(10 * (4 + 3))


@pytest.mark.parametrize("name", list(ADMISSIONS))
def test_one_step_ahead_hides_the_shorter_of_the_two(name: str) -> None:
    learner_bound = outcome(name, 1, CONSTANT)
    assert learner_bound.seconds == pytest.approx(2 + 10 * 3)
    assert learner_bound.idle == 0
    rollout_bound = outcome(name, 1, replace(CONSTANT, generation_seconds=3.0, train_seconds=2.0))
    assert rollout_bound.seconds == pytest.approx(10 * 3 + 2)
    assert rollout_bound.idle == pytest.approx(1 / 3)


def test_the_slowest_group_holds_up_strict_fifo_and_not_the_window() -> None:
    times = {0: 9.0}  # all others take 1
    workload = Workload(groups_per_step=2, slots=4, generation_seconds=1.0, cv=0.0, train_seconds=1.0, steps=1)
    for policy, seconds in (
        (WindowedFifo(groups_per_step=2, tickets=6, window=1), 10.0),
        (WindowedFifo(groups_per_step=2, tickets=4, window=3), 2.0),
    ):
        assert simulate(policy, workload, draw=lambda number: times.get(number, 1.0)).seconds == seconds


@settings(max_examples=60)
@given(
    st.sampled_from(["windowed_fifo", "strict_fifo", "drop_when_stale"]),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_what_is_promised_is_kept(name: str, eta: int, cv: float, slots: int, seed: int) -> None:
    workload = Workload(
        groups_per_step=4, slots=slots, generation_seconds=1.0, cv=cv, train_seconds=0.5, steps=12, seed=seed
    )
    found = outcome(name, eta, workload)
    assert max(found.staleness) <= eta
    assert len(found.staleness) == 48
    assert 0 <= found.idle < 1
    assert found.dropped == 0 or name == "drop_when_stale"


def test_aggregate_lead_has_no_bound_and_dropping_wastes() -> None:
    workload = Workload(generation_seconds=1.0, cv=1.0, train_seconds=1.0, steps=100)
    assert max(outcome("aggregate_lead", 2, workload).staleness) > 4
    assert outcome("drop_when_stale", 2, workload).wasted > 0.05


def test_draws_have_the_mean_and_the_variation_asked_for() -> None:
    workload = Workload(generation_seconds=2.0, cv=0.5, train_seconds=1.0, steps=1)
    drawn = np.array([workload.draw(number) for number in range(4000)])
    assert drawn.mean() == pytest.approx(2.0, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.05)
    assert workload.draw(7) == workload.draw(7)


@pytest.mark.parametrize("name", list(ADMISSIONS))
def test_negative_staleness_is_refused_by_every_policy(name: str) -> None:
    with pytest.raises(UserError, match="max_staleness is -1"):
        ADMISSIONS[name](groups_per_step=4, max_staleness=-1)


def test_simulated_parts_load_neither_torch_nor_transformers() -> None:
    code = "import sys, learner.benchmarks.asynchrony\nprint(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
