"""Watchdog: when a run is ended, and what is said then."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import RunError
from learner import watchdog as watchdog_module
from learner.run_directory import RunDirectory
from learner.watchdog import Watchdog


def test_what_gets_on_slowly_is_let_be_and_what_stands_still_says_who_waits(tmp_path: Path) -> None:
    doing = {}

    async def who_waits() -> dict[str, Any]:
        return {"phase": "evaluate", "evaluation workers": doing}

    async def scenario() -> None:
        config = RunConfig(stall_timeout=0.5)
        dog = Watchdog(config, RunDirectory(tmp_path), lacking=lambda: "", who_waits=who_waits)
        dog.untrainable = ": 7 groups were discarded"
        watch = asyncio.create_task(dog.watch())
        for done in range(5):
            await asyncio.sleep(0.2)
            doing[1] = f"after: learned, greedy: {done} of 64 rewards"
            dog.mark()
        assert not watch.done()
        await watch

    with pytest.raises(RunError, match=r"phase evaluate .*: 7 groups were discarded; .*greedy: 4 of 64 rewards"):
        asyncio.run(scenario())
    left = json.loads((tmp_path / "stall.json").read_text())
    assert left["evaluation workers"] == {"1": "after: learned, greedy: 4 of 64 rewards"}


def test_a_lack_of_nodes_has_its_own_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "NODE_SECONDS", 0.05)

    async def nobody() -> dict[str, Any]:
        raise AssertionError("nobody is asked: it is known what is lacking")

    async def scenario() -> None:
        config = RunConfig(stall_timeout=0.1, capacity_timeout=0.6)
        dog = Watchdog(config, RunDirectory(tmp_path), lacking=lambda: "the learner: 8 GPUs", who_waits=nobody)
        watch = asyncio.create_task(dog.watch())
        await asyncio.sleep(0.4)
        assert not watch.done()
        await watch

    with pytest.raises(RunError, match=r"capacity_timeout=0\.6\): the learner: 8 GPUs; add such nodes"):
        asyncio.run(scenario())
