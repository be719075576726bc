"""Surrogate likelihood: what the learner scores instead of the true log-likelihood.

That one, `log pi(o^l | c, z_{t(l)-1})`, needs NFE forwards. A surrogate scores each token on few latents that mask it.

- m-times mean field, the latest of at most m latents. *(paper)* 1-MF (d1, arXiv 2504.12216): all tokens given `z_0`.
  2-MF: tau uniform in `{0..NFE-1}`, tokens with `t(l) <= tau` given `z_0`, the others given `z_tau`.
  *(ours)* `distinct`: `min(m, NFE) - 1` distinct values of `1..NFE-1`, so m = 1 is d1 and m >= NFE is exact.
- Coupled masks (coupled-GRPO of DiffuCoder, arXiv 2506.20639): `z_0`, a random mask, and its complement.
- Random prompt masking (d1, arXiv 2504.12216): all latents of a completion lack the same prompt tokens. Never exact.
- Without it the pass on `z_0` is the same for all completions of a group: one row per group. Any other latent is a row
  only if a token is scored on it, and each position of a row gets logits at most once per temperature.
- Drawn from keyed numbers (completion seed, inner update), never from a global generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.behaviour import behaviour_log_probs
from common.config import LearnerConfig
from common.keyed_random import TAU_STREAM, uniform
from common.policy import Policy
from common.reveal_likelihood import gate_logits, set_log_prob
from common.token_scores import row_pieces, token_scores
from learner.batch import Batch

# Streams count downwards with the position from here, far from each other and from those of `common.keyed_random`.
COUPLED_STREAM = -(1 << 40)
PROMPT_STREAM = -(1 << 41)
COUPLED_RANGE = 0.2, 0.8  # of the probability of a mask; theirs


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


def shown_by(reveal_step: Tensor, steps: Tensor) -> Tensor:
    """Tokens that `z_s` shows, those with `t(l) <= s`, for steps `[N, K]`; `[N, K, L]` bool."""
    return reveal_step.unsqueeze(1) <= steps.unsqueeze(-1)


@dataclass(frozen=True)
class Latents:
    """What the tokens of `N` completions are scored given: `K` latents of each completion, the first of them `z_0`."""

    shown: Tensor
    """`[N, K, L]` bool: the tokens that a latent shows, none for `z_0`; all others are MASK."""
    scores: Tensor
    """`[N, K, L]` bool: the tokens that are scored on a latent; the mean is taken of a token's scores."""
    hidden_prompt: Tensor | None = None
    """`[N, P]` bool: prompt tokens that are MASK in all latents of a completion; None hides nothing."""
    decided: Tensor | None = None
    """`[N, K, L]` bool: positions that were active when the step after a latent chose what to reveal, for the one
    latent of each completion whose choice is scored; None scores no choice."""


def mean_field(batch: Batch, taus: Tensor) -> Latents:
    """Each token given the latest `z_tau` before its reveal step.

    Args:
        batch: completions to be scored.
        taus: `[N, K - 1]` from `draw_taus`.
    """
    steps = torch.cat([torch.zeros_like(batch.nfe).unsqueeze(-1), taus], -1)
    after = scored_after(batch.reveal_step, taus)
    scores = (after.unsqueeze(1) == steps.unsqueeze(-1)) & batch.scored.unsqueeze(1)
    scores[:, 1:] &= taus.unsqueeze(-1) > 0  # a tau of 0 stands for no latent
    return Latents(shown=shown_by(batch.reveal_step, steps), scores=scores)


def with_decision(batch: Batch, latents: Latents, taus: Tensor) -> Latents:
    """The same latents, of which `z_tau` also scores which set was revealed after it. *(ours)*

    The sum over steps of the sets' log-probabilities is NFE times its mean over a uniform step, so one term, that of
    step `tau + 1`, estimates it without bias; `z_tau` is forwarded anyway.

    Args:
        batch: completions to be scored.
        latents: from `mean_field` with these taus.
        taus: `[N, 1]`, uniform on `0..NFE-1`.
    """
    tau = taus[:, 0]
    masked = batch.reveal_step > tau.unsqueeze(-1)
    position = torch.arange(batch.length, device=tau.device)
    block = position // batch.block_length.unsqueeze(-1)
    active = masked & (block == block.gather(1, masked.int().argmax(-1, keepdim=True)))
    nowhere = torch.zeros_like(active)
    first = (tau == 0).unsqueeze(-1)
    decided = torch.stack([torch.where(first, active, nowhere), torch.where(first, nowhere, active)], 1)
    return replace(latents, decided=decided)


def coupled_masks(batch: Batch, *, update: int) -> Latents:
    """Each token given `z_0` and given the one of two complementary latents that masks it.

    *(DiffuCoder, arXiv 2506.20639, and its released code, one pair of masks)* a token is masked with probability t in
    one latent and shown by the other, t uniform in (0.2, 0.8); `(log p(o^l | z_0) + w log p(o^l | z_mask)) / 2` with
    w = 1/t for tokens of the mask and 1/(1-t) for those of its complement; one t per batch.
    *(ours)* w = 1, so that the score is a log-probability that behaviour's can be compared with (their ratios are of
    equal scores, ours are importance weights too); one t per completion, so that no draw depends on batch companions;
    positions that were never drawn stay MASK, since no latent of the sampler shows them.

    Args:
        batch: completions to be scored.
        update: index of the inner update.
    """
    low, high = COUPLED_RANGE
    positions = torch.arange(batch.length, device=batch.seed.device)
    stream = torch.full_like(batch.seed, COUPLED_STREAM)
    probability = low + (high - low) * uniform(batch.seed, update, stream)
    masked = uniform(batch.seed.unsqueeze(-1), update, COUPLED_STREAM - 1 - positions) < probability.unsqueeze(-1)
    drawn = batch.token_version >= 0
    return Latents(
        shown=torch.stack([torch.zeros_like(drawn), ~masked & drawn, masked & drawn], 1),
        scores=torch.stack([batch.scored, masked & batch.scored, ~masked & batch.scored], 1),
    )


def draw_hidden_prompt(batch: Batch, probability: float, *, update: int) -> Tensor:
    """Prompt tokens that a completion's latents lack, `[N, P]` bool: each attended one with the given probability.

    d1's random prompt masking (arXiv 2504.12216, probability 0.15), drawn per completion and inner update. A draw
    belongs to the token's place in the prompt, not to its column, so padding does not matter.
    """
    attended = batch.attended[batch.group]
    place = attended.cumsum(-1) - 1
    draw = uniform(batch.seed.unsqueeze(-1), update, PROMPT_STREAM - place)
    return attended & (draw < probability)


def draw_latents(batch: Batch, config: LearnerConfig, *, update: int) -> Latents:
    """The latents of one inner update, the same whenever it is asked.

    Where the rollout drew the sets that it revealed, 2-MF's `z_tau` scores one of them.
    With `train: threshold` nothing but the pass on `z_0` is needed, which the head rides on.
    """
    if config.train == "threshold":
        return mean_field(batch, batch.reveal_step[:, :0])
    if config.surrogate == "coupled_masks":
        latents = coupled_masks(batch, update=update)
    else:
        taus = draw_taus(batch.seed, batch.nfe, passes=config.surrogate_passes, law=config.tau_law, update=update)
        latents = mean_field(batch, taus)
        if batch.draws_sets:
            latents = with_decision(batch, latents, taus)
    if config.prompt_masking == 0:
        return latents
    return replace(latents, hidden_prompt=draw_hidden_prompt(batch, config.prompt_masking, update=update))


def most_rows(sizes: Tensor, config: LearnerConfig) -> Tensor:
    """Rows that groups of these sizes `[M]` take at most, `[M]`."""
    if config.train == "threshold":
        return torch.ones_like(sizes)
    later = 2 if config.surrogate == "coupled_masks" else config.surrogate_passes - 1
    if config.prompt_masking == 0:
        return 1 + sizes * later
    return int(config.train == "joint") + sizes * (1 + later)


@dataclass(frozen=True)
class Forwarded:
    """Hidden states of `U` pairs of a position and a temperature, and the `T` pairs of a token and a latent, latent by
    latent, that are scored on them."""

    hidden: Tensor
    """`[U, H]`."""
    temperature: Tensor
    """`[U]`."""
    row: Tensor
    """`[T]` in `0..U-1`."""
    completion: Tensor
    """`[T]`."""
    position: Tensor
    """`[T]`."""
    features: Tensor | None
    """`[M, H]` prompt features from clean passes on `z_0`; None unless asked for."""
    rows: int
    """Rows really forwarded."""
    decided: tuple[Tensor, Tensor, Tensor] | None
    """Completion, position and row in `0..U-1` of the positions of `Latents.decided`; None where no choice is
    scored."""


def forward(policy: Policy, batch: Batch, latents: Latents, *, features: bool) -> Forwarded:
    """Forward every latent that scores a token, once.

    Rows are first the groups' `z_0`, then pairs of a completion and a latent. Hidden prompts differ between the
    completions of a group, so with them `z_0` is a pair like the others, and the groups' rows are for features only.
    """
    mask_id = policy.vocabulary.mask_id
    used = latents.scores if latents.decided is None else latents.scores | latents.decided
    own = used.any(-1)
    if latents.hidden_prompt is None:
        own[:, 0] = False
    shared = len(batch.prompts) if latents.hidden_prompt is None or features else 0
    owner, which = own.nonzero(as_tuple=True)
    row = batch.group.unsqueeze(-1).repeat(1, own.shape[1])
    row[owner, which] = shared + torch.arange(len(owner), device=owner.device)

    prompts = batch.prompts[batch.group[owner]]
    if latents.hidden_prompt is not None:
        prompts = prompts.masked_fill(latents.hidden_prompt[owner], mask_id)
    later = torch.where(latents.shown[owner, which], batch.completion_ids[owner], mask_id)
    first = later.new_full((shared, batch.length), mask_id)
    attended = torch.cat([batch.attended[:shared], batch.attended[batch.group[owner]]])
    ids = torch.cat([torch.cat([batch.prompts[:shared], prompts]), torch.cat([first, later])], dim=1)
    everywhere = torch.ones_like(ids[:, -batch.length :], dtype=torch.bool)
    hidden = policy.hidden(ids, torch.cat([attended, everywhere], dim=1))

    everyone, latent, place = used.nonzero(as_tuple=True)
    temperatures, rank = batch.temperature.unique(return_inverse=True)
    key = (row[everyone, latent] * batch.length + place) * len(temperatures) + rank[everyone]
    keys, asked = key.unique(return_inverse=True)
    at = keys // len(temperatures)
    scored = latents.scores[everyone, latent, place]
    decided = None
    if latents.decided is not None:
        chosen = latents.decided[everyone, latent, place]
        decided = everyone[chosen], place[chosen], asked[chosen]
    pooled = None
    if features:
        prompt = torch.cat([batch.attended, torch.zeros_like(first, dtype=torch.bool)], dim=1)
        pooled = policy.prompt_features(hidden[:shared], prompt)
    return Forwarded(
        hidden=hidden[:, -batch.length :][at // batch.length, at % batch.length],
        temperature=temperatures[keys % len(temperatures)],
        row=asked[scored],
        completion=everyone[scored],
        position=place[scored],
        features=pooled,
        rows=len(ids),
        decided=decided,
    )


@dataclass(frozen=True)
class Scores:
    """What one evaluation of the surrogate yields."""

    logprob: Tensor
    """`[N, L]` nats; 0 at positions that are not scored."""
    features: Tensor | None
    """`[M, H]` prompt features from clean passes on `z_0`; None unless asked for."""
    rows: int
    """Rows really forwarded."""
    reveal_logprob: Tensor | None
    """`[N]` nats, of the set revealed after the latent whose choice is scored; None where none is."""
    revealed: Tensor | None
    """`[N, L]` bool, that set."""
    entropy: Tensor | None
    """`[N, L]` nats, as the reveal rule sees them, at the positions that it chose from, 0 elsewhere; None where no
    choice is scored."""


def surrogate_log_probs(policy: Policy, batch: Batch, latents: Latents, *, features: bool = False) -> Scores:
    """Score the drawn tokens of a batch under the policy's surrogate.

    Args:
        policy: the weights to score with; gradients flow unless the caller forbids them.
        batch: completions to be scored.
        latents: what each token is scored given.
        features: also return prompt features for the threshold head.
    """
    found = forward(policy, batch, latents, features=features)
    tokens = batch.completion_ids[found.completion, found.position]
    share, entropies = token_scores(
        policy,
        found.hidden,
        found.row,
        tokens,
        temperature=found.temperature,
        entropy=found.decided is not None,
    )
    share = share / latents.scores.sum(1)[found.completion, found.position]
    logprob = share.new_zeros(batch.completion_ids.shape)
    logprob = logprob.index_put((found.completion, found.position), share, accumulate=True)
    entropy = None
    if entropies is not None and found.decided is not None:
        chooser, place, at = found.decided
        entropy = entropies.new_zeros(batch.completion_ids.shape).index_put((chooser, place), entropies[at])
    chosen, reveal_logprob = None, None
    if entropy is not None and latents.decided is not None:
        decided = latents.decided.any(1)
        step = batch.reveal_step.masked_fill(~decided, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
        chosen = decided & (batch.reveal_step == step)
        gamma = batch.gamma * policy.calibration.gamma_scale
        reveal_logprob = set_log_prob(gate_logits(entropy, decided, gamma), chosen)
    return Scores(logprob, found.features, found.rows, reveal_logprob, chosen, entropy)


@torch.no_grad()
def surrogate_gap(policy: Policy, batch: Batch, passes: Sequence[int]) -> dict[int, Tensor]:
    """How far the m-times mean field is from the truth, under the policy's weights (the paper's Figure 2).

    `KL(pi(. | c, z_{t(l)-1}) || pi(. | c, z_s))` over the whole vocabulary, `z_s` the latent that m-MF scores token `l`
    on: the paper's law of tau for m = 2, distinct otherwise. Costs NFE + m rows per completion.

    Returns:
        `[N, L]` nats for each m, 0 where not scored.
    """
    every = torch.arange(1, int(batch.nfe.max()), device=batch.nfe.device).expand(len(batch.nfe), -1)
    hidden, temperature = _by_token(policy, batch, every)
    others = {}
    for count in passes:
        law = "paper" if count == 2 else "distinct"
        others[count], _ = _by_token(policy, batch, draw_taus(batch.seed, batch.nfe, passes=count, law=law, update=0))
    terms: dict[int, list[Tensor]] = {count: [] for count in passes}
    for rows in row_pieces(len(hidden), policy.model.config.vocab_size, hidden.device):

        def log_probs(states: Tensor, rows: slice = rows) -> Tensor:
            return behaviour_log_probs(policy.logits(states[rows]), temperature[rows], policy.vocabulary.mask_id)

        exact = log_probs(hidden)
        for count, states in others.items():
            difference = (exact - log_probs(states)).masked_fill(exact.isneginf(), 0.0)
            terms[count].append((exact.exp() * difference).sum(-1))
    found = {count: torch.cat(parts) for count, parts in terms.items()}
    return {count: gap.new_zeros(batch.scored.shape).masked_scatter(batch.scored, gap) for count, gap in found.items()}


def _by_token(policy: Policy, batch: Batch, taus: Tensor) -> tuple[Tensor, Tensor]:
    """Mean-field hidden states `[T, H]` and temperatures `[T]` of the scored tokens in reading order."""
    found = forward(policy, batch, mean_field(batch, taus), features=False)
    rows = found.row[(found.completion * batch.length + found.position).argsort()]
    return found.hidden[rows], found.temperature[rows]
