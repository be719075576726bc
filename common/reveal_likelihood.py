"""Reveal likelihood: a reveal rule that draws its set, so that the set has a likelihood. *(ours; docs/method.md, 7)*

The entropy bound is a step function of the weights: which positions are revealed changes with them, and no gradient
sees it. Here the position of least entropy is always revealed, and every other active position `l` is revealed on its
own with probability

    p_l = sigmoid((ln gamma - ln c_l) / WIDTH),    c_l = sum of the entropies ranked before l

which is 1/2 where the entropy bound changes its mind, and becomes that rule as WIDTH goes to 0. The log-probability of
the drawn set is differentiable in the entropies; the engine records it and the learner scores it.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

WIDTH = 0.25  # in ln(nats); p falls from .98 to .02 while c grows from gamma / e to gamma * e
SMALLEST = 1e-9  # nats; keeps logarithms finite
IMPOSSIBLE = -30.0  # nats; of a set of probability 0: finite, since a difference of two is taken


def gate_logits(entropy: Tensor, active: Tensor, gamma: Tensor) -> Tensor:
    """Log-odds of revealing each position.

    Args:
        entropy: `[N, L]`, nats.
        active: `[N, L]` bool, masked positions of the active block.
        gamma: `[N]`, nats, >= 0.

    Returns:
        `[N, L]`; `+inf` at each row's position of least entropy, `-inf` outside `active`.
    """
    ordered, order = entropy.masked_fill(~active, torch.inf).sort(dim=-1, stable=True)
    before = ordered.masked_fill(ordered == torch.inf, 0.0).cumsum(-1).roll(1, dims=-1)
    first = torch.zeros_like(active)
    first[:, 0] = True
    limit = gamma.to(before.dtype).clamp(min=SMALLEST).log().unsqueeze(-1)
    logits = (limit - before.clamp(min=SMALLEST).log()) / WIDTH
    logits = logits.masked_fill(first, torch.inf)
    return torch.full_like(entropy, -torch.inf).scatter(-1, order, logits).masked_fill(~active, -torch.inf)


def draw_set(logits: Tensor, uniforms: Tensor, greedy: Tensor) -> Tensor:
    """The set that is revealed.

    Args:
        logits: `[N, L]` from `gate_logits`.
        uniforms: `[N, L]` in (0, 1), one per position.
        greedy: `[N]` bool; these rows take a half for every uniform, which is the entropy bound.

    Returns:
        `[N, L]` bool; at least one in every row that has an active position.
    """
    return uniforms.masked_fill(greedy.unsqueeze(-1), 0.5) <= logits.sigmoid()


def set_log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probability `[N]` (nats) of the revealed set `chosen` `[N, L]`; 0 where there was no choice.

    A set without the position that is always revealed, which was another one under the weights that drew it, has no
    more than `IMPOSSIBLE`, and no gradient there.
    """
    free = logits.isfinite()
    safe = logits.masked_fill(~free, 0.0)
    fixed = torch.zeros_like(safe).masked_fill((logits == torch.inf) & ~chosen, IMPOSSIBLE)
    return torch.where(free, torch.where(chosen, logsigmoid(safe), logsigmoid(-safe)), fixed).sum(-1)
