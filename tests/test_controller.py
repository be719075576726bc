"""Controller: what the gauges of a run make it do, without Ray."""

import asyncio
import errno
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from common.config_file import parse_config
from common.errors import RunError, UserError
from common.ledger import GroupState
from learner import controller as controller_module
from learner import learner_lives
from learner.buffer_gauges import MOST_QUARANTINED
from learner.controller import Controller
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
        return {
            **groups,
            "born": 0.0,
            "lost_before": 0.0,
            "expired_leases": 0.0,
            "no_spread_discards": 0.0,
            "lost_groups": self.lost,
        }

    def _quarantine(self) -> list[tuple[int, str]]:
        return self.failed


class Fleet:
    asked = wanted = working = 1

    def __init__(self) -> None:
        self.given_up: list[str] = []

    async def leave_drained_nodes(self) -> None: ...

    async def gauges(self) -> dict[str, float]:
        return {}


def sudoku(folder: Path, **sections: Any) -> Controller:
    return Controller(config=parse_config({"task": {"name": "sudoku"}, **sections}), directory=str(folder))


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return sudoku(tmp_path)


@pytest.fixture
def buffer(controller: Controller) -> Buffer:
    """The controller's; it has a fleet as well."""
    buffer = Buffer()
    controller._buffer, controller._fleet = buffer, Fleet()  # pyright: ignore[reportAttributeAccessIssue]
    return buffer


async def test_failures_in_a_row_end_the_run_and_failures_between_results_do_not(
    tmp_path: Path, controller: Controller, buffer: Buffer
) -> None:
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


async def test_groups_that_fail_at_once_are_one_event(controller: Controller, buffer: Buffer) -> None:
    for groups in (1, 2, 0):
        buffer.fail(groups)
        await controller._update_gauges()
    told = [values["quarantined"] for kind, values in await controller.events(0) if kind == "quarantine"]
    assert told == [1, 3]


async def test_a_buffer_that_was_started_anew_may_have_no_group_that_failed(
    tmp_path: Path, controller: Controller, buffer: Buffer
) -> None:
    buffer.fail(1)
    failed, buffer.failed = buffer.failed, []
    await controller._update_gauges()
    assert not (tmp_path / "quarantine.json").exists()
    buffer.failed = failed
    await controller._update_gauges()
    assert [kind for kind, _ in await controller.events(0)] == ["quarantine"]


async def test_actors_that_are_given_up_are_told_once_each(controller: Controller, buffer: Buffer) -> None:
    assert controller._fleet is not None
    for name in ("rollout-0.3", "rollout-1.3"):
        controller._fleet.given_up.append(f"{name}: killed")
        await controller._update_gauges()
        await controller._update_gauges()
    told = [values["text"] for kind, values in await controller.events(0) if kind == "warning"]
    assert [text.rpartition("; ")[2] for text in told] == ["rollout-0.3: killed", "rollout-1.3: killed"]


async def test_bytes_that_are_lost_are_told_once(controller: Controller, buffer: Buffer) -> None:
    for lost in (0.0, 3.0, 3.0):
        buffer.lost = lost
        await controller._update_gauges()
    [text] = [values["text"] for kind, values in await controller.events(0) if kind == "warning"]
    assert text.startswith("the bytes of 3 groups that were finished are in no file")


async def test_a_stop_while_the_learner_starts_is_no_death_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    monkeypatch.setattr(learner_lives, "LearnerRanks", Ranks)
    monkeypatch.setattr(controller_module.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    controller = sudoku(tmp_path, metrics={"port": -1})
    monkeypatch.setattr(controller._capacity, "reserve", lambda: None)
    running = asyncio.create_task(controller.run())
    while not Ranks.made:
        await asyncio.sleep(0.01)
    await controller.stop("SIGTERM")
    summary = await running
    await asyncio.sleep(0.1)
    events = await controller.events(0)
    assert summary["stopped"] == "SIGTERM"
    assert [kind for kind, _ in events] == ["phase", "signal", "phase", "summary"]
    assert events[1][1] == {"name": "SIGTERM", "phase": "warm_start"}
    assert Ranks.made == 1


async def test_training_that_ends_early_is_never_a_finished_run(
    monkeypatch: pytest.MonkeyPatch, controller: Controller
) -> None:
    async def nothing() -> None: ...

    async def train() -> dict[str, float]:
        return {"steps": 3.0, "version": 3.0}

    monkeypatch.setattr(controller._capacity, "reserve", lambda: None)
    monkeypatch.setattr(controller._learner, "start", nothing)
    monkeypatch.setattr(controller, "_train", train)
    most = controller.config.learner.steps
    with pytest.raises(RunError, match=f"training ended after 3 of {most} steps"):
        await controller.run()
    assert await controller.until_ended() == "failed"


async def test_a_run_that_is_stopped_before_it_trains_again_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, controller: Controller
) -> None:
    controller._checkpoints.begin(40).commit(version=40, journal_index=0)
    monkeypatch.setattr(controller._capacity, "reserve", lambda: None)
    monkeypatch.setattr(controller._learner, "start", asyncio.Event().wait)
    running = asyncio.create_task(controller.run())
    while controller._phase != "warm_start":
        await asyncio.sleep(0)
    await controller.stop("SIGINT")
    assert await running == {"stopped": "SIGINT", "steps": 40.0, "version": 40.0}
    assert await controller.until_ended() == "stopped"


async def test_a_run_whose_plot_finds_no_room_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: Controller
) -> None:
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
    controller._checkpoints.begin(2).commit(version=2, journal_index=0)
    with monkeypatch.context() as patched:
        patched.setattr("learner.pareto.draw_pareto", full)
        with pytest.raises(OSError, match="No space left"):
            await controller._evaluate(2)
    assert RunDirectory(tmp_path).finished_steps() is None, "else --resume would refuse to draw it"
    monkeypatch.setattr("learner.pareto.draw_pareto", lambda *_, **__: b"")
    await controller._evaluate(2)
    assert RunDirectory(tmp_path).finished_steps() == 2


@pytest.mark.parametrize(("end", "missed"), [("finished", False), ("stopped", False), ("failed", True)])
async def test_a_run_that_ends_as_it_should_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, missed: bool
) -> None:
    """Its target goes; that of a run that failed stays, so that Prometheus sees an endpoint that does not answer."""
    run = tmp_path / "first"
    run.mkdir()
    controller = sudoku(run)
    monkeypatch.setattr(controller_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")

    async def work() -> dict[str, Any]:
        await controller._metrics.open_endpoint({})
        assert (tmp_path / "_targets" / "first.json").exists()
        if end == "failed":
            raise RunError("something went wrong")
        await controller._enter(end)
        return {}

    monkeypatch.setattr(controller, "_work", work)
    with pytest.raises(RunError, match="something went wrong") if missed else nullcontext():
        await controller.run()
    assert (tmp_path / "_targets" / "first.json").exists() == missed


async def test_a_target_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_targets").write_text("another's")
    (run := tmp_path / "first").mkdir()
    controller = sudoku(run)
    monkeypatch.setattr(controller_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")

    async def work() -> dict[str, Any]:
        await controller._metrics.open_endpoint({})
        await controller._enter("finished")
        return {}

    monkeypatch.setattr(controller, "_work", work)
    await controller.run()
    [told] = [values["text"] for kind, values in await controller.events(0) if kind == "warning"]
    assert re.match(r"Prometheus will not find 127\.0\.0\.1:\d+ by itself: .*_targets", told)


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
async def test_a_number_of_actors_that_cannot_be_is_refused(tmp_path: Path, actors: int, said: str) -> None:
    controller = sudoku(tmp_path, rollout={"actors": 2, "min_actors": 2, "max_actors": 4})
    with pytest.raises(UserError, match=said):
        await controller.scale(actors)
