"""Capacity: the learner's place, and who lacks a node."""

import asyncio

import pytest

from common.config_file import parse_config
from learner import capacity as capacity_module
from learner.capacity import Capacity
from learner.evaluation_fleet import EvaluationWorker
from learner.event_log import EventLog


def test_the_place_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[object] = []
    monkeypatch.setattr(capacity_module, "remove_placement_group", removed.append)
    capacity = Capacity(parse_config({"task": {"name": "sudoku"}}))
    capacity.release()
    assert removed == [], "a learner that reserves nothing has none"
    place = object()
    monkeypatch.setattr(capacity, "group", place)
    capacity.release()
    capacity.release()
    assert removed == [place]


def test_a_look_that_fails_is_told_once_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        capacity, events = Capacity(parse_config({"task": {"name": "sudoku"}})), EventLog()
        looked: list[int] = []

        async def look(fleet: object, evaluating: int | None) -> None:
            looked.append(len(looked))
            if looked[-1] in (1, 2):
                raise RuntimeError("the state of the cluster cannot be had")

        monkeypatch.setattr(capacity_module, "NODE_SECONDS", 0.0)
        monkeypatch.setattr(capacity, "look", look)
        looking = asyncio.create_task(capacity.keep_looking(lambda: None, lambda: None, events, lambda: None))
        while len(looked) < 6:
            await asyncio.sleep(0)
        looking.cancel()
        [(_, told)] = await events.after(0)
        assert told["text"] == "who waits for nodes cannot be seen: the state of the cluster cannot be had"

    asyncio.run(scenario())


def test_only_nodes_that_a_run_cannot_go_on_without_are_progress_when_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a run of which some actors wait, and the others hang, would never end."""

    async def scenario() -> int:
        capacity, events = Capacity(parse_config({"task": {"name": "sudoku"}})), EventLog()
        seen = iter([("", "2 actors"), ("", "2 actors"), ("the learner", "the learner"), ("", "2 actors"), ("", "")])
        progress: list[str] = []
        over = asyncio.Event()

        async def look(fleet: object, evaluating: int | None) -> None:
            if (found := next(seen, None)) is None:
                over.set()
            else:
                capacity.lacking, capacity.wanting = found

        monkeypatch.setattr(capacity_module, "NODE_SECONDS", 0.0)
        monkeypatch.setattr(capacity, "look", look)
        given = (lambda: None, lambda: None, events, lambda: progress.append("nodes"))
        looking = asyncio.create_task(capacity.keep_looking(*given))
        await over.wait()
        looking.cancel()
        return len(progress)

    assert asyncio.run(scenario()) == 1


def test_an_evaluation_of_which_no_worker_has_a_node_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_module, "unplaced", lambda *_: "")
    monkeypatch.setattr(capacity_module, "pending_of", lambda kind: 2 if kind == EvaluationWorker.__name__ else 0)
    monkeypatch.setattr(capacity_module, "why_waiting", lambda demand: f"waits for {demand}")
    capacity = Capacity(parse_config({"task": {"name": "sudoku"}}))
    told = "2 evaluation workers: each waits for 1 CPUs"
    for begun, lacking, wanting in ((None, "", ""), (0, told, told), (1, "", told)):
        asyncio.run(capacity.look(None, begun))
        assert (capacity.lacking, capacity.wanting) == (lacking, wanting)
