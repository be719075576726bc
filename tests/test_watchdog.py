"""Watchdog: when a run is ended, and what is said then."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from circulation_fixtures import Clock

from common.config import RunConfig
from common.errors import RunError
from learner import watchdog as watchdog_module
from learner.run_directory import RunDirectory
from learner.watchdog import Watchdog

Nap = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The watchdog's clock."""
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=clock))
    return clock


def dream(monkeypatch: pytest.MonkeyPatch, nap: Nap) -> None:
    """The watchdog sleeps no real time; `nap` is told for how long and moves the clock."""

    async def sleep(seconds: float) -> None:
        nap(seconds)

    monkeypatch.setattr(watchdog_module, "asyncio", SimpleNamespace(sleep=sleep))


def test_what_gets_on_slowly_is_let_be_and_what_stands_still_says_who_waits(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    doing = {}

    async def who_waits() -> dict[str, Any]:
        return {"phase": "evaluate", "evaluation workers": doing}

    def nap(seconds: float) -> None:
        clock.now += seconds - 0.1
        if len(naps) < 5:
            doing[1] = f"after: learned, greedy: {len(naps)} of 64 rewards"
            dog.mark()
        naps.append(seconds)
        clock.now += 0.1

    naps: list[float] = []
    dream(monkeypatch, nap)
    dog = Watchdog(RunConfig(stall_timeout=5), RunDirectory(tmp_path), lacking=lambda: "", who_waits=who_waits)
    dog.untrainable = ": 7 groups were discarded"
    with pytest.raises(RunError, match=r"no progress for 5 s.* evaluate .*: 7 groups were discarded; .*: 4 of 64 rew"):
        asyncio.run(dog.watch())
    assert naps == pytest.approx([5.0] + 5 * [4.9])
    left = json.loads((tmp_path / "stall.json").read_text())
    assert left["evaluation workers"] == {"1": "after: learned, greedy: 4 of 64 rewards"}


def test_a_lack_of_nodes_has_its_own_patience(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody() -> dict[str, Any]:
        raise AssertionError("nobody is asked: it is known what is lacking")

    def nap(seconds: float) -> None:
        clock.now += seconds

    dream(monkeypatch, nap)
    config = RunConfig(stall_timeout=10, capacity_timeout=60)
    dog = Watchdog(config, RunDirectory(tmp_path), lacking=lambda: "the learner: 8 GPUs", who_waits=nobody)
    with pytest.raises(RunError, match=r"no nodes for 60 s .*_timeout=60\): the learner: 8 GPUs; add such nodes"):
        asyncio.run(dog.watch())
    assert clock.now == 60
