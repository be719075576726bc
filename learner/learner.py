"""Learner: from a batch of groups to new weights.

One `step`: advantages -> (proximal scores) -> `inner_updates` times {surrogate, objective, optimizer}.

- The proximal policy is the weights when the batch arrives. For the first inner update current and proximal are the
  same numbers, so no proximal pass is made; later updates score theirs before the first one moves the weights.
- Completions without advantage carry no gradient and are not scored (unless a KL term needs them).
- Gradients are sums over micro-batches of whole-batch means: how a batch is cut does not change them.
- An inner update whose loss or gradient is not finite changes nothing and raises; earlier ones of its batch stay.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common.autocast import autocast
from common.config import LearnerConfig
from common.cost import with_cost
from common.errors import RunError
from common.policy import Policy
from learner.advantage import advantages
from learner.batch import Batch
from learner.objective import (
    clipped_objective,
    effective_sample_share,
    importance_weight,
    kl_k3,
    token_mean,
)
from learner.surrogate import draw_taus, surrogate_log_probs

STEP_BUCKETS = (1, 2, 4, 8)


@dataclass
class _Sums:
    """Running sums over the micro-batches of one update, for metrics."""

    weights: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    stale: list[Tensor] = field(default_factory=list)
    clipped: float = 0.0
    tokens: float = 0.0
    kl: float = 0.0
    entropy: list[Tensor] = field(default_factory=list)
    rows: int = 0


class Learner:
    """Holds policy and optimizer for a whole run; `step` is called once per batch."""

    def __init__(self, policy: Policy, config: LearnerConfig) -> None:
        self.policy = policy
        self.config = config
        self.steps_done = 0
        self.updates_done = 0
        self._learns_model = config.train in ("model", "joint")
        self._learns_threshold = config.train in ("threshold", "joint")
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_beta > 0 else None
        policy.model.requires_grad_(self._learns_model)
        policy.head.requires_grad_(self._learns_threshold)
        groups = []
        if self._learns_model:
            groups.append({"params": list(policy.model.parameters()), "lr": config.learning_rate})
        if self._learns_threshold:
            groups.append({"params": list(policy.head.parameters()), "lr": config.threshold_learning_rate})
        self.optimizer = torch.optim.AdamW(
            groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        warmup = max(config.warmup_steps * config.inner_updates, 1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(1.0, (n + 1) / warmup))

    def step(self, batch: Batch, *, version: int) -> dict[str, float]:
        """Train on one batch.

        Args:
            batch: all groups of the step.
            version: the learner's current version, for staleness.

        Returns:
            Metrics of the step by catalogue name.

        Raises:
            RunError: when reward, loss or gradient is not finite; the failing update has changed nothing.
        """
        config = self.config
        if not batch.reward.isfinite().all():
            raise RunError(f"rewards of the batch at version {version} are not finite; look at the reward function")
        costed = with_cost(
            batch.reward, batch.nfe, length=batch.length, speed_weight=config.speed_weight, form=config.cost
        )
        advantage = advantages(
            costed, batch.group, baseline=config.advantage_baseline, scale_by_std=config.advantage_std
        )
        metrics = _batch_metrics(batch, costed, version)
        rows = (advantage != 0) if self.reference is None else torch.ones_like(advantage, dtype=torch.bool)
        if not rows.any():
            self.steps_done += 1
            return metrics | {"learner_scored_completions": 0.0}
        kept = rows.nonzero().squeeze(-1)
        micro = self._micro_batches(batch.select(kept), advantage[kept])
        totals = {"completions": float(len(advantage)), "tokens": float(batch.scored.sum())}

        self.policy.eval()
        taus = [[self._taus(part, update) for part, _ in micro] for update in range(config.inner_updates)]
        proximal = self._proximal(micro, taus)
        for update in range(config.inner_updates):
            metrics |= self._update(micro, taus[update], proximal[update], totals, version)
        self.steps_done += 1
        return metrics | {"learner_scored_completions": float(len(kept))}

    def _taus(self, part: Batch, update: int) -> Tensor:
        config = self.config
        passes = config.surrogate_passes if self._learns_model else 1  # the head rides on the pass on z_0
        return draw_taus(part.seed, part.nfe, passes=passes, law=config.tau_law, update=update)

    @torch.no_grad()
    def _proximal(
        self, micro: list[tuple[Batch, Tensor]], taus: list[list[Tensor]]
    ) -> list[list[tuple[Tensor, Tensor] | None]]:
        """Proximal scores (tokens, thresholds) per inner update and micro-batch; None where they equal the current."""
        scores: list[list[tuple[Tensor, Tensor] | None]] = [[None] * len(micro)]
        for per_update in taus[1:]:
            row: list[tuple[Tensor, Tensor] | None] = []
            for (part, _), tau in zip(micro, per_update, strict=True):
                tokens, gammas, _, _ = self._score(self.policy, part, tau)
                row.append((tokens, gammas))
            scores.append(row)
        return scores

    def _score(self, policy: Policy, part: Batch, taus: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Token log-probs `[N, L]`, threshold log-probs `[N]`, threshold entropies `[M]`, rows forwarded."""
        with autocast(policy.device, enabled=self.config.autocast):
            scores = surrogate_log_probs(policy, part, taus, features=self._learns_threshold)
        if scores.features is None:
            nothing = part.gamma_logprob.new_zeros(len(part.gamma))
            return scores.logprob, nothing, nothing, scores.rows
        gammas = policy.head.log_prob(scores.features[part.group], part.gamma)
        return scores.logprob, gammas, policy.head.entropy(scores.features)[part.group], scores.rows

    def _update(
        self,
        micro: list[tuple[Batch, Tensor]],
        taus: list[Tensor],
        proximal: list[tuple[Tensor, Tensor] | None],
        totals: dict[str, float],
        version: int,
    ) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        sums = _Sums()
        loss = 0.0
        for (part, advantage), tau, prox in zip(micro, taus, proximal, strict=True):
            objective = self._objective(part, advantage, tau, prox, totals, sums, version)
            (-objective).backward()
            loss -= float(objective.detach())
        norm = float(
            clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.config.grad_clip)
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError(f"loss {loss} or gradient norm {norm} is not finite at version {version}; weights unchanged")
        self.optimizer.step()
        self.scheduler.step()
        self.updates_done += 1
        return _update_metrics(sums) | {"learner_loss": loss, "learner_gradient_norm": norm}

    def _objective(
        self,
        part: Batch,
        advantage: Tensor,
        taus: Tensor,
        proximal: tuple[Tensor, Tensor] | None,
        totals: dict[str, float],
        sums: _Sums,
        version: int,
    ) -> Tensor:
        config = self.config
        current, gammas, entropies, rows = self._score(self.policy, part, taus)
        prox_tokens, prox_gammas = proximal or (current.detach(), gammas.detach())
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        kind = {"cap": config.weight_cap, "kind": config.importance_weight}
        objective = current.new_zeros(())
        if self._learns_model:
            weight = importance_weight(prox_tokens, part.behaviour_logprob, **kind)
            values = clipped_objective(current, prox_tokens, weight, advantage.unsqueeze(-1), **clip)
            if self.reference is not None:
                with torch.no_grad():
                    reference = self._score(self.reference, part, taus)[0]
                kl = kl_k3(current, reference)
                values = values - config.kl_beta * kl
                sums.kl += float(kl[part.scored].sum().detach())
            objective = objective + token_mean(values, part.scored, kind=config.loss_mean, **totals)
        if self._learns_threshold:
            weight = importance_weight(prox_gammas, part.gamma_logprob, **kind)
            values = clipped_objective(gammas, prox_gammas, weight, advantage, **clip)
            values = values + config.entropy_bonus * entropies
            sums.entropy.append(entropies.detach())
            scale = config.threshold_weight if config.train == "joint" else 1.0
            objective = objective + scale * values.sum() / totals["completions"]
        self._observe(part, current.detach(), prox_tokens, version, sums)
        sums.rows += rows
        return objective

    def _observe(self, part: Batch, current: Tensor, proximal: Tensor, version: int, sums: _Sums) -> None:
        scored = part.scored
        sums.weights.append((proximal - part.behaviour_logprob).exp()[scored])
        sums.steps.append(part.reveal_step[scored])
        sums.stale.append((version - part.token_version)[scored])
        ratio = (current - proximal).exp()[scored]
        outside = (ratio < 1 - self.config.clip_low) | (ratio > 1 + self.config.clip_high)
        sums.clipped += float(outside.sum())
        sums.tokens += float(scored.sum())

    def _micro_batches(self, batch: Batch, advantage: Tensor) -> list[tuple[Batch, Tensor]]:
        """Whole groups, cut so that no part exceeds the token budget (one group may)."""
        width = batch.prompts.shape[1] + batch.length
        size = torch.bincount(batch.group)
        tokens = ((1 + size * max(self.config.surrogate_passes - 1, 0)) * width).tolist()
        parts, first, budget = [], 0, 0
        for group, cost in enumerate(tokens):
            if budget and budget + cost > self.config.micro_batch_tokens:
                parts.append((first, group))
                first, budget = group, 0
            budget += cost
        parts.append((first, len(tokens)))
        cut = []
        for low, high in parts:
            rows = ((batch.group >= low) & (batch.group < high)).nonzero().squeeze(-1)
            cut.append((batch.select(rows), advantage[rows]))
        return cut

    def state(self) -> dict[str, Any]:
        """Optimizer, schedule and counters, for a checkpoint."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps_done": self.steps_done,
            "updates_done": self.updates_done,
        }


def _batch_metrics(batch: Batch, costed: Tensor, version: int) -> dict[str, float]:
    drawn = batch.token_version >= 0
    oldest = batch.token_version.masked_fill(~drawn, version).amin(-1)
    revealed = drawn.sum(-1).float()
    log_gamma = batch.gamma.clamp(min=1e-9).log()
    return {
        "rollout_reward": float(batch.reward.mean()),
        "rollout_reward_costed": float(costed.mean()),
        "rollout_nfe": float(batch.nfe.float().mean()),
        "rollout_tokens_per_forward": float((revealed / batch.nfe).mean()),
        "rollout_token_entropy": float(batch.entropy[batch.scored].mean()),
        "threshold_gamma": float(log_gamma.mean().exp()),
        "threshold_gamma_spread": float(log_gamma.std()),
        "replay_staleness_mean": float((version - oldest).float().mean()),
        "replay_staleness_max": float((version - oldest).max()),
    }


def _update_metrics(sums: _Sums) -> dict[str, float]:
    weight, step, stale = torch.cat(sums.weights), torch.cat(sums.steps), torch.cat(sums.stale)
    metrics = {
        "learner_weight_ess": float(effective_sample_share(weight)),
        "learner_weight_mean": float(weight.mean()),
        "learner_clip_fraction": sums.clipped / max(sums.tokens, 1.0),
        "learner_kl": sums.kl / max(sums.tokens, 1.0),
        "learner_rows_forwarded": float(sums.rows),
    }
    if sums.entropy:
        metrics["threshold_entropy"] = float(torch.cat(sums.entropy).mean())
    for low, high in zip(STEP_BUCKETS, (*STEP_BUCKETS[1:], 1 << 15), strict=True):
        inside = (step >= low) & (step < high)
        if inside.any():
            metrics[f"learner_weight_mean{{reveal_step={low}}}"] = float(weight[inside].mean())
            metrics[f"learner_weight_ess{{reveal_step={low}}}"] = float(effective_sample_share(weight[inside]))
    for value in stale.unique().tolist():
        metrics[f"learner_weight_mean{{staleness={value}}}"] = float(weight[stale == value].mean())
        metrics[f"learner_weight_ess{{staleness={value}}}"] = float(effective_sample_share(weight[stale == value]))
    return metrics
