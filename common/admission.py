"""Admission: how many groups may be out, which finished ones the learner may take, and which are given up.

    policy            tickets B       window W     bound on staleness     gives up
    windowed_fifo     see below       see below    (B + W - 2) // P       nothing
    strict_fifo       (eta + 1) P     1            eta                    nothing
    aggregate_lead    (eta + 1) P     none         none                   nothing
    drop_when_stale   2 (eta + 1) P   none         eta, by dropping       finished groups that are older

`eta` is `replay.max_staleness`. The first is the default, the others are there to be compared with it (`diffpo bench
async`): aggregate_lead is AReaL's rule (arXiv 2505.24298, "total lead <= eta"), drop_when_stale that of systems which
filter by age when they sample. In Reverb's terms (arXiv 2102.04736) all have samples per insert 1, a minimum size to
sample of P, and an error buffer of B.

Words: `P` groups per step, `B` tickets, window `W`. *Head* is the oldest number that is still to finish (queued or
leased; the next fresh number when none is).

Contract of windowed FIFO:
- A ticket is charged when a group is leased for the first time. It is freed only after the group was trained *and* the
  new weights were published, or at once when the group was discarded or quarantined. A group whose lease was lost keeps
  its ticket and its number, and the queue is served lowest number first, before any fresh number.
- The learner takes groups lowest number first, exactly `P` a step, each numbered below `head + W`. This is the rule
  "take any finished group among the `W` numbers from the oldest untaken one, and repeat": while lowest-first taking
  goes on, the oldest untaken group is itself finished until the one that is still to finish is reached.
- A lease carries the version at its grant and no token of the group is revealed with older weights.

Bound: `staleness <= (B + W - 2) // P` for every group that is trained.

Proof. Let group `x` be trained from a lease granted at version `v`, in a step that starts at version `v'`. Its tokens
are of version `v` or later, so its staleness is at most `v' - v`. Each publication in between ends one step and
consumes at least `P` groups other than `x`; as the ticket of a group is freed at the publication that ends its step,
these groups still held their tickets, or had no number yet, when the lease was granted. Count them by number:
- below `x`: numbers are given in order, so they held a ticket then. At most `B - 1`, since `x` holds one too.
- above `x`: they were taken before `x`. Taking is lowest first, so `x` was not finished then, hence `head <= x` and
  their numbers are below `x + W`. At most `W - 1`.
So `P * (v' - v) <= B + W - 2`. A group that was leased again has only tokens of its last lease, and the count above is
made from that grant; one that is discarded leaves the counts as they are or smaller. QED.

A step may consume more than `P`, so long as the learner never returns to a checkpoint.

*Rewinds (ours).* A learner that returns to a checkpoint forgets what it trained since. These groups are finished again,
with the tokens they had, and hold tickets again: `P` for each step lost, on top of `B`. What is added to the contract:
- Staleness counts learner steps (`common.version`), and each step consumes exactly `P` groups.
- All leases are void at a rewind and their groups are queued: tokens of the version to come may be of a lower step
  than that of the grant.
- A group is leased, for the first time or again, only while fewer than `B` active groups are numbered below it.

The bound is the same. Let `x` be trained from a lease granted at step `s` of whichever lineage, in a step that starts
at step `s'` of lineage `L`. No rewind came between that grant and the moment `x` finished, else its lease had been
void, so its tokens are of steps `s` or later. When `L` starts that step, its parameters contain `s' P` groups other
than `x`. Each of them, at the grant of `x`, was
- trained. At most `s P`, as the learner of then contained no more;
- active and below `x`. At most `B - 1`, by the rule for leases;
- else above `x`, active or without a number, and trained by the lineage of `L` after the grant. (None was discarded or
  quarantined, as that is final; none below `x` was without a number.) It was sampled when `x` was not finished: from
  the moment `x` finishes it is finished or sampled, through all rewinds, until it is trained or its lineage abandoned,
  and lowest first takes it before any that is above, in each lineage. So `head <= x` then, and its number is below
  `x + W`. At most `W - 1`.
So `P s' <= P s + B + W - 2`. A group that is leased again, as its bytes were lost, is counted from its last grant. QED.

Two things must not be undone when a buffer dies, or the last item fails: that a rewind made the leases void, and that a
batch was set aside (it would come back after others had overtaken it). Both are in a file before they are answered.

The other policies: strict FIFO is the case `W = 1`. drop_when_stale keeps its bound by looking at each step, whatever
came before; a group dropped as stale is not missed when the learner is back at an earlier step. aggregate_lead promises
no bound.

No deadlock while actors produce: suppose that no step is under way and no lease may be granted. Then `B` groups are out
and all will finish; then the head is a fresh number, every one of them may be taken, and `B >= P` of them are there.
After a rewind: let `q` be the lowest queued group and `B` or more active ones be below it. They will finish; then the
head is `q`, all of them may be taken, and so it goes on until fewer than `B` are below `q`.

A window counted over the `W` oldest untrained groups, instead of in numbers, has no bound: one slow group is overtaken
for ever. Freeing tickets at sampling breaks it as well. `tests/test_admission.py` shows both.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from common.errors import UserError


class Admission(Protocol):
    """A policy that decides what may be leased, what may be trained, and what is given up."""

    @property
    def staleness_bound(self) -> int | None:
        """The staleness that no trained group exceeds; None where nothing is promised."""
        ...

    def admit(self, outstanding: int) -> bool:
        """Whether a number may be leased while `outstanding` groups below it hold a ticket."""
        ...

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        """The numbers of the next step, ascending, or none: `finished` is sorted, `head` is still to finish."""
        ...

    def evict(self, staleness: Mapping[int, int]) -> list[int]:
        """The finished groups to discard, given the staleness that each would have in the next step."""
        ...


class WindowedFifo:
    """Lives as long as its buffer and keeps nothing: `P`, `B` and `W` are all it is."""

    def __init__(self, *, groups_per_step: int, tickets: int, window: int) -> None:
        """Raises `UserError` for values that would deadlock or mean nothing."""
        if groups_per_step < 1:
            raise UserError(f"groups_per_step is {groups_per_step}; a step needs at least 1 group")
        if tickets < groups_per_step:
            raise UserError(
                f"{tickets} tickets cannot fill a step of {groups_per_step} groups, the learner would wait for ever; "
                f"give at least {groups_per_step} tickets or lower groups_per_step"
            )
        if window < 1:
            raise UserError(f"window is {window}; at least 1 (strict FIFO) is needed for the learner to take anything")
        if window > tickets:
            raise UserError(f"window is {window} but only {tickets} groups can be out at once; give at most {tickets}")
        self.groups_per_step = groups_per_step
        self.tickets = tickets
        self.window = window

    @classmethod
    def for_staleness(cls, *, groups_per_step: int, max_staleness: int) -> "WindowedFifo":
        """How `(eta + 1) P + 1 = B + W` is split; what others gain is modelled (`diffpo bench async`, `splits`).

        Up to 2 all of it goes into tickets (0 is synchronous, 1 and 2 are strict FIFO): a window is paid for with
        tickets, and with few of them the fleet waits. From 3 on a window of a quarter of a step costs next to nothing
        and lets the learner pass a slow group.
        """
        _check(max_staleness)
        window = 1 if max_staleness < 3 else groups_per_step // 4 + 1
        tickets = (max_staleness + 1) * groups_per_step + 1 - window
        return cls(groups_per_step=groups_per_step, tickets=tickets, window=window)

    @property
    def staleness_bound(self) -> int:
        """`(B + W - 2) // P`; the proof is in the module's docstring."""
        return (self.tickets + self.window - 2) // self.groups_per_step

    def admit(self, outstanding: int) -> bool:
        """A fresh number needs a free ticket."""
        return outstanding < self.tickets

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        """The `P` lowest finished numbers below `head + W`, or none while there are fewer."""
        batch = [number for number in finished[: self.groups_per_step] if number < head + self.window]
        return batch if len(batch) == self.groups_per_step else []

    def evict(self, staleness: Mapping[int, int]) -> list[int]:
        """Nothing: what is generated within the bound stays within it."""
        return []


class StrictFifo(WindowedFifo):
    """Windowed FIFO with a window of 1: groups are trained in the order of their numbers, the slowest holds up all."""

    @classmethod
    def for_staleness(cls, *, groups_per_step: int, max_staleness: int) -> "StrictFifo":
        """All of the staleness is spent on tickets."""
        _check(max_staleness)
        return cls(groups_per_step=groups_per_step, tickets=(max_staleness + 1) * groups_per_step, window=1)


class AggregateLead:
    """At most `eta` steps' worth of groups ahead in total; a single group may be overtaken for ever."""

    def __init__(self, *, groups_per_step: int, tickets: int) -> None:
        """Raises `UserError` for values that would deadlock or mean nothing."""
        self._tickets = WindowedFifo(groups_per_step=groups_per_step, tickets=tickets, window=1)  # checks them

    @classmethod
    def for_staleness(cls, *, groups_per_step: int, max_staleness: int) -> "AggregateLead":
        """The tickets that keep the mean staleness at `max_staleness` or less."""
        _check(max_staleness)
        return cls(groups_per_step=groups_per_step, tickets=(max_staleness + 1) * groups_per_step)

    @property
    def staleness_bound(self) -> int | None:
        """None: the bound is on the sum over groups."""
        return None

    def admit(self, outstanding: int) -> bool:
        """A fresh number needs a free ticket."""
        return self._tickets.admit(outstanding)

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        """The `P` lowest finished numbers, or none while there are fewer."""
        size = self._tickets.groups_per_step
        return list(finished[:size]) if len(finished) >= size else []

    def evict(self, staleness: Mapping[int, int]) -> list[int]:
        """Nothing."""
        return []


class DropWhenStale(AggregateLead):
    """Generates further ahead than it may train, and discards what has grown too old meanwhile."""

    def __init__(self, *, groups_per_step: int, tickets: int, max_staleness: int) -> None:
        super().__init__(groups_per_step=groups_per_step, tickets=tickets)
        self._max_staleness = max_staleness

    @classmethod
    def for_staleness(cls, *, groups_per_step: int, max_staleness: int) -> "DropWhenStale":
        """Twice the tickets of the other policies, so that the fleet seldom waits."""
        _check(max_staleness)
        tickets = 2 * (max_staleness + 1) * groups_per_step
        return cls(groups_per_step=groups_per_step, tickets=tickets, max_staleness=max_staleness)

    @property
    def staleness_bound(self) -> int | None:
        """`eta`: what is older is discarded before a step is selected."""
        return self._max_staleness

    def evict(self, staleness: Mapping[int, int]) -> list[int]:
        """All that are older than `eta`."""
        return [number for number, age in staleness.items() if age > self._max_staleness]


ADMISSIONS: dict[str, Callable[..., Admission]] = {
    "windowed_fifo": WindowedFifo.for_staleness,
    "strict_fifo": StrictFifo.for_staleness,
    "aggregate_lead": AggregateLead.for_staleness,
    "drop_when_stale": DropWhenStale.for_staleness,
}
"""By the name in `replay.admission`: the policy for `groups_per_step` and `max_staleness`."""


def _check(max_staleness: int) -> None:
    if max_staleness < 0:
        raise UserError(f"max_staleness is {max_staleness}; 0 (synchronous) is the least")
