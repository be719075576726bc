"""Threshold policy p_phi(gamma | c): a head on the prompt's pooled hidden state. *(head and initialisation: ours;
a prompt-aware threshold trained by the same policy gradient: the paper's)*

- Both heads start with weights 0, so every prompt begins with the same distribution around `gamma_init`.
- Run outside autocast: likelihood ratios of thresholds need fp32.
- In evaluation the mean in log space is used.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from common.config import ThresholdConfig


class ThresholdHead(nn.Module, ABC):
    """Maps prompt features to a distribution over thresholds; lives inside the policy and is published with it."""

    def __init__(self, hidden_size: int, outputs: int, config: ThresholdConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(hidden_size, outputs)
        nn.init.zeros_(self.linear.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Raw outputs `[N, K]` for features `[N, H]`, in the head's own precision (fp32 or wider)."""
        # Scaled to unit length: AdamW moves every weight by its learning rate, so over H unscaled features the outputs
        # would move H times as fast as the bias and the head collapses to one threshold for all prompts.
        own = features.to(self.linear.weight.dtype) / math.sqrt(features.shape[-1])
        return self.linear(torch.zeros_like(own) if self.config.prompt_blind else own)

    @abstractmethod
    def log_prob(self, features: Tensor, gamma: Tensor) -> Tensor:
        """`[N]` log-probability (categorical) or density over ln gamma of `gamma` `[N]`, given features `[N, H]`."""

    @abstractmethod
    def entropy(self, features: Tensor) -> Tensor:
        """`[N]` entropy in nats."""

    @abstractmethod
    def sample(self, features: Tensor, uniforms: Tensor) -> Tensor:
        """`[N]` thresholds by inverse CDF from `[N]` uniforms."""

    @abstractmethod
    def mean(self, features: Tensor) -> Tensor:
        """`[N]` mean in log space, `exp(E ln gamma)`."""


class CategoricalThreshold(ThresholdHead):
    """Categorical over a fixed, log-spaced grid."""

    grid: Tensor

    def __init__(self, hidden_size: int, config: ThresholdConfig) -> None:
        super().__init__(hidden_size, len(config.gamma_grid), config)
        grid = torch.tensor(config.gamma_grid, dtype=torch.float32)
        self.register_buffer("grid", grid)
        distance = (grid.log() - math.log(config.gamma_init)) / config.init_width
        with torch.no_grad():
            self.linear.bias.copy_((-0.5 * distance.square()).log_softmax(0))

    def log_prob(self, features: Tensor, gamma: Tensor) -> Tensor:
        index = (gamma.log().unsqueeze(-1) - self.grid.log()).abs().argmin(-1, keepdim=True)
        return self(features).log_softmax(-1).gather(-1, index).squeeze(-1)

    def entropy(self, features: Tensor) -> Tensor:
        log_probs = self(features).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def sample(self, features: Tensor, uniforms: Tensor) -> Tensor:
        cdf = self(features).softmax(-1).cumsum(-1)
        index = torch.searchsorted(cdf, (uniforms.to(cdf.dtype) * cdf[:, -1]).unsqueeze(-1), right=True)
        return self.grid[index.squeeze(-1).clamp(max=len(self.grid) - 1)]

    def mean(self, features: Tensor) -> Tensor:
        return (self(features).softmax(-1) * self.grid.log()).sum(-1).exp()


class LogNormalThreshold(ThresholdHead):
    """Normal over ln(gamma) with a learned mean per prompt and one learned width."""

    def __init__(self, hidden_size: int, config: ThresholdConfig) -> None:
        super().__init__(hidden_size, 1, config)
        with torch.no_grad():
            self.linear.bias.fill_(math.log(config.gamma_init))
        self.log_width = nn.Parameter(torch.tensor(math.log(config.init_width)))

    def _location(self, features: Tensor) -> Tensor:
        return self(features).squeeze(-1)

    def log_prob(self, features: Tensor, gamma: Tensor) -> Tensor:
        standard = (gamma.log() - self._location(features)) * (-self.log_width).exp()
        return -0.5 * standard.square() - self.log_width - 0.5 * math.log(2 * math.pi)

    def entropy(self, features: Tensor) -> Tensor:
        return (self.log_width + 0.5 * math.log(2 * math.pi * math.e)).expand(features.shape[0])

    def sample(self, features: Tensor, uniforms: Tensor) -> Tensor:
        location = self._location(features)
        return (location + self.log_width.exp() * torch.special.ndtri(uniforms).to(location.dtype)).exp()

    def mean(self, features: Tensor) -> Tensor:
        return self._location(features).exp()


def build_threshold_head(hidden_size: int, config: ThresholdConfig) -> ThresholdHead:
    """The head that `config.head` names."""
    kinds = {"categorical": CategoricalThreshold, "log_normal": LogNormalThreshold}
    return kinds[config.head](hidden_size, config)
