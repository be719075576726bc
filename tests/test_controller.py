"""Controller: what the gauges of a run make it do, without Ray."""

import asyncio
import errno
import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from common.config_file import parse_config
from common.errors import RunError, UserError
from common.ledger import GroupState
from common.tasks import Example
from learner import controller as controller_module
from learner.controller import MOST_QUARANTINED, Controller
from learner.run_directory import RunDirectory


class Buffer:
    """Answers as the buffer's handle does."""

    def __init__(self) -> None:
        self.groups = {str(state): 0 for state in GroupState}
        self.failed: list[tuple[int, str]] = []
        self.lost = 0.0

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            async def remote() -> Any:
                return getattr(self, f"_{name}")()

        return Method

    def fail(self, groups: int) -> None:
        self.failed += [(number, "Traceback ...\nValueError: no number") for number in range(groups)]
        self.groups["quarantined"] += groups

    def _gauges(self) -> dict[str, float]:
        groups = {f"groups_{state}": float(count) for state, count in self.groups.items()}
        return {**groups, "expired_leases": 0.0, "no_spread_discards": 0.0, "lost_groups": self.lost}

    def _quarantine(self) -> list[tuple[int, str]]:
        return self.failed


class Fleet:
    wanted = working = 1

    async def leave_drained_nodes(self) -> None: ...

    async def gauges(self) -> dict[str, float]:
        return {}


def test_failures_in_a_row_end_the_run_and_failures_between_results_do_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
        buffer = Buffer()
        controller._buffer, controller._fleet = buffer, Fleet()  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(3):
            buffer.fail(MOST_QUARANTINED - 1)
            await controller._update_gauges()
            buffer.groups["trained"] += 8
            await controller._update_gauges()
        assert len(json.loads((tmp_path / "quarantine.json").read_text())) == 3 * (MOST_QUARANTINED - 1)
        buffer.fail(MOST_QUARANTINED - 1)
        await controller._update_gauges()
        buffer.fail(1)
        with pytest.raises(RunError, match=r"100 groups in a row failed.*the last: ValueError: no number"):
            await controller._update_gauges()

    asyncio.run(scenario())


def test_a_quarantined_example_may_hold_what_json_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dated:
        def example(self, split: str, index: int) -> Example:
            return Example("when?", {"answer": date(2026, 1, 1)}, 1.0)

    async def scenario() -> None:
        monkeypatch.setattr(controller_module, "build_task", lambda _: Dated())
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
        buffer = Buffer()
        controller._buffer, controller._fleet = buffer, Fleet()  # pyright: ignore[reportAttributeAccessIssue]
        buffer.fail(1)
        await controller._update_gauges()
        buffer.fail(2)
        await controller._update_gauges()
        told = [values["quarantined"] for kind, values in await controller.events(0) if kind == "quarantine"]
        assert told == [1, 3], "one event for all that were quarantined at once, so it says how many there are"

    asyncio.run(scenario())
    [kept, *_] = json.loads((tmp_path / "quarantine.json").read_text())
    assert kept["example"] == {"prompt": "when?", "fields": {"answer": "2026-01-01"}, "difficulty": 1.0}


def test_bytes_that_are_lost_are_told_once(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
        buffer = Buffer()
        controller._buffer, controller._fleet = buffer, Fleet()  # pyright: ignore[reportAttributeAccessIssue]
        for lost in (0.0, 3.0, 3.0):
            buffer.lost = lost
            await controller._update_gauges()
        return [values["text"] for kind, values in await controller.events(0) if kind == "warning"]

    [text] = asyncio.run(scenario())
    assert text.startswith("the bytes of 3 groups that were finished are in no file")


def test_an_evaluation_that_stands_still_says_what_its_workers_did(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = parse_config({"task": {"name": "sudoku"}, "run": {"stall_timeout": 0.5}})
        controller = Controller(config=config, directory=str(tmp_path))
        await controller._enter("evaluate")
        watchdog = asyncio.create_task(controller._watch())
        for done in range(5):
            await asyncio.sleep(0.2)
            await controller.evaluating(1, f"after: learned, greedy: {done} of 64 rewards")
        assert not watchdog.done(), "what gets on, though slowly, is let be"
        await watchdog

    with pytest.raises(RunError, match=r"phase evaluate .*evaluation workers.*learned, greedy: 4 of 64 rewards"):
        asyncio.run(scenario())


def test_an_example_that_cannot_be_made_is_quarantined_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def example(self, split: str, index: int) -> Example:
            raise KeyError("question")

    async def scenario() -> None:
        monkeypatch.setattr(controller_module, "build_task", lambda _: Broken())
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
        buffer = Buffer()
        controller._buffer, controller._fleet = buffer, Fleet()  # pyright: ignore[reportAttributeAccessIssue]
        buffer.fail(1)
        await controller._update_gauges()

    asyncio.run(scenario())
    [kept] = json.loads((tmp_path / "quarantine.json").read_text())
    assert (kept["example"], kept["reason"].splitlines()[-1]) == (None, "ValueError: no number")


def test_a_learner_that_cannot_start_is_named_as_that(tmp_path: Path) -> None:
    controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
    text = "Traceback ...\ncommon.errors.UserError: task.reward=a:b cannot be imported"
    error = RayActorError(None, text, actor_init_failed=True)
    with pytest.raises(RunError, match=r"^the learner cannot start: .*task\.reward=a:b cannot be imported"):
        asyncio.run(controller._learner_died(error))


def test_a_stop_while_the_learner_starts_is_no_death_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks:
        made = 0

        def __init__(self, *_: Any) -> None:
            Ranks.made += 1
            self.killed = asyncio.Event()

        async def warm_start(self) -> None:
            await self.killed.wait()
            raise RayActorError(None, "killed by ray.kill")

        def kill(self) -> None:
            self.killed.set()

    async def scenario() -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        config = parse_config({"task": {"name": "sudoku"}, "metrics": {"port": -1}})
        monkeypatch.setattr(controller_module, "LearnerRanks", Ranks)
        monkeypatch.setattr(controller_module.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))
        controller = Controller(config=config, directory=str(tmp_path))
        monkeypatch.setattr(controller._capacity, "reserve", lambda: None)
        running = asyncio.create_task(controller.run())
        await asyncio.sleep(0.1)
        await controller.stop("SIGTERM")
        summary = await running
        await asyncio.sleep(0.1)
        return summary, await controller.events(0)

    summary, events = asyncio.run(scenario())
    assert summary["stopped"] == "SIGTERM"
    assert [kind for kind, _ in events] == ["phase", "signal", "phase", "summary"]
    assert events[1][1] == {"name": "SIGTERM", "phase": "warm_start"}
    assert Ranks.made == 1


def test_a_run_whose_plot_finds_no_room_has_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evaluated:
        def __init__(self, *_: Any) -> None: ...

        async def on_ray(self, **_: Any) -> dict[str, Any]:
            return {}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("learner.final_evaluation.Evaluation", Evaluated)
    monkeypatch.setattr("learner.final_evaluation.summarise", lambda *_: {"area": {}})
    monkeypatch.setattr("learner.evaluation_fleet.room_for_workers", lambda _: 1)
    monkeypatch.setattr(controller_module.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))

    async def scenario() -> None:
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))
        controller._checkpoints.begin(2).commit(version=2, journal_index=0)
        with monkeypatch.context() as patched:
            patched.setattr("learner.pareto.draw_pareto", full)
            with pytest.raises(OSError, match="No space left"):
                await controller._evaluate(2)
        assert RunDirectory(tmp_path).finished_steps() is None, "else --resume would refuse to draw it"
        monkeypatch.setattr("learner.pareto.draw_pareto", lambda *_, **__: b"")
        await controller._evaluate(2)
        assert RunDirectory(tmp_path).finished_steps() == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(("end", "missed"), [("finished", False), ("stopped", False), ("failed", True)])
def test_a_run_that_ends_as_it_should_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, missed: bool
) -> None:
    """Its target goes; that of a run that failed stays, so that Prometheus sees an endpoint that does not answer."""

    async def scenario() -> None:
        config = parse_config({"task": {"name": "sudoku"}})
        run = tmp_path / "first"
        run.mkdir()
        controller = Controller(config=config, directory=run)
        monkeypatch.setattr(controller_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")

        async def work() -> dict[str, Any]:
            await controller._export()
            assert (tmp_path / "_targets" / "first.json").exists()
            if end == "failed":
                raise RunError("something went wrong")
            await controller._enter(end)
            return {}

        monkeypatch.setattr(controller, "_work", work)
        await controller.run()

    if missed:
        with pytest.raises(RunError, match="something went wrong"):
            asyncio.run(scenario())
    else:
        asyncio.run(scenario())
    assert (tmp_path / "_targets" / "first.json").exists() == missed


@pytest.mark.parametrize(
    ("actors", "said"),
    [
        (-1, "a run needs at least 1"),
        (0, "a run needs at least 1"),
        (501, "can have 500"),
        (1, r"between rollout\.min_actors=2 and rollout\.max_actors=4"),
        (5, r"between rollout\.min_actors=2 and rollout\.max_actors=4"),
        (3, "rollout actors are there in phase train only"),
    ],
)
def test_a_number_of_actors_that_cannot_be_is_refused(tmp_path: Path, actors: int, said: str) -> None:
    rollout = {"actors": 2, "min_actors": 2, "max_actors": 4}
    controller = Controller(
        config=parse_config({"task": {"name": "sudoku"}, "rollout": rollout}), directory=str(tmp_path)
    )
    with pytest.raises(UserError, match=said):
        asyncio.run(controller.scale(actors))
