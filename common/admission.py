"""Admission: how many groups may be out, and which finished ones the learner may take.

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

A step that sums several batches, or discards part of its batch, consumes `P` or more: the bound holds.

No deadlock while actors produce: suppose that no step is under way and no lease may be granted. Then `B` groups are out
and all will finish; then the head is a fresh number, every one of them may be taken, and `B >= P` of them are there.

A window counted over the `W` oldest untrained groups, instead of in numbers, has no bound: one slow group is overtaken
for ever. Freeing tickets at sampling breaks it as well. `tests/test_admission.py` shows both.
"""

from collections.abc import Sequence
from typing import Protocol

from common.errors import UserError


class Admission(Protocol):
    """A policy that decides what may be leased and what may be trained."""

    @property
    def staleness_bound(self) -> int:
        """The staleness that no trained group exceeds."""
        ...

    def may_lease(self, outstanding: int) -> bool:
        """Whether a fresh number may be given out while `outstanding` groups hold a ticket."""
        ...

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        """The numbers of the next step, ascending, or none: `finished` is sorted, `head` is still to finish."""
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
        """The widest policy found whose bound is `max_staleness`: 0 is synchronous, 1 strict FIFO, 2 and up windowed.

        From 2 on one step's worth of tickets is given up for a window of one step, so that a slow group holds up
        neither the learner nor the fleet at once.
        """
        if max_staleness < 0:
            raise UserError(f"max_staleness is {max_staleness}; 0 (synchronous) is the least")
        if max_staleness < 2:
            return cls(groups_per_step=groups_per_step, tickets=(max_staleness + 1) * groups_per_step, window=1)
        return cls(groups_per_step=groups_per_step, tickets=max_staleness * groups_per_step, window=groups_per_step + 1)

    @property
    def staleness_bound(self) -> int:
        """`(B + W - 2) // P`; the proof is in the module's docstring."""
        return (self.tickets + self.window - 2) // self.groups_per_step

    def may_lease(self, outstanding: int) -> bool:
        """A fresh number needs a free ticket."""
        return outstanding < self.tickets

    def select(self, finished: Sequence[int], head: int) -> list[int]:
        """The `P` lowest finished numbers below `head + W`, or none while there are fewer."""
        batch = [number for number in finished[: self.groups_per_step] if number < head + self.window]
        return batch if len(batch) == self.groups_per_step else []
