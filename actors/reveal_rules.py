"""Reveal rules: which masked positions of a row are revealed in this step.

- Pure functions on tensors; rows are independent of each other.
- Every rule reveals at least one active position of a row that has any, so a loop over steps always ends.
- They look at untempered entropy or top probability, never at the token that is drawn: the selection does not depend
  on the draw, so the recorded log-probability is that of the behaviour policy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RevealRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def entropy_bound(entropy: Tensor, top: Tensor, active: Tensor, gamma: Tensor) -> Tensor:
    """Longest prefix U, by ascending entropy, with `sum_U H - max_U H <= gamma` (EB-Sampler, arXiv 2505.24857).

    Args:
        entropy: `[N, L]`, nats.
        top: `[N, L]`, top probability; unused.
        active: `[N, L]` bool, masked positions of the active block.
        gamma: `[N]`, nats, >= 0.

    Returns:
        `[N, L]` bool, a subset of `active`.
    """
    ordered, order = entropy.masked_fill(~active, torch.inf).sort(dim=-1, stable=True)
    # ascending, so the maximum of a prefix is its last entry and sum - max is the sum of those before it
    before = ordered.cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    chosen = (before <= gamma.to(before.dtype).unsqueeze(-1)) & (ordered < torch.inf)
    return torch.zeros_like(active).scatter(-1, order, chosen)


def confidence(entropy: Tensor, top: Tensor, active: Tensor, threshold: Tensor) -> Tensor:
    """Every position whose top probability reaches the threshold, at least the best (Fast-dLLM, arXiv 2505.22618).

    Args:
        entropy: `[N, L]`; unused.
        top: `[N, L]`, top probability.
        active: `[N, L]` bool.
        threshold: `[N]`, probability.

    Returns:
        `[N, L]` bool, a subset of `active`.
    """
    return (top >= threshold.to(top.dtype).unsqueeze(-1)) & active | _best(top, active, torch.ones_like(threshold))


def top_k(entropy: Tensor, top: Tensor, active: Tensor, count: Tensor) -> Tensor:
    """A fixed number of positions per step, by top probability (LLaDA's reference sampler, arXiv 2502.09992).

    Args:
        entropy: `[N, L]`; unused.
        top: `[N, L]`, top probability.
        active: `[N, L]` bool.
        count: `[N]`, positions per step, >= 1.

    Returns:
        `[N, L]` bool, a subset of `active`.
    """
    return _best(top, active, count)


def _best(top: Tensor, active: Tensor, count: Tensor) -> Tensor:
    ordered, order = top.masked_fill(~active, -torch.inf).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(top.shape[-1], device=top.device)
    chosen = (rank < count.unsqueeze(-1)) & (ordered > -torch.inf)
    return torch.zeros_like(active).scatter(-1, order, chosen)


REVEAL_RULES: dict[str, RevealRule] = {"entropy_bound": entropy_bound, "confidence": confidence, "top_k": top_k}
SAMPLED_ENTROPY_BOUND = "sampled_entropy_bound"  # common.reveal_likelihood: draws the set it reveals
RULES = (*REVEAL_RULES, SAMPLED_ENTROPY_BOUND)
ENTROPY_BOUND = ("entropy_bound", SAMPLED_ENTROPY_BOUND)  # their parameter is gamma
