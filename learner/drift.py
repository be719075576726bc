"""Threshold drift: what the learner does against it, besides training the threshold. *(ours; docs/method.md, 7)*

RL sharpens the distributions, an entropy-bounded rule then reveals more at the same gamma, and no gradient sees it.
Two controllers hold the sampler where it was at the first batch; both read rollouts that are there anyway and cost no
forward. They move `Policy.calibration`, which is published with the weights.

- `hold_nfe` multiplies gamma so that the mean NFE of the trained groups stays: `ln scale += GAIN (ln NFE - ln NFE_0)`.
  Groups that `replay.drop_no_spread` discards are not among them, so the NFE of all completions may move a little.
- `hold_entropy` gives the reveal rule a temperature, so that the mean entropy of the first step, before anything is
  revealed, stays that of the warm start: `ln T += GAIN (ln H_0 - ln H)`.

`hold_nfe` is what `Config` chooses when only the model learns (`docs/studies/drift_sudoku.md` has the comparison).

`GAIN` is half of what one batch shows: NFE falls with about the cube root of gamma, so the loop is stable for several
versions of staleness.
"""

import torch

from common.policy import Policy
from learner.batch import Batch

GAIN = 0.5
LIMIT = 7.0  # in either direction of a logarithm: a factor of 1,100
SMALLEST = 1e-6  # nats


class DriftRemedy:
    """Belongs to a learner; holds what the first batch looked like."""

    def __init__(self, policy: Policy, kind: str) -> None:
        self._policy = policy
        self._kind = kind
        self._target: float | None = None

    def update(self, batch: Batch) -> dict[str, float]:
        """Move the calibration after a batch; returns the gauges.

        Args:
            batch: the groups that the learner has just trained on.
        """
        if self._kind.startswith("hold"):
            nfe = self._kind == "hold_nfe"
            seen = batch.nfe.float().mean() if nfe else batch.first_entropy.mean().clamp(min=SMALLEST)
            log_seen = float(seen.log())
            if self._target is None:
                self._target = log_seen
            error = log_seen - self._target if nfe else self._target - log_seen
            with torch.no_grad():
                calibration = self._policy.calibration
                moved = calibration.log_gamma_scale if nfe else calibration.log_reveal_temperature
                moved.copy_((moved + GAIN * error).clamp(-LIMIT, LIMIT))
        return {
            "threshold_scale": self._policy.calibration.gamma_scale,
            "threshold_reveal_temperature": self._policy.calibration.reveal_temperature,
        }

    def restore(self, state: dict[str, float | None]) -> None:
        """What `state` gave."""
        self._target = state["target"]

    def state(self) -> dict[str, float | None]:
        """For a checkpoint; the calibration itself is part of the policy."""
        return {"target": self._target}
