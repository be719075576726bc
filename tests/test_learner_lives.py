"""LearnerLives: which deaths are followed by another life."""

import asyncio

import pytest
from ray.exceptions import RayActorError, RayTaskError

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


def test_a_learner_may_die_so_many_times() -> None:
    async def scenario() -> None:
        events = EventLog()
        learner = lives(1, events)
        await learner.died(RayActorError(None, "killed"))
        assert learner.deaths == 1
        assert events.newest("warning")["text"].startswith("the learner died and is started again")
        with pytest.raises(RunError, match=r"died 2 times \(learner\.max_restarts=1\)"):
            await learner.died(RayActorError(None, "killed"))

    asyncio.run(scenario())
