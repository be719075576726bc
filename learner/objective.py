"""Objective: the importance weight, the clipped objective of the model, and that of the threshold policy.

Short pure functions on tensors; sections of docs/method.md in brackets. Log-probabilities in nats.
"""

import torch
from torch import Tensor


def log_ratio(proximal: Tensor, behaviour: Tensor, *, level: str = "token", scored: Tensor | None = None) -> Tensor:
    """`ln(pi_prox / pi_behaviour)`, a constant for the gradient [4].

    Args:
        proximal, behaviour: log-probabilities of one shape; `[N, L]` at level `sequence`.
        level: `token`, or `sequence` *(ours)*: of a completion's scored tokens together, at each of them.
        scored: `[N, L]` bool; the others get 0. None scores all.

    Returns:
        nats, in the shape of `proximal`.
    """
    ratio = (proximal - behaviour).detach()
    if scored is not None:
        ratio = ratio.masked_fill(~scored, 0.0)
    if level == "sequence":
        ratio = ratio.sum(-1, keepdim=True).expand_as(ratio)
        ratio = ratio if scored is None else ratio.masked_fill(~scored, 0.0)
    return ratio


def importance_weight(
    proximal: Tensor,
    behaviour: Tensor,
    *,
    cap: float,
    kind: str,
    mean: float = 1.0,
    level: str = "token",
    scored: Tensor | None = None,
) -> Tensor:
    """`w = min(C, pi_prox / pi_behaviour)`, a constant for the gradient [4].

    *(paper)* surrogate over true behaviour; *(ours)* the behaviour likelihood was recorded when the token was
    revealed, so the same ratio corrects staleness too. *(ours)* `self_normalised`: weights of mean 1, so that a
    surrogate that underrates all tokens does not shrink the gradient.

    Args:
        proximal, behaviour, level, scored: see `log_ratio`.
        cap: C.
        kind: `truncated`; `self_normalised`, that over `mean`; or `none` (1 everywhere).
        mean: of the truncated weights over all scored tokens of the batch. Left at 1, as for thresholds (one draw per
            completion), `self_normalised` is `truncated`.
    """
    if kind == "none":
        return torch.ones_like(proximal)
    weight = log_ratio(proximal, behaviour, level=level, scored=scored).exp().clamp(max=cap)
    if kind == "self_normalised":
        # Floored, so that weights that all underflow are 0 and not 0 / 0. A NaN stays one in this order, and is refused
        # with the loss.
        return weight / max(mean, torch.finfo(torch.float32).tiny)
    return weight


def clipped_objective(
    current: Tensor, proximal: Tensor, weight: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """`w * min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)` with `rho = pi / pi_prox` [5]; to be maximised.

    PPO's clipped surrogate (arXiv 1707.06347) with asymmetric clip and the weight of [4]. Tensors broadcast.
    """
    ratio = (current - proximal.detach()).exp()
    return weight * torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def token_mean(values: Tensor, scored: Tensor, *, kind: str, completions: float, tokens: float) -> Tensor:
    """Mean of per-token values `[N, L]` over the batch that these rows are a part of [5].

    `completion`: mean inside each completion, then over all `completions` (paper); `token`: over all `tokens` (d1).
    The denominators are the whole batch's, so that a sum over micro-batches is the batch's mean.
    """
    values = values.masked_fill(~scored, 0.0)
    if kind == "token":
        return values.sum() / max(tokens, 1.0)
    return (values.sum(-1) / scored.sum(-1).clamp(min=1)).sum() / completions


def kl_k3(current: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of `KL(pi || pi_ref)` at sampled tokens: `exp(d) - d - 1` with `d = ref - current`."""
    difference = reference.detach() - current
    return difference.exp() - difference - 1


def effective_sample_share(weight: Tensor) -> Tensor:
    """Effective sample size of untruncated weights over their number, in (0, 1]: `(sum w)^2 / (n sum w^2)`."""
    scaled = weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny)
    return scaled.sum().square() / (weight.numel() * scaled.square().sum()).clamp(min=1.0)
