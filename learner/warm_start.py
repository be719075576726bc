"""Warm start: supervised masked-diffusion training on demonstrations.

LLaDA's objective (arXiv 2502.09992, eq. 3): t ~ U(0, 1), each completion token is masked with probability t, and the
cross-entropy of the masked ones is divided by t; the prompt is never masked. Completions are padded with EOS to L.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common.autocast import autocast
from common.config import Config, WarmStartConfig
from common.errors import RunError
from common.keyed_random import derive
from common.policy import Policy, open_policy
from common.tasks.task import Task
from common.token_scores import token_scores
from learner.demonstrations import demonstrations

WARMUP_SHARE = 0.05
FINAL_RATE = 0.1
SMALLEST_T = 1e-3  # keeps 1/t finite


def masked_diffusion_loss(policy: Policy, prompt: Tensor, completion: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """LLaDA's bound on the negative log-likelihood, per token (nats).

    Args:
        policy: the model.
        prompt: `[N, P]` ids, left-padded with PAD.
        completion: `[N, L]` ids.
        t: `[N]` in (0, 1], the masking probability of each row.
        noise: `[N, L]` uniforms; position `l` is masked where `noise < t`.
    """
    vocabulary = policy.vocabulary
    masked = noise < t.unsqueeze(-1)
    noisy = torch.where(masked, vocabulary.mask_id, completion)
    pad = prompt == vocabulary.pad_id
    leading = pad.int().cumprod(-1).bool()  # PAD may equal EOS inside a prompt; only the left run is padding
    attended = torch.cat([~leading, torch.ones_like(masked)], dim=1)
    hidden = policy.hidden(torch.cat([prompt, noisy], dim=1), attended)
    states = hidden[:, -completion.shape[1] :][masked]
    rows = torch.arange(len(states), device=states.device)
    losses = -token_scores(policy, states, rows, completion[masked])[0]
    return (losses / t.unsqueeze(-1).expand_as(masked)[masked]).sum() / masked.numel()


def warm_start(
    policy: Policy, task: Task, config: Config, *, report: Callable[[int, float], None] | None = None
) -> list[float]:
    """Train the policy's model in place; returns the loss of every step.

    Args:
        policy: trained in place.
        task: source of demonstrations unless `warm_start.file` is set.
        config: the run's configuration.
        report: called with (steps done, loss).

    Raises:
        RunError: when the loss is not finite.
    """
    settings = config.warm_start
    device = policy.device
    generator = torch.Generator().manual_seed(derive(config.run.seed, 1))
    stream = demonstrations(config, task, policy.tokenizer)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    losses = []
    policy.train()
    for step in range(settings.steps):
        prompt, completion = _stack([next(stream) for _ in range(settings.batch_size)], policy.vocabulary.pad_id)
        t = stratified(len(prompt), generator)
        noise = torch.rand(completion.shape, generator=generator)
        with autocast(device, enabled=settings.autocast):
            loss = masked_diffusion_loss(
                policy, prompt.to(device), completion.to(device), t.to(device), noise.to(device)
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(policy.model.parameters(), settings.grad_clip)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunError(f"warm start: loss {losses[-1]} at step {step + 1}; lower warm_start.learning_rate")
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, losses[-1])
    policy.eval()
    return losses


def supervised(config: Config, task: Task, folder: Path, report: Callable[[int, float], None] | None = None) -> Policy:
    """Open the policy, train it on demonstrations, and save it in `folder`."""
    policy = open_policy(config, task)
    torch.set_num_threads(config.warm_start.threads)
    warm_start(policy, task, config, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder)
    return policy


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """`count` masking probabilities, one in each of `count` equal parts of (0, 1] *(ours: less variance)*."""
    strata = torch.arange(count) + torch.rand(count, generator=generator)
    return (strata / count).clamp(min=SMALLEST_T)


def _rate(step: int, settings: WarmStartConfig) -> float:
    warmup = max(1, round(WARMUP_SHARE * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, settings.steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def _stack(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt, _ in pairs)
    prompts = [[pad_id] * (width - len(prompt)) + prompt for prompt, _ in pairs]
    return torch.tensor(prompts), torch.tensor([completion for _, completion in pairs])
