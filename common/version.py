"""Policy version: which weights a token was drawn with, and how far the learner has gone on since.

    version = lineage * 1,000,000 + learner steps done

- A learner that returns to a checkpoint at step `s` begins a new *lineage* there: its first version is
  `lineage * 1,000,000 + s` with a lineage that no version has had, so no version ever stands for two sets of weights.
- Inside a lineage a publication raises the version by one, and versions grow from lineage to lineage: a higher one is
  newer, whatever its step.
- Staleness counts learner steps. A token of an abandoned lineage may be ahead of the learner: that is staleness 0; its
  recorded likelihood is what its importance weight needs.

*(ours)*
"""

LINEAGE = 1_000_000
"""More than the steps of any run; `int32` holds 2,147 lineages."""


def step_of(version: int) -> int:
    """Learner steps that a published version is made of."""
    return version % LINEAGE


def first_version(lineage: int, step: int) -> int:
    """The version that a learner publishes first in a lineage that begins at `step`."""
    return lineage * LINEAGE + step


def staleness(version: int, oldest: int) -> int:
    """Learner steps from the oldest version of a group's tokens to the version that trains on it."""
    return max(0, step_of(version) - step_of(oldest))
