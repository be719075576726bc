"""Behaviour distribution: what a token is drawn from, and what the learner scores.

- One place for temperature, the forbidden MASK and the precision; rollout and learner both call it.
- fp32 at least (fp64 stays fp64), whatever the model computes in.
- Temperature 0 is the argmax, with log-probability 0; it exists for evaluation only.
"""

import torch
from torch import Tensor


def reveal_log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """Untempered log-probabilities with MASK forbidden; reveal rules look at these.

    Args:
        logits: `[..., V]`, any float dtype.
        mask_id: id that is never drawn.

    Returns:
        `[..., V]`, fp32 or wider, in nats; `-inf` at `mask_id`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _forbid(wide, mask_id).log_softmax(-1)


def behaviour_log_probs(logits: Tensor, temperature: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from at positive temperature.

    Args:
        logits: `[..., V]`, any float dtype.
        temperature: `[...]`, positive; 0 is treated as 1 (the caller takes the argmax then).
        mask_id: id that is never drawn.

    Returns:
        `[..., V]`, fp32 or wider, in nats; `-inf` at `mask_id`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scale = torch.where(temperature > 0, temperature, torch.ones_like(temperature)).to(wide.dtype)
    return _forbid(wide / scale.unsqueeze(-1), mask_id).log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw, one uniform per row.

    The cumulative sum may end a little off 1 and a search may land on an id of zero probability (measured at
    V = 126k), hence the scaling by its last entry, `right=True`, and the clamp to the last id that has mass.

    Args:
        log_probs: `[N, V]`.
        uniforms: `[N]` in (0, 1).

    Returns:
        `[N]` int64 ids, each of positive probability.
    """
    probs = log_probs.exp()
    cdf = probs.cumsum(-1)
    target = uniforms.to(cdf.dtype).unsqueeze(-1) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    vocabulary = torch.arange(probs.shape[-1], device=probs.device)
    last = torch.where(probs > 0, vocabulary, 0).amax(-1)
    return torch.minimum(ids, last)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of `[..., V]` log-probabilities; `-inf` entries count 0."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def _forbid(logits: Tensor, mask_id: int) -> Tensor:
    return logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
