"""Learner: from a batch of groups to new weights.

One `step`: advantages -> (proximal scores) -> `inner_updates` times {surrogate, objective, optimizer}.

- The proximal policy is the weights when the batch arrives. For the first inner update current and proximal are the
  same numbers, so no proximal pass is made; later updates score theirs before the first one moves the weights.
- Self-normalised weights need their mean over the whole batch before the first micro-batch: that mean alone comes from
  a proximal pass for the first update too. It is taken over what is scored, so over completions that carry gradient.
- Completions without advantage carry no gradient and are not scored (unless a KL term needs them).
- Gradients are sums over micro-batches of whole-batch means: how a batch is cut, and over how many ranks
  (`learner.ranks`) its groups are spread, does not change them.
- A batch with a reward, loss, gradient or importance weight that is not finite is refused and has changed nothing.
"""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter import adapted, learned_parameters, learned_state, without_adapter
from common.autocast import autocast
from common.config import LearnerConfig
from common.cost import with_cost
from common.policy import Policy
from common.weights import sharded
from learner.activation_checkpointing import activation_checkpointing, checkpointing_layers
from learner.advantage import advantages
from learner.batch import Batch
from learner.drift import DriftRemedy
from learner.micro_batches import cuts, micro_batches
from learner.objective import (
    clipped_objective,
    importance_weight,
    kl_k3,
    token_mean,
)
from learner.ranks import Ranks, cloned
from learner.record_rows import Observed
from learner.step_metrics import StepSums, batch_metrics, step_buckets, update_metrics
from learner.surrogate import draw_latents, mean_field, most_rows, surrogate_gap, surrogate_log_probs
from learner.trainer import BatchRefused

GAP_PASSES = (1, 2, 4)
GAP_COMPLETIONS = 32


@dataclass(frozen=True)
class _Scored:
    """What a policy says about one micro-batch; nats."""

    tokens: Tensor
    """`[N, L]` log-probs of tokens under the surrogate."""
    gammas: Tensor
    """`[N]` log-probs of thresholds; 0 where the head does not learn."""
    entropies: Tensor
    """`[N]` entropies of the threshold policy; 0 where the head does not learn."""
    sets: Tensor | None
    """`[N]` log-probs of one revealed set of each completion; None under rules that draw none."""
    revealed: Tensor | None
    """`[N, L]` bool, those sets."""
    rows: int
    """Rows forwarded."""


@dataclass(frozen=True)
class Terms:
    """What the objective of `N` completions is made of (docs/method.md, 4 to 6); logarithms in nats."""

    advantage: Tensor
    """`[N]`."""
    logprob: Tensor
    """`[N, L]` of tokens under the surrogate."""
    proximal: Tensor
    """`[N, L]`, the proximal policy's."""
    weight: Tensor | None
    """`[N, L]` importance weights; None where the model does not learn."""
    objective: Tensor | None
    """`[N, L]` clipped objective of each token, less its KL term, with its share of the revealed set's."""
    kl: Tensor | None
    """`[N, L]` k3 estimates; None without a KL term."""
    gamma_logprob: Tensor
    """`[N]` of thresholds; 0 where the head does not learn."""
    gamma_weight: Tensor | None
    """`[N]` importance weights of thresholds; None where the head does not learn."""
    gamma_objective: Tensor | None
    """`[N]` clipped objective of each threshold, with the entropy bonus."""
    gamma_entropy: Tensor
    """`[N]` entropies of the threshold policy."""
    rows: int
    """Rows forwarded."""


@dataclass(frozen=True)
class _Proximal:
    """What the proximal policy says about one inner update."""

    update: int
    """Index of the inner update."""
    scores: list[_Scored | None]
    """Per micro-batch; None where they equal the current ones."""
    mean_weight: float = 1.0
    """Mean truncated weight of all scored tokens, for self-normalised weights."""
    rows: int = 0
    """Forwarded for it."""


class Learner:
    """Holds policy and optimizer for a whole run; `step` is called once per batch."""

    def __init__(self, policy: Policy, config: LearnerConfig, ranks: Ranks | None = None) -> None:
        """With several `ranks` the policy becomes sharded, with the weights that it has on rank 0."""
        self.policy = policy
        self.config = config
        self._ranks = ranks or Ranks()
        self.steps_done = 0
        self.updates_done = 0
        self._seen: tuple[Tensor, ...] | None = None
        self._learns_model = config.train in ("model", "joint")
        self._learns_threshold = config.train in ("threshold", "joint")
        self._remedy = DriftRemedy(policy, config.drift_remedy)
        if config.activation_checkpointing:
            checkpointing_layers(policy.model)  # refuses a model that has none before anything is spent
        several = self._ranks.count > 1
        self.reference = reference_policy(policy, share=several) if config.kl_beta > 0 else None
        self._ranks.shard(policy)
        if self.reference is not None and self.reference is not policy:
            self._ranks.shard(self.reference)
        learned = [parameter for _, parameter in learned_parameters(policy.model)]
        for parameter in learned:
            parameter.requires_grad_(self._learns_model)
        policy.head.requires_grad_(self._learns_threshold)
        groups = []
        if self._learns_model:
            groups.append({"params": learned, "lr": config.learning_rate})
        if self._learns_threshold:
            groups.append({"params": list(policy.head.parameters()), "lr": config.threshold_learning_rate})
        mixed = {sharded(parameter) for parameter in learned} == {False, True}  # which only the plain loop takes
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=not mixed,
            foreach=False if mixed else None,
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
            BatchRefused: when reward, loss or gradient is not finite; nothing has changed then.
        """
        config = self.config
        if not batch.reward.isfinite().all():
            raise BatchRefused(f"rewards of the batch at version {version} are not finite; look at the reward function")
        costed, advantage = self._earned(batch)
        batch = replace(batch, row=torch.arange(len(advantage), device=advantage.device))
        metrics = batch_metrics(batch, costed, advantage, version)
        self._seen = costed, advantage, torch.full_like(batch.behaviour_logprob, torch.nan)
        self.policy.eval()
        if config.diagnostics_every and self.steps_done % config.diagnostics_every == 0:
            metrics |= self._surrogate_kl(batch)
        rows = (advantage != 0) if self.reference is None else torch.ones_like(advantage, dtype=torch.bool)
        first = self.steps_done == 0 and self._learns_threshold and self.policy.head.config.standardise
        # a batch that is refused may have changed something: its features were fitted, or it is a later update
        unfitted = cloned(self.policy.calibration.state_dict()) if first else None
        before = self._copy() if config.inner_updates > 1 else None
        if first:
            self._standardise(batch)
        if not rows.any():
            self.steps_done += 1
            return metrics | self._remedy.update(batch) | {"learner_scored_completions": 0.0}
        kept = rows.nonzero().squeeze(-1)
        micro, fillers = self._share(batch.select(kept), advantage[kept])
        totals = {"completions": float(len(advantage)), "tokens": float(batch.scored.sum())}
        try:
            forwarded = 0.0
            for proximal in self._proximal(micro, fillers):
                metrics |= self._update(micro, proximal, totals, version, fillers)
                forwarded += metrics["learner_rows_forwarded"]
            metrics["learner_rows_forwarded"] = forwarded
        except BatchRefused:
            if unfitted is not None:
                self.policy.calibration.load_state_dict(unfitted)
            if before is not None:
                self.policy.load_state_dict(before["policy"], strict=False)
                self._restore(before)
            raise
        self.steps_done += 1
        return metrics | self._remedy.update(batch) | {"learner_scored_completions": float(len(kept))}

    def observed(self) -> Observed:
        """Of the batch of the last `step`; weights of the completions that this rank scored."""
        if self._seen is None:
            raise RuntimeError("observed comes after step")
        return Observed(*(tensor.float().cpu().numpy() for tensor in self._seen))

    @torch.no_grad()
    def terms(self, batch: Batch) -> Terms:
        """What the first inner update is made of if these groups alone are its batch; changes nothing.

        Completions without advantage are scored as well, and count in the mean of self-normalised weights.
        """
        self.policy.eval()
        _, advantage = self._earned(batch)
        first, *_ = self._proximal([(batch, advantage)])
        return self._terms(batch, advantage, first, None)

    def _earned(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rewards after their cost, and advantages, `[N]` each."""
        config = self.config
        costed = with_cost(
            batch.reward, batch.nfe, length=batch.length, speed_weight=config.speed_weight, form=config.cost
        )
        advantage = advantages(
            costed, batch.group, baseline=config.advantage_baseline, scale_by_std=config.advantage_std
        )
        return costed, advantage

    @torch.no_grad()
    def _standardise(self, batch: Batch) -> None:
        """Fit the head's features to the first batch; its thresholds do not depend on them, the weights are still 0."""
        head = self.policy.head
        if not head.linear.weight.any() and len(batch.prompts) > 1:
            latents = mean_field(batch, batch.reveal_step[:, :0])
            features = surrogate_log_probs(self.policy, batch, latents, features=True).features
            if features is not None:
                self.policy.calibration.fit_features(features)

    @torch.no_grad()
    def _proximal(self, micro: list[tuple[Batch, Tensor]], fillers: int = 0) -> list[_Proximal]:
        """Proximal scores of each inner update, as far as they are needed; the last `fillers` do not count."""
        normalised = self._learns_model and self.config.importance_weight == "self_normalised"
        found = []
        for update in range(self.config.inner_updates):
            if update == 0 and not normalised:
                found.append(_Proximal(update, [None] * len(micro)))
                continue
            scores: list[_Scored | None] = [self._score(self.policy, part, update) for part, _ in micro]
            rows = sum(found.rows for found in scores[: len(micro) - fillers] if found)
            mean = 1.0
            if normalised:
                pairs = zip(scores, micro, strict=True)
                weights = [self._weight(found.tokens, part)[part.scored] for found, (part, _) in pairs if found]
                own = torch.cat(weights[: len(micro) - fillers] or [weights[0][:0]]).double()
                total, count = self._ranks.sum(float(own.sum()), len(own))
                mean = total / count
            found.append(_Proximal(update, scores if update else [None] * len(micro), mean, rows))
        return found

    def _weight(self, proximal: Tensor, part: Batch, mean: float = 1.0) -> Tensor:
        config = self.config
        return importance_weight(
            proximal,
            part.behaviour_logprob,
            cap=config.weight_cap,
            kind=config.importance_weight,
            mean=mean,
            level=config.weight_level,
            scored=part.scored,
        )

    def _score(self, policy: Policy, part: Batch, update: int) -> _Scored:
        latents = draw_latents(part, self.config, update=update)
        again = self.config.activation_checkpointing and torch.is_grad_enabled()
        with (
            self._autocast(policy),
            activation_checkpointing(policy.model, enabled=again),
        ):
            scores = surrogate_log_probs(policy, part, latents, features=self._learns_threshold)
        gammas = entropies = part.gamma_logprob.new_zeros(len(part.gamma))
        if scores.features is not None:
            gammas = policy.head.log_prob(scores.features[part.group], part.gamma)
            entropies = policy.head.entropy(scores.features)[part.group]
        return _Scored(scores.logprob, gammas, entropies, scores.reveal_logprob, scores.revealed, scores.rows)

    def _autocast(self, policy: Policy) -> AbstractContextManager:
        """No whole model in bfloat16 stands beside the weights where memory is worth a second computation."""
        config = self.config
        return autocast(policy.device, enabled=config.autocast, cache=not config.activation_checkpointing)

    def _update(
        self,
        micro: list[tuple[Batch, Tensor]],
        proximal: _Proximal,
        totals: dict[str, float],
        version: int,
        fillers: int,
    ) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        sums = StepSums(rows=proximal.rows)
        own = len(micro) - fillers
        for index, ((part, advantage), scores) in enumerate(zip(micro, proximal.scores, strict=True)):
            counted = sums if index < own else StepSums()
            objective = self._objective(part, advantage, proximal, scores, totals, counted, version)
            share = self._ranks.count if index < own else 0.0  # gradients are averaged over ranks
            (-share * objective).backward()
            counted.loss -= float(objective.detach())
        norm = self._ranks.clip([p for g in self.optimizer.param_groups for p in g["params"]], self.config.grad_clip)
        sums = StepSums.together(self._ranks.gathered(sums))
        loss = sums.loss
        if not (math.isfinite(loss) and math.isfinite(norm) and all(w.isfinite().all() for w in sums.weights)):
            self.optimizer.zero_grad(set_to_none=True)
            raise BatchRefused(
                f"loss {loss}, gradient norm {norm} or an importance weight is not finite at version {version}; "
                "weights unchanged"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.updates_done += 1
        return update_metrics(sums) | {"learner_loss": loss, "learner_gradient_norm": norm}

    def _objective(
        self,
        part: Batch,
        advantage: Tensor,
        proximal: _Proximal,
        scores: _Scored | None,
        totals: dict[str, float],
        sums: StepSums,
        version: int,
    ) -> Tensor:
        config = self.config
        terms = self._terms(part, advantage, proximal, scores)
        if proximal.update == 0 and terms.weight is not None and self._seen is not None:
            self._seen[-1][part.row] = terms.weight.detach().where(part.scored, torch.nan).to(self._seen[-1].dtype)
        objective = terms.logprob.new_zeros(())
        if terms.objective is not None:
            objective = objective + token_mean(terms.objective, part.scored, kind=config.loss_mean, **totals)
        if terms.kl is not None:
            sums.kl += float(terms.kl[part.scored].sum().detach())
        if terms.gamma_objective is not None:
            sums.entropy.append(terms.gamma_entropy.detach())
            scale = config.threshold_weight if config.train == "joint" else 1.0
            objective = objective + scale * terms.gamma_objective.sum() / totals["completions"]
        sums.observe(part, terms.logprob.detach(), terms.proximal, version, self.config)
        sums.rows += terms.rows
        return objective

    def _terms(self, part: Batch, advantage: Tensor, proximal: _Proximal, scores: _Scored | None) -> Terms:
        config = self.config
        found = self._score(self.policy, part, proximal.update)
        current, gammas = found.tokens, found.gammas
        prox_tokens = scores.tokens if scores else current.detach()
        prox_gammas = scores.gammas if scores else gammas.detach()
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        weight = objective = kl = gamma_weight = gamma_objective = None
        rows = found.rows
        if self._learns_model:
            weight = self._weight(prox_tokens, part, proximal.mean_weight)
            objective = clipped_objective(current, prox_tokens, weight, advantage.unsqueeze(-1), **clip)
            if self.reference is not None:
                with torch.no_grad(), without_adapter(self.reference):
                    reference = self._score(self.reference, part, proximal.update)
                rows += reference.rows
                kl = kl_k3(current, reference.tokens)
                objective = objective - config.kl_beta * kl
            objective = objective + self._set_objective(part, advantage, found, scores)
        if self._learns_threshold:
            gamma_weight = importance_weight(
                prox_gammas, part.gamma_logprob, cap=config.weight_cap, kind=config.importance_weight
            )
            gamma_objective = clipped_objective(gammas, prox_gammas, gamma_weight, advantage, **clip)
            gamma_objective = gamma_objective + config.entropy_bonus * found.entropies
        return Terms(
            advantage=advantage,
            logprob=current,
            proximal=prox_tokens,
            weight=weight,
            objective=objective,
            kl=kl,
            gamma_logprob=gammas,
            gamma_weight=gamma_weight,
            gamma_objective=gamma_objective,
            gamma_entropy=found.entropies,
            rows=rows,
        )

    def _set_objective(self, part: Batch, advantage: Tensor, found: _Scored, proximal: _Scored | None) -> Tensor:
        """What a completion's revealed sets add to its objective, spread over its scored tokens `[N, L]`.

        NFE times the clipped objective of the one set that is scored. Its latent is the true one, so its weight is for
        staleness only.
        """
        if found.sets is None or found.revealed is None:
            return found.tokens.new_zeros(())
        config = self.config
        prox = proximal.sets if proximal and proximal.sets is not None else found.sets.detach()
        recorded = part.reveal_logprob.masked_fill(~found.revealed, 0.0).amin(-1)
        weight = importance_weight(prox, recorded, cap=config.weight_cap, kind=config.importance_weight)
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        value = clipped_objective(found.sets, prox, weight, advantage, **clip) * part.nfe
        return (value / part.scored.sum(-1).clamp(min=1)).unsqueeze(-1)

    def _share(self, batch: Batch, advantage: Tensor) -> tuple[list[tuple[Batch, Tensor]], int]:
        """This rank's micro-batches, and how many of them, the last, do not count: every rank makes as many passes."""
        if self._ranks.count == 1:
            return self._micro_batches(batch, advantage), 0
        costs = most_rows(torch.bincount(batch.group), self.config)
        rows = self._ranks.share(costs)[batch.group].nonzero().squeeze(-1)
        micro = self._micro_batches(batch.select(rows), advantage[rows]) if len(rows) else []
        fillers = self._ranks.most(len(micro)) - len(micro)
        cheapest = (batch.group == costs.argmin()).nonzero().squeeze(-1)
        filler, *_ = self._micro_batches(batch.select(cheapest), advantage[cheapest])
        return micro + [filler] * fillers, fillers

    def _micro_batches(self, batch: Batch, advantage: Tensor) -> list[tuple[Batch, Tensor]]:
        parts = micro_batches(batch, self.config)
        return [(batch.select(rows), advantage[rows]) for rows in parts]

    def _surrogate_kl(self, batch: Batch) -> dict[str, float]:
        """KL from the exact to the surrogate distributions under the current weights, by passes and reveal step."""
        count = min(len(batch.nfe), GAP_COMPLETIONS)
        sample = batch.select(torch.arange(count, device=batch.nfe.device) * len(batch.nfe) // count)
        gaps: dict[int, list[Tensor]] = {passes: [] for passes in GAP_PASSES}
        for low, high in cuts(sample.nfe, sample, self.config.micro_batch_tokens):
            part = sample.select(torch.arange(low, high, device=batch.nfe.device))
            with self._autocast(self.policy):
                found = surrogate_gap(self.policy, part, GAP_PASSES)
            for passes, gap in found.items():
                gaps[passes].append(gap)
        step = sample.reveal_step[sample.scored]
        return {
            f"learner_surrogate_kl{{passes={passes},reveal_step={low}}}": float(
                torch.cat(gap)[sample.scored][inside].mean()
            )
            for passes, gap in gaps.items()
            for low, inside in step_buckets(step)
        }

    def _copy(self) -> dict[str, Any]:
        return cloned(self.state() | {"policy": learned_state(self.policy)})

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` gave, whole, which rank 0 alone has; the policy's weights are its owner's to load."""
        optimizer = self._ranks.optimizer_state(self.optimizer, state["optimizer"] if state else None)
        rest = self._ranks.agreed(
            {name: item for name, item in state.items() if name != "optimizer"} if state else None
        )
        self._restore(rest | {"optimizer": optimizer})

    def _restore(self, state: dict[str, Any]) -> None:
        saved = state["optimizer"]
        # which kernels can be used is for these ranks to say; `step` is loaded to where they want it
        own = {key: self.optimizer.defaults[key] for key in ("fused", "foreach")}
        self.optimizer.load_state_dict(saved | {"param_groups": [group | own for group in saved["param_groups"]]})
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps_done, self.updates_done = state["steps_done"], state["updates_done"]
        self._remedy.restore(state["drift_remedy"])
        torch.set_rng_state(state["generator"])

    def state(self) -> dict[str, Any]:
        """Optimizer, schedule and counters, for a checkpoint; sharded where the policy is."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps_done": self.steps_done,
            "updates_done": self.updates_done,
            "drift_remedy": self._remedy.state(),
            "generator": torch.get_rng_state(),
        }


def reference_policy(policy: Policy, *, share: bool = False) -> Policy:
    """What the KL term holds a policy to, as it is now: the policy itself less its adapter, else a frozen copy.

    With `share` the copy has the memory of the policy's parameters, of which both are about to be sharded.
    """
    if adapted(policy):
        return policy
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in policy.parameters()} if share else {}
    return copy.deepcopy(policy, shared).requires_grad_(False)
