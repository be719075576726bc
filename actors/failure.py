"""Failure: what kind of thing went wrong, and so what is done about it. The one place that decides.

    kind             what failed                                      what follows
    infrastructure   a process, a node, an object: Ray's errors       again, elsewhere or later, within a budget
    data             a prompt, its logits, its reward                 the group is tried once more, then quarantined
    fatal            anything else: a defect or a mistake             the run ends and names the cause

- Data is decided where it shows: the producer that serves a prompt reports a `Fault`, whatever was raised.
- Infrastructure is told by Ray's error types. An actor's constructor that raises is none: it would raise again.
"""

import re
from enum import StrEnum

from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from common.errors import one_line

CAUSE_CHARACTERS = 500
DEATHS = (RayActorError, OutOfMemoryError)
"""What a call raises whose actor died or does not answer; the second when Ray itself killed it, to save the node."""
_OWN = re.compile(r"^common\.errors\.\w+: ")  # what these say needs no name


class FailureKind(StrEnum):
    """What is done about a failure follows from its kind."""

    INFRASTRUCTURE = "infrastructure"
    DATA = "data"
    FATAL = "fatal"


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of an error that a call to another actor, or a fetch of an object, raised."""
    if isinstance(error, RayTaskError):  # raised by living code; it may wrap another actor's death
        return FailureKind.FATAL
    if isinstance(error, RayActorError):
        return FailureKind.FATAL if error.actor_init_failed else FailureKind.INFRASTRUCTURE
    lost = (ObjectLostError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)
    return FailureKind.INFRASTRUCTURE if isinstance(error, lost) else FailureKind.FATAL


def comes_back(error: BaseException) -> bool:
    """Whether the actor that did not answer is being started again."""
    return isinstance(error, ActorUnavailableError) and not isinstance(error, RayTaskError)


def cause_line(error: BaseException) -> str:
    """What went wrong, in a line: the last one of what Ray passes on with a traceback, its own or another actor's."""
    traced = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    lines = str(error).strip().splitlines()
    return _OWN.sub("", lines[-1].strip())[:CAUSE_CHARACTERS] if traced and lines else one_line(error)
