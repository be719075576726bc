"""Request: one completion that the engine is asked for, and what it says when it cannot be had."""

from dataclasses import dataclass
from typing import Literal

MODES = {"sample": 1, "mean": 2, "initial": 3}  # how a row takes its threshold from the policy; 0: it was given
WAY_OUT = "weights that are not finite are damaged or have diverged: give another policy"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to be generated."""

    prompt_ids: tuple[int, ...]
    seed: int
    group: int
    """Requests of one group, prompt and length that are submitted in a row share their first forward."""
    temperature: float = 1.0
    """Temperature of the draw; 0 is argmax, for evaluation only."""
    threshold: float | Literal["sample", "mean", "initial"] = "mean"
    """The reveal rule's parameter, or how to take it from the policy: a draw of the threshold policy, its mean, or
    `gamma_init`; what the policy gives is multiplied by its scale, what is given as a number is not."""
    completion_tokens: int | None = None
    """Length of this completion, a multiple of the block length; None is the engine's L."""

    @property
    def first_pass(self) -> tuple[int, tuple[int, ...], int | None]:
        """What the forward on `z_0` depends on, beside the weights."""
        return self.group, self.prompt_ids, self.completion_tokens


@dataclass(frozen=True)
class Failure:
    """A request that broke in the engine; the others go on."""

    reason: str
