"""Calibration: what a policy carries besides weights that a gradient moves. *(ours)*

- Scale of its thresholds and temperature of the distributions whose entropy reveal rules see: the learner's remedies
  against threshold drift (`learner.drift`) move them.
- Mean and scale of the threshold head's features, fitted once on the warm start (`sampler.threshold.standardise`): what
  prompts have in common outweighs what tells them apart, and a linear head under AdamW learns the former first.
- Parameters without gradient, so that they are published, saved and adopted with the weights.
"""

import math

import torch
from torch import Tensor, nn

SMALLEST_SHARE = 0.05  # of the mean spread; features that hardly vary are not blown up further


class Calibration(nn.Module):
    """Part of a policy; does nothing until something moves it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

        def constant(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value, requires_grad=False)

        self.log_gamma_scale = constant(torch.zeros(()))
        self.log_reveal_temperature = constant(torch.zeros(()))
        self.feature_mean = constant(torch.zeros(hidden_size))
        self.feature_scale = constant(torch.ones(hidden_size))

    @property
    def gamma_scale(self) -> float:
        """Factor on every threshold that the policy gives."""
        return math.exp(float(self.log_gamma_scale))

    @property
    def reveal_temperature(self) -> float:
        """Temperature of the distributions that reveal rules look at; the draw has its own."""
        return math.exp(float(self.log_reveal_temperature))

    def standardised(self, features: Tensor) -> Tensor:
        """`[N, H]` features of prompts, less their mean, over their spread."""
        return (features - self.feature_mean.to(features)) * self.feature_scale.to(features)

    @torch.no_grad()
    def fit_features(self, features: Tensor) -> None:
        """Take mean and spread from features `[N, H]` of two prompts or more, given as `standardised` returned them."""
        raw = features / self.feature_scale + self.feature_mean
        spread = raw.std(0)
        self.feature_mean.copy_(raw.mean(0))
        self.feature_scale.copy_(1 / spread.clamp(min=SMALLEST_SHARE * float(spread.mean()) + 1e-6))
