"""GroupProducer: what it counts about completions is what its groups say."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import group_producer
from actors.group_producer import GroupProducer
from common.config import Config, LearnerConfig, ModelConfig
from common.histogram import bucket_keys
from common.lease import FinishedGroup, Lease
from common.metrics import CATALOGUE
from common.tasks.sudoku import SudokuConfig
from common.trajectory import NOT_DRAWN, decode_group
from common.weight_store import Snapshot, digest
from common.weights import to_flat

PATIENCE = 60.0


def test_distributions_are_those_of_every_completion() -> None:
    sampler: Any = {"max_prompt_tokens": 16, "max_completion_tokens": 16}
    model = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32, max_positions=64)
    config = Config(task=SudokuConfig(), sampler=sampler, model=model, learner=LearnerConfig(group_size=4))
    producer = GroupProducer(config, "one", lambda: None)
    groups: list[Any] = []
    try:
        flat = to_flat(producer._policy)
        producer.adopt(flat, Snapshot(0, digest(flat), flat))
        for number in range(3):
            producer.start(Lease(number=number, cursor=number, attempt=0, version=0, seconds=60.0))
        until = time.monotonic() + PATIENCE
        while len(groups) < 3:
            groups += producer.step()
            assert time.monotonic() < until
        gauges = producer.gauges()
    finally:
        producer.close()
    assert all(isinstance(group, FinishedGroup) for group in groups)
    rows = [row for group in groups for row in decode_group(group.payload).to_pylist()]
    seen = {
        "reward": [row["reward"] for row in rows],
        "nfe": [row["nfe"] for row in rows],
        "gamma": [row["gamma"] for row in rows],
        "tokens": [sum(version != NOT_DRAWN for version in row["token_version"]) for row in rows],
    }
    for kind, values in seen.items():
        name = f"rollout_completion_{kind}"
        assert gauges[f"{name}_sum"] == pytest.approx(sum(values), rel=1e-5)
        bounds = (*CATALOGUE[name].bounds, np.inf)
        expected = [sum(value <= bound for value in values) for bound in bounds]
        assert [gauges[key] for key in bucket_keys(name)] == expected
        assert expected[-1] == 12


def test_no_lease_is_asked_for_before_there_is_somebody_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that nobody can score would hold up all that come after it."""
    config = Config(task=SudokuConfig(), learner=LearnerConfig(group_size=4))
    there: Any = SimpleNamespace(ready=False, close=lambda: None)
    monkeypatch.setattr(group_producer, "rewards_of", lambda *_: there)
    producer = GroupProducer(config, "one", lambda: None)
    assert producer.room == 0
    there.ready = True
    assert producer.room == config.rollout.slots // 4
