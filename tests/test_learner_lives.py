"""LearnerLives: which deaths are followed by another life."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from common.config_file import parse_config
from common.errors import RunError
from learner.capacity import Capacity
from learner.event_log import EventLog
from learner.learner_lives import LearnerLives
from learner.parts import POLICY


def lives(most: int, events: EventLog) -> LearnerLives:
    config = parse_config({"task": {"name": "sudoku"}, "learner": {"max_restarts": most}})
    return LearnerLives(config, "runs/none", POLICY, Capacity(config), events, progress=lambda: None)


def test_a_learner_that_cannot_start_is_named_as_that() -> None:
    text = "Traceback ...\ncommon.errors.UserError: task.reward=a:b cannot be imported"
    error = RayActorError(None, text, actor_init_failed=True)
    with pytest.raises(RunError, match=r"^the learner cannot start: .*task\.reward=a:b cannot be imported"):
        asyncio.run(lives(3, EventLog()).died(error))


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        (True, r"^the replay buffer died .*replay\.max_restarts=10\): "),
        (False, "^the replay buffer cannot start: segment a is damaged"),
    ],
)
def test_the_death_of_the_buffer_that_a_learner_saw_is_the_buffers(starts: bool, told: str) -> None:
    cause = RayActorError(None, "killed", actor_init_failed=not starts)
    text = "Traceback ...\ncommon.errors.RunError: segment a is damaged"
    error = RayTaskError("run", text, cause).as_instanceof_cause()
    assert isinstance(error, RayActorError)
    with pytest.raises(RunError, match=told):
        asyncio.run(lives(3, EventLog()).died(error))


@pytest.mark.parametrize("error", [RayActorError(None, "killed"), OutOfMemoryError("the node was low on memory")])
def test_a_learner_may_die_so_many_times(error: RayError) -> None:
    async def scenario() -> None:
        events = EventLog()
        learner = lives(1, events)
        await learner.died(error)
        assert learner.deaths == 1
        assert events.newest("warning")["text"].startswith("the learner died and is started again")
        with pytest.raises(RunError, match=r"died 2 times \(learner\.max_restarts=1\)"):
            await learner.died(error)

    asyncio.run(scenario())


@pytest.mark.parametrize("stopped", [False, True])
def test_no_other_learner_is_waited_for_once_the_run_is_stopped(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node may never come. `ray.kill` and Ray's own memory monitor raise different errors."""
    ended: list[Any] = [{"steps": 3.0}, OutOfMemoryError("low"), RayActorError(None, "killed")]

    class Ranks:
        async def run(self, buffer: Any) -> dict[str, float]:
            if isinstance(result := ended.pop(), Exception):
                raise result
            return result

    async def scenario() -> dict[str, float] | None:
        learner = lives(3, EventLog())

        async def start() -> Any:
            return Ranks()

        async def unless_stopped(another: Awaitable[Any]) -> Any:
            found = await another
            return None if stopped else found

        monkeypatch.setattr(learner, "start", start)
        return await learner.learn(None, unless_stopped)

    assert asyncio.run(scenario()) == (None if stopped else {"steps": 3.0})
    assert len(ended) == (2 if stopped else 0)
