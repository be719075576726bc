"""Step metrics: what a learner step says about its batch and its updates, in the catalogue's names."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config import LearnerConfig
from common.metrics import MOST_STALENESS, STEP_BUCKETS
from common.version import LINEAGE, step_of
from learner.batch import Batch
from learner.objective import effective_sample_share, log_ratio

THIRDS = ("low", "middle", "high")
LARGEST_LOG_RATIO = 80.0  # nats; in metrics only, which say "huge" beyond it instead of infinity


@dataclass
class StepSums:
    """Running sums over the micro-batches of one update, for metrics."""

    weights: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    stale: list[Tensor] = field(default_factory=list)
    clipped: float = 0.0
    tokens: float = 0.0
    kl: float = 0.0
    entropy: list[Tensor] = field(default_factory=list)
    rows: int = 0
    loss: float = 0.0

    @classmethod
    def together(cls, parts: list["StepSums"]) -> "StepSums":
        """Of all ranks."""
        first, *others = parts
        for other in others:
            for name in cls.__dataclass_fields__:
                setattr(first, name, getattr(first, name) + getattr(other, name))
        return first

    def observe(self, part: Batch, current: Tensor, proximal: Tensor, version: int, config: LearnerConfig) -> None:
        """One micro-batch: log-probs `[N, L]` of the current and the proximal policy at the learner's version."""
        scored = part.scored
        log_weight = log_ratio(proximal, part.behaviour_logprob, level=config.weight_level, scored=scored)
        self.weights.append(log_weight[scored].double().clamp(max=LARGEST_LOG_RATIO).exp())
        self.steps.append(part.reveal_step[scored])
        self.stale.append((step_of(version) - part.token_version % LINEAGE)[scored].clamp(min=0))
        ratio = (current - proximal).exp()[scored]
        outside = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
        self.clipped += float(outside.sum())
        self.tokens += float(scored.sum())


def batch_metrics(batch: Batch, costed: Tensor, advantage: Tensor, version: int) -> dict[str, float]:
    """Of a whole batch: rewards and advantages are `[N]`."""
    drawn = batch.token_version >= 0
    oldest = batch.token_version.masked_fill(~drawn, version).amin(-1)
    age = (step_of(version) - oldest % LINEAGE).clamp(min=0)
    revealed = drawn.sum(-1).float()
    log_gamma = _log_gamma(batch)
    moves = torch.zeros(len(batch.prompts), dtype=torch.bool, device=advantage.device)
    moves[batch.group[advantage != 0]] = True
    return _gamma_by_difficulty(batch) | {
        "rollout_reward": float(batch.reward.mean()),
        "rollout_reward_costed": float(costed.mean()),
        "rollout_nfe": float(batch.nfe.float().mean()),
        "rollout_tokens_per_forward": float((revealed / batch.nfe).mean()),
        "rollout_token_entropy": float(batch.entropy[batch.scored].mean()),
        "threshold_gamma": float(log_gamma.mean().exp()),
        "threshold_gamma_spread": float(log_gamma.std()) if len(log_gamma) > 1 else 0.0,
        "learner_flat_groups": float((~moves).sum()),
        "replay_staleness_mean": float(age.float().mean()),
        "replay_staleness_max": float(age.max()),
    }


def update_metrics(sums: StepSums) -> dict[str, float]:
    """Of one update: weights, clipping, KL, by reveal step and staleness."""
    weight, step = torch.cat(sums.weights), torch.cat(sums.steps)
    stale = torch.cat(sums.stale).clamp(max=MOST_STALENESS)
    metrics = {
        "learner_weight_ess": float(effective_sample_share(weight)),
        "learner_weight_mean": float(weight.mean()),
        "learner_clip_fraction": sums.clipped / max(sums.tokens, 1.0),
        "learner_kl": sums.kl / max(sums.tokens, 1.0),
        "learner_rows_forwarded": float(sums.rows),
    }
    if sums.entropy:
        metrics["threshold_entropy"] = float(torch.cat(sums.entropy).mean())
    for low, inside in step_buckets(step):
        metrics[f"learner_weight_mean{{reveal_step={low}}}"] = float(weight[inside].mean())
        metrics[f"learner_weight_ess{{reveal_step={low}}}"] = float(effective_sample_share(weight[inside]))
    for value in stale.unique().tolist():
        metrics[f"learner_weight_mean{{staleness={value}}}"] = float(weight[stale == value].mean())
        metrics[f"learner_weight_ess{{staleness={value}}}"] = float(effective_sample_share(weight[stale == value]))
    return metrics


def step_buckets(step: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First step of each bucket that is not empty, and which of the `[T]` reveal steps lie in it."""
    for low, high in zip(STEP_BUCKETS, (*STEP_BUCKETS[1:], 1 << 15), strict=True):
        inside = (step >= low) & (step < high)
        if inside.any():
            yield low, inside


def _gamma_by_difficulty(batch: Batch) -> dict[str, float]:
    """Geometric mean threshold of the batch's groups, in thirds by mean reward (ties in batch order)."""
    sizes = torch.bincount(batch.group)
    groups = len(sizes)
    if groups < len(THIRDS):
        return {}
    order = (torch.bincount(batch.group, batch.reward) / sizes).argsort(stable=True)
    third = torch.empty_like(order)
    third[order] = torch.arange(groups, device=order.device) * len(THIRDS) // groups
    log_gamma = _log_gamma(batch)
    return {
        f"threshold_gamma_by_difficulty{{group_reward={name}}}": float(log_gamma[third[batch.group] == n].mean().exp())
        for n, name in enumerate(THIRDS)
    }


def _log_gamma(batch: Batch) -> Tensor:
    return batch.gamma.clamp(min=1e-9).log()
