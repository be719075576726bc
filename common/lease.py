"""Lease: one prompt handed to one actor, and the messages about it between actors, replay buffer and learner."""

from dataclasses import dataclass
from typing import Any

from common.errors import RunError
from common.weight_store import Snapshot


class RejoinFirst(RunError):
    """The buffer was started anew and does not know what the learner did since: it shall `rejoin` and call again."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One prompt handed to one actor: `cursor` finds the prompt, no token may be older than `version`."""

    number: int
    cursor: int
    attempt: int
    version: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """`closed`: this worker is granted no more, as the run ends or it is drained; no leases while that is false means
    that the worker was returned meanwhile."""

    leases: list[Lease]
    snapshot: Snapshot
    closed: bool


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """The completions of one lease: `spread` of their costed rewards, `oldest_version` among their tokens.

    `reward` (without cost) and `nfe` are means over the completions.
    """

    number: int
    attempt: int
    payload: bytes
    spread: float
    oldest_version: int
    completions: int
    reward: float = 0.0
    nfe: float = 0.0


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """Numbers that were accepted, numbers that came late, and the newest weights."""

    accepted: list[int]
    late: list[int]
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class RenewReply:
    """`lost`, by number and attempt, are no longer this worker's: it stops generating them. And the newest weights."""

    lost: list[tuple[int, int]]
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Sample:
    """One step's groups by ascending number; no numbers once the buffer is closed.

    `generated` are the means over the groups accepted lately, a step's worth or more, those discarded for lack of
    spread included: a batch alone looks harder than the prompts are.

    `seconds` of each group are those from its lease to its hand-in; NaN where the buffer was started anew meanwhile.

    `version` is the learner's version when this batch is trained: a batch sampled before it counts as published.
    """

    numbers: list[int]
    payloads: list[bytes]
    version: int
    staleness: list[int]
    seconds: list[float]
    generated: dict[str, float]


@dataclass(frozen=True, slots=True)
class Export:
    """The buffer's part of a checkpoint: the journal up to `journal_index`, and the finished groups that are untrained.

    `journal` is an Arrow file (`common.journal`), `groups` a segment file (`common.segment_folder`); `facts` go into
    the manifest.
    """

    journal_index: int
    journal: bytes
    groups: bytes
    facts: dict[str, Any]
