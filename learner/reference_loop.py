"""Reference loop: the whole method, from prompts to adopted weights, top to bottom. Documentation and oracle.

One process, no Ray, synchronous, a batch as one piece, no metrics. It calls the short pure functions that the formulas
are written in, and nothing of `learner.learner`, whose step it unrolls: `diffpo train` with `replay.max_staleness=0`
and a `learner.micro_batch_tokens` that holds the batch ends with the very same weights, bit for bit (CPU; tested).

The method is DiFFPO's (arXiv 2510.02212). Its full text could not be obtained: (paper) is known from its abstract,
reviews and summaries, (ours) completes it; numbers are sections of docs/method.md. Each learner step, with weights
theta of the model and phi of the threshold head, and `mu = inner_updates`:

    c_1, c_2, ...                        the next prompts, G completions of each; i counts all N completions
    gamma_i ~ p_phi(. | c)               a threshold per completion (paper; the head: ours)                     [6]
    o_i     ~ pi_theta(. | c), gamma_i   reveal, by ascending entropy H, the longest prefix U with
                                         sum_U H - max_U H <= gamma_i, until nothing is MASK (arXiv 2505.24857) [1]
    R_i = max(r_i, 0) (1 - a NFE_i / L) + min(r_i, 0),   a = speed_weight (ours)                                [2]
    A_i = (R_i - mean R) / (std R + 1e-4) inside the group (GRPO, arXiv 2402.03300; d1 leaves std out)         [2]

    prox = (theta, phi); mu times:
      tau_i ~ U{0 .. NFE_i - 1};  s(l) = tau_i where t(l) > tau_i, else 0
      pi(o^l) := pi(o^l | c, z_s(l))     2-MF (paper); m = 1 is d1; m of `distinct` values (ours)               [3]
      w_l   = min(C, pi_prox(o^l) / pi_behaviour(o^l | c, z_{t(l)-1})), a constant for the gradient (paper)     [4]
      rho_l = pi_theta(o^l) / pi_prox(o^l)
      J_model = mean_i mean_l w_l min(rho_l A_i, clip(rho_l, 1 - e_low, 1 + e_high) A_i)                        [5]
                over tokens up to and including the first stop token (mean in completions: paper; over tokens: d1)
      w_i   = min(C, p_prox(gamma_i | c) / p_behaviour(gamma_i | c)),  rho_i = p_phi(gamma_i | c) / p_prox(gamma_i | c)
      J_threshold = mean_i [ w_i min(rho_i A_i, clip(rho_i, 1 - e_low, 1 + e_high) A_i) + b H(p_phi(. | c)) ]   [6]
                same policy gradient, joint or alone (paper); clipped ratio, entropy bonus b where A_i != 0 (ours)
      (theta, phi) += AdamW(grad(J_model + k J_threshold)), gradient norm clipped, linear warm-up of the rates

At staleness 0 the behaviour policy has the weights of `prox` at the true latents, so `w` corrects the surrogate alone;
in the asynchronous system the same ratio corrects staleness too (ours). Rules `confidence` and `top_k` have no gamma.
Completions with A = 0 are not scored: their gradient is 0. Options that are not covered are refused (`COVERED`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from common.autocast import autocast
from common.config import Config, LearnerConfig
from common.cost import with_cost
from common.errors import UserError
from common.policy import Policy
from common.tasks import build_task
from common.weight_store import digest
from common.weights import to_flat
from learner.advantage import advantages
from learner.batch import Batch
from learner.objective import clipped_objective, importance_weight, token_mean
from learner.surrogate import draw_latents, surrogate_log_probs
from learner.synchronous_rollout import SynchronousRollout

# What the textbook covers, the usual value first, of keys that it does not cover whole.
COVERED = {
    "model.lora": (None,),
    "sampler.rule": ("entropy_bound", "confidence", "top_k"),
    "sampler.threshold.standardise": (False,),
    "learner.surrogate": ("mean_field",),
    "learner.prompt_masking": (0.0,),
    "learner.importance_weight": ("truncated", "none"),
    "learner.weight_level": ("token",),
    "learner.kl_beta": (0.0,),
    "learner.drift_remedy": ("none", "auto"),  # a Config has put hold_nfe for auto where auto means it
}


@dataclass(frozen=True)
class Step:
    """What one learner step saw, and the weights that it ended with; means over the batch's completions."""

    number: int
    """1-based; also the version of the weights."""
    reward: float
    """The task's reward."""
    reward_costed: float
    """After the cost of forward passes."""
    nfe: float
    """Forward passes per completion."""
    gamma: float
    """Threshold, nats."""
    digest: str
    """Of the weights after the step."""


def reference_loop(config: Config, policy: Policy) -> Iterator[Step]:
    """Train `policy` in place for `learner.steps` steps; yields after each.

    Sets torch's threads (`learner.threads`) and, under `run.deterministic`, its deterministic algorithms, both for the
    whole process, as `diffpo train` does in its own.

    Raises:
        UserError: at once, for an option that the reference loop does not cover.
        RunError: while it runs, when groups without spread in their rewards never fill a batch.
        RuntimeError: while it runs, when a gradient is not finite.
    """
    for key, covered in COVERED.items():
        if (value := attrgetter(key)(config)) not in covered:
            raise UserError(
                f"{key}={value} is not covered by the reference loop; set {key}={covered[0]}, or use diffpo train"
            )
    return _train(config, policy)


def _train(config: Config, policy: Policy) -> Iterator[Step]:
    settings = config.learner
    torch.set_num_threads(settings.threads)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    policy.eval()  # no dropout: likelihoods are compared between passes
    rollout = SynchronousRollout(config, build_task(config.task), copy.deepcopy(policy))
    optimizer, schedule = _optimizer(policy, settings)
    for number in range(1, settings.steps + 1):
        batch = rollout.batch()  # prompts, gammas, completions, rewards r
        costed = with_cost(  # R
            batch.reward, batch.nfe, length=batch.length, speed_weight=settings.speed_weight, form=settings.cost
        )
        advantage = advantages(  # A
            costed, batch.group, baseline=settings.advantage_baseline, scale_by_std=settings.advantage_std
        )
        _learn(policy, batch, advantage, optimizer, schedule, settings)
        weights = to_flat(policy)
        rollout.adopt(weights, number)
        yield Step(
            number=number,
            reward=float(batch.reward.mean()),
            reward_costed=float(costed.mean()),
            nfe=float(batch.nfe.float().mean()),
            gamma=float(batch.gamma.mean()),
            digest=digest(weights),
        )


def _optimizer(policy: Policy, settings: LearnerConfig) -> tuple[AdamW, LambdaLR]:
    """AdamW over what learns, model and head at rates of their own, which rise linearly over the warm-up."""
    parts = []
    if settings.train != "threshold":
        parts.append({"params": list(policy.model.parameters()), "lr": settings.learning_rate})
    if settings.train != "model":
        parts.append({"params": list(policy.head.parameters()), "lr": settings.threshold_learning_rate})
    policy.model.requires_grad_(settings.train != "threshold")
    policy.head.requires_grad_(settings.train != "model")
    optimizer = AdamW(parts, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay, fused=True)
    updates = max(settings.warmup_steps * settings.inner_updates, 1)
    return optimizer, LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / updates))


def _learn(
    policy: Policy, batch: Batch, advantage: Tensor, optimizer: AdamW, schedule: LambdaLR, settings: LearnerConfig
) -> None:
    """`inner_updates` steps of the optimizer on one batch; none where no completion has an advantage."""
    totals = {"completions": len(advantage), "tokens": float(batch.scored.sum())}  # zeros count in the means, too
    kept = advantage.nonzero().squeeze(-1)
    if not len(kept):
        return
    batch, advantage = batch.select(kept), advantage[kept]

    with torch.no_grad():  # pi_prox of the later updates, before the first one moves the weights
        later = [_score(policy, batch, settings, update) for update in range(1, settings.inner_updates)]
    for update in range(settings.inner_updates):
        current = _score(policy, batch, settings, update)
        proximal = later[update - 1] if update else current  # as a constant: the objective's functions detach it
        optimizer.zero_grad(set_to_none=True)
        objective = _objective(current, proximal, batch, advantage, totals, settings)
        (-objective).backward()
        learning = [parameter for part in optimizer.param_groups for parameter in part["params"]]
        clip_grad_norm_(learning, settings.grad_clip, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class _Scores:
    """What a policy says about the `N` completions of a batch; nats."""

    tokens: Tensor
    """`[N, L]`, ln pi(o^l)."""
    gammas: Tensor
    """`[N]`, ln p(gamma | c)."""
    entropies: Tensor
    """`[N]`, of p(. | c)."""


def _score(policy: Policy, batch: Batch, settings: LearnerConfig, update: int) -> _Scores:
    """Surrogate log-probs of tokens, and what the head says on prompt features of the same pass on `z_0`."""
    latents = draw_latents(batch, settings, update=update)  # tau is keyed: the same for every policy that is asked
    with autocast(policy.device, enabled=settings.autocast):
        found = surrogate_log_probs(policy, batch, latents, features=settings.train != "model")
    if found.features is None:  # the threshold does not learn
        nothing = torch.zeros_like(batch.gamma)
        return _Scores(found.logprob, nothing, nothing)
    gammas = policy.head.log_prob(found.features[batch.group], batch.gamma)
    return _Scores(found.logprob, gammas, policy.head.entropy(found.features)[batch.group])


def _objective(
    current: _Scores,
    proximal: _Scores,
    batch: Batch,
    advantage: Tensor,
    totals: dict[str, float],
    settings: LearnerConfig,
) -> Tensor:
    """`J_model + k J_threshold`, or the one of them that is trained; to be maximised."""
    weighting = {"cap": settings.weight_cap, "kind": settings.importance_weight}
    clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    objective = current.tokens.new_zeros(())
    if settings.train != "threshold":
        weight = importance_weight(proximal.tokens, batch.behaviour_logprob, **weighting)
        values = clipped_objective(current.tokens, proximal.tokens, weight, advantage.unsqueeze(-1), **clip)
        objective = objective + token_mean(values, batch.scored, kind=settings.loss_mean, **totals)
    if settings.train != "model":
        weight = importance_weight(proximal.gammas, batch.gamma_logprob, **weighting)
        values = clipped_objective(current.gammas, proximal.gammas, weight, advantage, **clip)
        values = values + settings.entropy_bonus * current.entropies
        scale = settings.threshold_weight if settings.train == "joint" else 1.0
        objective = objective + scale * values.sum() / totals["completions"]
    return objective
