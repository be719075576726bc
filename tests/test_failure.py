"""The kind of each failure, and which actors come back."""

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.failure import FailureKind, cause_line, comes_back, failure_kind
from common.errors import RunError, UserError

INFRASTRUCTURE, FATAL = FailureKind.INFRASTRUCTURE, FailureKind.FATAL
OBJECT = "00" * 28
UNAVAILABLE = ActorUnavailableError("its process ended", b"\0" * 16)


def dead(*, at_start: bool = False) -> RayActorError:
    error = RayActorError()
    error._actor_init_failed = at_start  # as Ray sets it when a constructor raised
    return error


def raised_by_living_code(cause: Exception) -> Exception:
    """As Ray hands it out: a task error that is also of its cause's type."""
    return RayTaskError("run", "a traceback", cause).as_instanceof_cause()


TABLE = [
    (dead(), INFRASTRUCTURE, False),
    (ActorDiedError(), INFRASTRUCTURE, False),
    (UNAVAILABLE, INFRASTRUCTURE, True),
    (ObjectLostError(OBJECT, "an owner", "a call"), INFRASTRUCTURE, False),
    (OwnerDiedError(OBJECT, "an owner", "a call"), INFRASTRUCTURE, False),
    (WorkerCrashedError(), INFRASTRUCTURE, False),
    (NodeDiedError("its node ended"), INFRASTRUCTURE, False),
    (LocalRayletDiedError(), INFRASTRUCTURE, False),
    (OutOfMemoryError("too much"), INFRASTRUCTURE, False),
    (dead(at_start=True), FATAL, False),
    (RayTaskError("run", "a traceback", ValueError("no")), FATAL, False),
    (raised_by_living_code(ValueError("no")), FATAL, False),
    (raised_by_living_code(dead()), FATAL, False),
    (raised_by_living_code(UNAVAILABLE), FATAL, False),
    (GetTimeoutError("late"), FATAL, False),
    (RuntimeError("a defect"), FATAL, False),
    (UserError("a mistake"), FATAL, False),
    (RunError("a failed run"), FATAL, False),
    (MemoryError(), FATAL, False),
]


@pytest.mark.parametrize(("error", "kind", "back"), TABLE, ids=lambda value: type(value).__name__)
def test_each_failure_has_one_kind(error: Exception, kind: FailureKind, back: bool) -> None:
    assert failure_kind(error) is kind
    assert comes_back(error) is back


def test_an_error_of_living_code_is_of_its_causes_type_too() -> None:
    """Why `comes_back` does not look at the type alone."""
    assert isinstance(raised_by_living_code(UNAVAILABLE), ActorUnavailableError)


TRACEBACK = (
    'ray::ReplayBuffer.__init__() (pid=7)\n  File "a.py", line 1\n    ^^^^^^^\n'
    "common.errors.RunError: segment 3 is damaged; restore it from a copy\n"
)


def test_the_cause_of_a_dead_actor_is_the_end_of_its_traceback() -> None:
    raised = RayTaskError("__init__", TRACEBACK, RunError("segment 3 is damaged; restore it from a copy"))
    at_start = ActorDiedError(raised)
    seen_by_the_learner = RayTaskError("run", f"ray::LearnerActor.run()\n{at_start}", at_start).as_instanceof_cause()
    for error in (raised, at_start, seen_by_the_learner):
        assert cause_line(error) == "segment 3 is damaged; restore it from a copy"
    assert cause_line(RayActorError(error_msg="it died:\n\tits worker was killed")) == "it died: its worker was killed"
    assert cause_line(RunError("a failed run")) == "a failed run"
