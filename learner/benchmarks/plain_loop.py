"""A plain padded Hugging Face loop for our objective: the baseline of `diffpo bench learner`.

Written as dLLM-RL code bases write it (d1, arXiv 2504.12216): every completion is a row of its own with its prompt in
front; 2-MF is two forwards per completion, also where they are alike; `model(...).logits` and `log_softmax` of all
positions, prompt included; completions without advantage are trained on like the others; no metrics.

Algorithm as `learner.learner` computes it with `train: joint`, `loss_mean: completion`, one inner update and no KL,
written out again, so that a test can hold the two to each other. Same optimizer, schedule, autocast and token budget.
"""

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common.autocast import autocast
from common.config import LearnerConfig
from common.cost import with_cost
from common.policy import Policy
from learner.advantage import advantages
from learner.batch import Batch
from learner.surrogate import draw_taus


class PlainLoop:
    """Trains a policy as `Learner` does; `step` is called once per batch."""

    def __init__(self, policy: Policy, config: LearnerConfig, *, passes: int) -> None:
        """`passes` is m of the m-MF surrogate: 1 (d1) or 2."""
        self.policy = policy
        self.config = config
        self.passes = passes
        self.rows = 0
        groups = [
            {"params": list(policy.model.parameters()), "lr": config.learning_rate},
            {"params": list(policy.head.parameters()), "lr": config.threshold_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        warmup = max(config.warmup_steps, 1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(1.0, (n + 1) / warmup))

    def step(self, batch: Batch) -> float:
        """Train on one batch; returns the loss. `rows` counts the rows forwarded for it."""
        config = self.config
        costed = with_cost(
            batch.reward, batch.nfe, length=batch.length, speed_weight=config.speed_weight, form=config.cost
        )
        advantage = advantages(
            costed, batch.group, baseline=config.advantage_baseline, scale_by_std=config.advantage_std
        )
        width = batch.prompts.shape[1] + batch.length
        size = max(1, config.micro_batch_tokens // (self.passes * width))
        self.rows = 0
        self.policy.eval()
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for start in range(0, len(advantage), size):
            rows = slice(start, start + size)
            part = -self._objective(batch, rows, advantage[rows]) / len(advantage)
            part.backward()
            loss += float(part.detach())
        clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], config.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def _objective(self, batch: Batch, rows: slice, advantage: Tensor) -> Tensor:
        """Sum over some completions of what is to be maximised."""
        config = self.config
        low, high = 1 - config.clip_low, 1 + config.clip_high
        tokens, gammas, entropies = self._score(batch, rows)

        ratio = (tokens - tokens.detach()).exp()
        weight = self._weight(tokens, batch.behaviour_logprob[rows])
        gain = advantage.unsqueeze(-1)
        values = weight * torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
        scored = batch.scored[rows]
        model = (values.masked_fill(~scored, 0.0).sum(-1) / scored.sum(-1).clamp(min=1)).sum()

        ratio = (gammas - gammas.detach()).exp()
        weight = self._weight(gammas, batch.gamma_logprob[rows])
        values = weight * torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        threshold = (values + config.entropy_bonus * entropies).sum()
        return model + config.threshold_weight * threshold

    def _weight(self, proximal: Tensor, behaviour: Tensor) -> Tensor:
        if self.config.importance_weight == "none":
            return torch.ones_like(proximal)
        return (proximal.detach() - behaviour).exp().clamp(max=self.config.weight_cap)

    def _score(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Token log-probabilities `[N, L]`, threshold log-probabilities `[N]` and entropies `[N]`."""
        policy, completion, reveal = self.policy, batch.completion_ids[rows], batch.reveal_step[rows]
        masked = torch.full_like(completion, policy.vocabulary.mask_id)
        with autocast(policy.device, enabled=self.config.autocast):
            tokens, features = self._forward(batch, rows, masked)
            if self.passes > 1:
                tau = draw_taus(batch.seed[rows], batch.nfe[rows], passes=2, law=self.config.tau_law, update=0)
                early = reveal <= tau
                later, _ = self._forward(batch, rows, torch.where(early, completion, masked))
                tokens = torch.where(early, tokens, later)
        return tokens, policy.head.log_prob(features, batch.gamma[rows]), policy.head.entropy(features)

    def _forward(self, batch: Batch, rows: slice, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completion's tokens given a latent, `[N, L]`, and prompt features `[N, H]`."""
        group = batch.group[rows]
        prompt, attended = batch.prompts[group], batch.attended[group]
        everywhere = torch.cat([attended, torch.ones_like(latent, dtype=torch.bool)], dim=1)
        output = self.policy.model(
            input_ids=torch.cat([prompt, latent], dim=1),
            attention_mask=everywhere.long(),
            position_ids=(everywhere.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        )
        self.rows += len(latent)
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        logits = logits / batch.temperature[rows].view(-1, 1, 1).to(logits.dtype)
        logits[..., self.policy.vocabulary.mask_id] = -torch.inf
        target = torch.cat([prompt, batch.completion_ids[rows]], dim=1)
        log_probs = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        in_prompt = torch.cat([attended, torch.zeros_like(latent, dtype=torch.bool)], dim=1)
        features = self.policy.prompt_features(output.hidden_states[-1], in_prompt)
        return log_probs[:, prompt.shape[1] :], features
