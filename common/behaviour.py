"""Behaviour distribution: what a token is drawn from, and what the learner scores.

- One place for temperature, the forbidden MASK and the precision; rollout and learner both call it.
- fp32 at least (fp64 stays fp64), whatever the model computes in.
- Temperature 0 is the argmax, with log-probability 0; it exists for evaluation only.
- At a vocabulary of 32k the sampler's own arithmetic costs as much as a small model: `reveal_statistics` and
  `draw_tokens` work through the rows in pieces that fit the processor's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 19  # numbers; 2 MB of fp32
LOWEST = -1e30  # stands for -inf; its exponential is 0


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


def reveal_statistics(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """What reveal rules look at: entropy and top probability of the untempered distribution, MASK forbidden.

    With `x` shifted by its maximum and `Z = sum exp(x)`: `H = ln Z - sum(x exp(x)) / Z` and the top is `1 / Z`.

    Args:
        logits: `[N, V]`, any float dtype.
        mask_id: id that is never drawn.

    Returns:
        entropy `[N]` in nats and top probability `[N]`, fp32 or wider; NaN where a logit is NaN or `+inf`.
    """
    entropies, tops = [], []
    for rows in _pieces(logits):
        shifted = logits[rows].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        shifted[:, mask_id] = -torch.inf
        shifted.sub_(shifted.amax(-1, keepdim=True)).clamp_(min=LOWEST)  # 0 * -inf would be NaN
        weights = shifted.exp()
        total = weights.sum(-1)
        entropies.append(total.log() - torch.linalg.vecdot(weights, shifted) / total)
        tops.append(1 / total)
    return torch.cat(entropies), torch.cat(tops)


def draw_tokens(logits: Tensor, temperature: Tensor, uniforms: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Tokens of the behaviour distribution and their log-probabilities.

    Args:
        logits: `[N, V]`, any float dtype.
        temperature: `[N]`; 0 is the argmax, with log-probability 0.
        uniforms: `[N]` in (0, 1), one per token.
        mask_id: id that is never drawn.

    Returns:
        ids `[N]` int64 and log-probabilities `[N]` in nats, fp32 or wider.
    """
    ids, scores = [], []
    for rows in _pieces(logits):
        log_probs = behaviour_log_probs(logits[rows], temperature[rows], mask_id)
        greedy = temperature[rows] == 0
        drawn = torch.where(greedy, log_probs.argmax(-1), draw(log_probs, uniforms[rows]))
        ids.append(drawn)
        scores.append(log_probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).masked_fill(greedy, 0.0))
    return torch.cat(ids), torch.cat(scores)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw, one uniform per row.

    The cumulative sum may end a little off 1 and a search may land on an id of zero probability (measured at
    V = 126k), hence the scaling by its last entry, `right=True`, and the step back to an id that has mass: from behind
    the last one, or from one over which a GPU's parallel sum rises by a rounding.

    Args:
        log_probs: `[N, V]`.
        uniforms: `[N]` in (0, 1).

    Returns:
        `[N]` int64 ids, each of positive probability.
    """
    probs = log_probs.exp()
    cdf = probs.cumsum(-1)
    target = uniforms.to(cdf.dtype).unsqueeze(-1) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True, out_int32=True)
    vocabulary = torch.arange(probs.shape[-1], device=probs.device, dtype=torch.int32)
    return torch.where((probs > 0) & (vocabulary <= ids), vocabulary, 0).amax(-1).long()


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of at most `PIECE` numbers; one slice where rows fit, or on a device without such a cache."""
    count = len(logits)
    step = max(1, PIECE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, count)
    return (slice(start, start + step) for start in range(0, max(1, count), step))


def _forbid(logits: Tensor, mask_id: int) -> Tensor:
    return logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
