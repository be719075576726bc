"""Surrogate likelihood: m-times mean field.

The true log-likelihood of a token, `log pi(o^l | c, z_{t(l)-1})`, needs NFE forwards. m-MF scores every token given
the latest of at most m latents that still masks it.

- *(paper)* 1-MF (d1, arXiv 2504.12216): all tokens given `z_0`. 2-MF: tau uniform in `{0..NFE-1}`, tokens with
  `t(l) <= tau` given `z_0`, the others given `z_tau`.
- *(ours)* `distinct`: `min(m, NFE) - 1` distinct values of `1..NFE-1`, so m = 1 is d1 and m >= NFE is exact.
- The pass on `z_0` is the same for all completions of a group: one row per group. A latent is a row only if a token
  is scored on it, and each position of a row gets logits at most once.
- Drawn from keyed numbers (completion seed, inner update), never from a global generator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.behaviour import behaviour_log_probs
from common.keyed_random import TAU_STREAM, uniform
from common.policy import Policy
from learner.batch import Batch


def draw_taus(seed: Tensor, nfe: Tensor, *, passes: int, law: str, update: int) -> Tensor:
    """Steps after which latents are scored, besides `z_0`.

    Args:
        seed: `[N]` int64, completion seeds.
        nfe: `[N]` int64, forward passes of each completion, >= 1.
        passes: m >= 1.
        law: `paper` (m <= 2) or `distinct`.
        update: index of the inner update.

    Returns:
        `[N, K]` int64, ascending in each row, 0 where a completion has fewer latents.
    """
    if passes == 1:
        return torch.zeros(len(seed), 0, dtype=torch.int64, device=seed.device)
    stream = torch.full_like(seed, TAU_STREAM)
    if law == "paper":
        return (uniform(seed, update, stream) * nfe).long().unsqueeze(-1)
    steps = torch.arange(1, max(int(nfe.max()), 2), device=seed.device)
    order = uniform(seed.unsqueeze(-1), update, TAU_STREAM - steps)
    order = order.masked_fill(steps >= nfe.unsqueeze(-1), torch.inf)
    kept = order.topk(min(passes - 1, len(steps)), largest=False)
    return torch.where(kept.values.isfinite(), steps[kept.indices], 0).sort(-1).values


def scored_after(reveal_step: Tensor, taus: Tensor) -> Tensor:
    """Step whose latent each token is scored on: the largest of `{0} + taus` below its reveal step.

    Args:
        reveal_step: `[N, L]`, 1-based.
        taus: `[N, K]`.

    Returns:
        `[N, L]` int64.
    """
    candidates = taus.unsqueeze(1) * (taus.unsqueeze(1) < reveal_step.unsqueeze(-1))
    return torch.cat([torch.zeros_like(reveal_step).unsqueeze(-1), candidates], -1).amax(-1)


def latent(completion_ids: Tensor, reveal_step: Tensor, step: Tensor, mask_id: int) -> Tensor:
    """`z_step`: the token where `t(l) <= step`, else MASK; `[N, L]`."""
    return torch.where(reveal_step <= step.unsqueeze(-1), completion_ids, mask_id)


@dataclass(frozen=True)
class Scores:
    """What one evaluation of the surrogate yields."""

    logprob: Tensor
    """`[N, L]` nats; 0 at positions that are not scored."""
    features: Tensor | None
    """`[groups, H]` prompt features from the pass on `z_0`; None unless asked for."""
    rows: int
    """Rows really forwarded."""


def surrogate_log_probs(policy: Policy, batch: Batch, taus: Tensor, *, features: bool = False) -> Scores:
    """Score the drawn tokens of a batch under the policy's surrogate.

    Args:
        policy: the weights to score with; gradients flow unless the caller forbids them.
        batch: completions to be scored.
        taus: `[N, K]` from `draw_taus`.
        features: also return prompt features for the threshold head.
    """
    after = scored_after(batch.reveal_step, taus)
    count = len(batch.prompts)
    # rows 0..count-1 are the groups' z_0; the others are (completion, tau) pairs that score a token
    used = (after.unsqueeze(1) == taus.unsqueeze(-1)) & (taus.unsqueeze(-1) > 0) & batch.scored.unsqueeze(1)
    owner, which = used.any(-1).nonzero(as_tuple=True)
    group = torch.cat([torch.arange(count, device=owner.device), batch.group[owner]])
    later = latent(batch.completion_ids[owner], batch.reveal_step[owner], taus[owner, which], policy.vocabulary.mask_id)
    first = later.new_full((count, batch.length), policy.vocabulary.mask_id)

    number = torch.zeros_like(taus)
    number[owner, which] = count + torch.arange(len(owner), device=owner.device)
    row = batch.group.unsqueeze(-1).expand_as(after).clone()
    for k in range(taus.shape[1]):
        row = torch.where((after > 0) & (after == taus[:, k : k + 1]), number[:, k : k + 1], row)

    ids = torch.cat([batch.prompts[group], torch.cat([first, later])], dim=1)
    attended = torch.cat([batch.attended[group], torch.ones_like(ids[:, -batch.length :], dtype=torch.bool)], dim=1)
    hidden = policy.hidden(ids, attended)

    completion, position = batch.scored.nonzero(as_tuple=True)
    source = row[completion, position]
    needed = torch.zeros(len(ids), batch.length, dtype=torch.bool, device=ids.device)
    needed[source, position] = True
    index = torch.zeros_like(needed, dtype=torch.int64)
    index[needed] = torch.arange(int(needed.sum()), device=ids.device)
    logits = policy.logits(hidden[:, -batch.length :][needed])
    log_probs = behaviour_log_probs(
        logits[index[source, position]], batch.temperature[completion], policy.vocabulary.mask_id
    )
    tokens = batch.completion_ids[completion, position]
    logprob = log_probs.new_zeros(batch.completion_ids.shape)
    logprob[completion, position] = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    prompt = torch.cat([batch.attended, torch.zeros_like(first, dtype=torch.bool)], dim=1)
    pooled = policy.prompt_features(hidden[:count], prompt) if features else None
    return Scores(logprob=logprob, features=pooled, rows=len(ids))
