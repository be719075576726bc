"""Ledger: which state every prompt group is in, and how it got there.

Contract:
- A group is in exactly one state. `TRANSITIONS` is the whole truth about how it may move; anything else raises
  `LedgerError` and changes nothing.
- Numbers are lease-order numbers: 0, 1, 2, ... given at the first lease and kept for good. A lost lease puts its group
  back at the head of the queue, because the queue is served lowest number first.
- Every change is one journal entry: the group's record after the change, a plain tuple that JSON carries.
  `Ledger.from_journal(entries)` walks the same table and ends in the identical ledger.
- A group is active from its first lease to a terminal state. Every operation costs O(1) or O(active); of a terminal
  group there remain one list slot and its journal entries.
- Trained is final for a learner that goes on. One that returns to an earlier checkpoint takes back what it trained
  since (`rewind`); what a durable checkpoint contains is settled (`settle`) and cannot be taken back.

Pure: knows nothing of Ray, clocks or payloads.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple


class GroupState(StrEnum):
    """Where a prompt group is between its first lease and its end."""

    QUEUED = "queued"
    LEASED = "leased"
    FINISHED = "finished"
    SAMPLED = "sampled"
    TRAINED = "trained"
    DISCARDED = "discarded"
    QUARANTINED = "quarantined"


# None stands for a group that has no number yet.
TRANSITIONS: dict[GroupState | None, frozenset[GroupState]] = {
    None: frozenset({GroupState.LEASED}),
    GroupState.QUEUED: frozenset({GroupState.LEASED}),
    # back to QUEUED: its actor died, its deadline passed, or its first failure on data
    GroupState.LEASED: frozenset({GroupState.FINISHED, GroupState.QUEUED, GroupState.QUARANTINED}),
    # back to QUEUED: its bytes were lost, as after a restart from a checkpoint
    GroupState.FINISHED: frozenset({GroupState.SAMPLED, GroupState.DISCARDED, GroupState.QUEUED}),
    # back to FINISHED: the learner died before it published
    GroupState.SAMPLED: frozenset({GroupState.TRAINED, GroupState.DISCARDED, GroupState.FINISHED}),
    # only by `rewind`: the learner returned to a checkpoint that does not contain its training
    GroupState.TRAINED: frozenset({GroupState.FINISHED}),
    GroupState.DISCARDED: frozenset(),
    GroupState.QUARANTINED: frozenset(),
}
TERMINAL = frozenset({GroupState.TRAINED, GroupState.DISCARDED, GroupState.QUARANTINED})
ACTIVE = frozenset(GroupState) - TERMINAL


class LedgerError(RuntimeError):
    """A move that the table does not allow, or a journal that does not replay: an invariant is broken."""


class GroupRecord(NamedTuple):
    """A group after its latest change; also the journal entry of that change."""

    number: int
    cursor: int
    """Index of the prompt in the task's stream."""
    state: GroupState
    attempt: int
    """Grows with each lease of the group; a lease is told from all others of its run by number and attempt."""
    worker: str
    deadline: float
    version: int
    """Policy version when the latest lease was granted."""
    reason: str
    tries: int
    """How often the group failed because of its data."""


class Ledger:
    """Starts empty, numbers groups as they are leased, and remembers every move until the run ends."""

    def __init__(self) -> None:
        self._states: list[GroupState] = []
        self._active: dict[int, GroupRecord] = {}
        self._members: dict[GroupState, set[int]] = {state: set() for state in ACTIVE}
        self._counts: Counter[GroupState] = Counter()
        self._discards: Counter[str] = Counter()
        self._quarantined: dict[int, str] = {}
        self._journal: list[GroupRecord] = []
        self._trained: dict[int, tuple[int, GroupRecord]] = {}  # that may be taken back; with the index of their entry
        self._settled = 0
        self.first_attempt = 1
        """Attempts start here: above those of leases that an earlier process may have granted unrecorded."""

    @classmethod
    def from_journal(cls, entries: Iterable[Sequence[Any]]) -> "Ledger":
        """The ledger that wrote `entries` (tuples, or lists as JSON gives them).

        Raises `LedgerError` naming the entry that is malformed or illegal.
        """
        ledger = cls()
        for index, entry in enumerate(entries):
            try:
                record = GroupRecord(*entry)
                record = record._replace(state=GroupState(record.state))
            except (TypeError, ValueError) as error:
                raise LedgerError(f"journal entry {index} is malformed: {entry!r} ({error})") from error
            ledger._append(record)
        return ledger

    # -- what it knows ------------------------------------------------------------------------------------------

    @property
    def next_number(self) -> int:
        """The number that the next fresh group will get; also how many were numbered so far."""
        return len(self._states)

    @property
    def active_count(self) -> int:
        """Groups with a number and no terminal state: the tickets in use."""
        return len(self._active)

    def head(self) -> int:
        """The oldest number still to finish: the lowest queued or leased one, else the next fresh one. O(active)."""
        waiting = (self._members[GroupState.QUEUED], self._members[GroupState.LEASED])
        return min((min(numbers) for numbers in waiting if numbers), default=self.next_number)

    def first_queued(self) -> int | None:
        """The head of the queue, None when the queue is empty. O(active)."""
        return min(self._members[GroupState.QUEUED], default=None)

    def numbers(self, state: GroupState) -> list[int]:
        """Sorted numbers of the groups in an active state. O(active log active)."""
        return sorted(self._members[state])

    def is_current(self, worker: str, number: int, attempt: int) -> bool:
        """Whether `attempt` of this group is leased to this worker now."""
        record = self._active.get(number)
        return (
            record is not None
            and record.state is GroupState.LEASED
            and (record.worker, record.attempt) == (worker, attempt)
        )

    def leased_to(self, worker: str) -> list[int]:
        """Sorted numbers of the groups that this worker holds now. O(active)."""
        return [number for number in self.numbers(GroupState.LEASED) if self._active[number].worker == worker]

    def overdue(self, now: float) -> list[int]:
        """Sorted numbers of the leases whose deadline has come. O(active)."""
        return [number for number in self.numbers(GroupState.LEASED) if self._active[number].deadline <= now]

    def next_deadline(self) -> float | None:
        """The nearest deadline among the leases, None when there are none. O(active)."""
        return min((self._active[number].deadline for number in self._members[GroupState.LEASED]), default=None)

    def state(self, number: int) -> GroupState | None:
        """The state of a group, None for a number that was never given out."""
        return self._states[number] if 0 <= number < len(self._states) else None

    def record(self, number: int) -> GroupRecord:
        """The record of an active group. Raises `LedgerError` for a terminal or unknown one."""
        try:
            return self._active[number]
        except KeyError:
            raise LedgerError(f"group {number} has no record: it is {self.state(number) or 'unknown'}") from None

    def counts(self) -> dict[GroupState, int]:
        """How many groups are in each state; the sum is `next_number`."""
        return {state: self._counts[state] for state in GroupState}

    def discards(self) -> dict[str, int]:
        """How many groups were discarded for each reason."""
        return dict(self._discards)

    def quarantined(self) -> list[tuple[int, str]]:
        """Numbers and reasons of the quarantined groups, in the order in which they were set aside."""
        return list(self._quarantined.items())

    @property
    def length(self) -> int:
        """Entries in the journal."""
        return len(self._journal)

    def active_below(self, number: int) -> int:
        """Active groups with a lower number. O(active)."""
        return sum(other < number for other in self._active)

    def unsettled(self) -> list[int]:
        """Sorted numbers of the trained groups that a rewind may bring back."""
        return sorted(self._trained)

    def needed_attempts(self) -> dict[int, int]:
        """Number -> attempt of every group whose bytes are needed: finished, sampled, or trained and unsettled."""
        needed = {
            number: self._active[number].attempt
            for state in (GroupState.FINISHED, GroupState.SAMPLED)
            for number in self._members[state]
        }
        return needed | {number: record.attempt for number, (_, record) in self._trained.items()}

    def journal(self, since: int = 0) -> list[tuple[Any, ...]]:
        """Entries from index `since` on; the caller counts what it has."""
        return [tuple(record) for record in self._journal[since:]]

    # -- moves --------------------------------------------------------------------------------------------------

    def lease(self, number: int, *, worker: str, deadline: float, version: int) -> GroupRecord:
        """queued -> leased, or a fresh group's birth when `number` is `next_number`."""
        old = self._active.get(number)
        if old is None:
            # _append refuses a number out of turn and a terminal group
            old = GroupRecord(number, number, GroupState.LEASED, 0, "", 0.0, 0, "", 0)
        return self._append(
            old._replace(
                state=GroupState.LEASED,
                attempt=max(old.attempt + 1, self.first_attempt),
                worker=worker,
                deadline=deadline,
                version=version,
            )
        )

    def renew(self, number: int, *, deadline: float) -> GroupRecord:
        """leased -> leased: the same lease with a later deadline."""
        if self.state(number) is not GroupState.LEASED:
            raise self._refusal(number, GroupState.LEASED)
        return self._append(self._active[number]._replace(deadline=deadline))

    def requeue(self, number: int, *, reason: str, data: bool = False) -> GroupRecord:
        """leased or finished -> queued; `data` counts one try against the group's own data."""
        tries = self._require(number, GroupState.QUEUED).tries + int(data)
        return self._move(number, GroupState.QUEUED, reason=reason, tries=tries, worker="")

    def finish(self, number: int) -> GroupRecord:
        """leased -> finished."""
        return self._move(number, GroupState.FINISHED)

    def sample(self, number: int) -> GroupRecord:
        """finished -> sampled."""
        return self._move(number, GroupState.SAMPLED)

    def unsample(self, number: int) -> GroupRecord:
        """sampled -> finished: the learner died before it published."""
        return self._move(number, GroupState.FINISHED)

    def train(self, number: int) -> GroupRecord:
        """sampled -> trained."""
        return self._move(number, GroupState.TRAINED)

    def rewind(self, index: int, *, reason: str) -> list[int]:
        """trained -> finished for every group that was trained by entry `index` or later; their numbers, sorted.

        Raises `LedgerError`, and changes nothing, for what is not a place to return to: a checkpoint that is too old,
        as some of them are settled, or one whose own groups were taken back since. O(journal).
        """
        if index < self._settled:
            raise LedgerError(f"the ledger cannot return to entry {index}: it is settled up to {self._settled}")
        contained: set[int] = set()
        for record in self._journal[:index]:
            (contained.add if record.state is GroupState.TRAINED else contained.discard)(record.number)
        abandoned = sorted({record.number for record in self._journal[index:]} & contained)
        if abandoned:
            raise LedgerError(
                f"the ledger cannot return to entry {index}: groups {abandoned} that were trained by then were taken "
                "back since, for a learner that returned to an earlier checkpoint"
            )
        numbers = sorted(number for number, (entry, _) in self._trained.items() if entry >= index)
        for number in numbers:
            self._append(self._trained[number][1]._replace(state=GroupState.FINISHED, reason=reason))
        return numbers

    def settle(self, index: int) -> list[int]:
        """A durable checkpoint contains what was trained before entry `index`: the numbers of which that is news."""
        numbers = [number for number, (entry, _) in self._trained.items() if entry < index]
        for number in numbers:
            del self._trained[number]
        self._settled = max(self._settled, index)
        return numbers

    def discard(self, number: int, *, reason: str) -> GroupRecord:
        """finished or sampled -> discarded."""
        return self._move(number, GroupState.DISCARDED, reason=reason)

    def quarantine(self, number: int, *, reason: str) -> GroupRecord:
        """leased -> quarantined: its own data broke the reward or the engine once too often."""
        tries = self._require(number, GroupState.QUARANTINED).tries + 1
        return self._move(number, GroupState.QUARANTINED, reason=reason, tries=tries)

    # -- the one place that writes ------------------------------------------------------------------------------

    def _move(self, number: int, to: GroupState, **changes: Any) -> GroupRecord:
        return self._append(self._require(number, to)._replace(state=to, **changes))

    def _require(self, number: int, to: GroupState) -> GroupRecord:
        record = self._active.get(number)
        if record is None or to not in TRANSITIONS[record.state]:
            raise self._refusal(number, to)
        return record

    def _append(self, record: GroupRecord) -> GroupRecord:
        number, before, after = record.number, self.state(record.number), record.state
        old = self._active.get(number)
        if before is GroupState.TRAINED and number not in self._trained:
            raise LedgerError(f"group {number} is trained and settled; nothing brings it back")
        renewed = (
            old is not None
            and before is after is GroupState.LEASED
            and (old.attempt, old.worker) == (record.attempt, record.worker)
        )
        if not renewed and after not in TRANSITIONS[before]:
            raise self._refusal(number, after)
        if before is None and number != self.next_number:
            raise LedgerError(f"group {number} cannot be leased: the next fresh number is {self.next_number}")
        if before is None:
            self._states.append(after)
        else:
            self._states[number] = after
            self._counts[before] -= 1
            self._members.get(before, set()).discard(number)
            self._trained.pop(number, None)
        self._counts[after] += 1
        if after in TERMINAL:
            del self._active[number]
            self._settle(record)
        else:
            self._active[number] = record
            self._members[after].add(number)
        self._journal.append(record)
        return record

    def _settle(self, record: GroupRecord) -> None:
        if record.state is GroupState.TRAINED:
            self._trained[record.number] = (len(self._journal), record)
        elif record.state is GroupState.DISCARDED:
            self._discards[record.reason] += 1
        elif record.state is GroupState.QUARANTINED:
            self._quarantined[record.number] = record.reason

    def _refusal(self, number: int, to: GroupState) -> LedgerError:
        before = self.state(number)
        allowed = ", ".join(sorted(TRANSITIONS[before])) or "nothing, it is terminal"
        return LedgerError(f"group {number} cannot go from {before or 'unknown'} to {to}; allowed: {allowed}")
