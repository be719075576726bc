"""Warm start: supervised masked-diffusion training on demonstrations.

LLaDA's objective (arXiv 2502.09992, eq. 3): t ~ U(0, 1), each completion token is masked with probability t, and the
cross-entropy of the masked ones is divided by t; the prompt is never masked. Completions are padded with EOS to L.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.nn.utils import clip_grad_norm_

from common.autocast import autocast
from common.behaviour import reveal_log_probs
from common.config import Config, WarmStartConfig
from common.errors import RunError, UserError
from common.keyed_random import derive
from common.policy import Policy, open_policy
from common.tasks.task import Task

WARMUP_SHARE = 0.05
FINAL_RATE = 0.1
SMALLEST_T = 1e-3  # keeps 1/t finite


def demonstrations(config: Config, task: Task, policy: Policy) -> Iterator[tuple[list[int], list[int]]]:
    """Endless stream of (prompt ids, completion ids padded with EOS to L): the task's, or those of a JSONL file."""
    if config.warm_start.file is not None:
        pairs = read_demonstrations(config.warm_start.file)
        texts = (pairs[i] for order in _orders(len(pairs), config.run.seed) for i in order)
    else:
        texts = _from_task(task, config.run.seed)
    cache: dict[str, list[int]] = {}
    for number, (prompt, completion) in enumerate(texts, 1):
        for text in (prompt, completion):
            if text not in cache:
                cache[text] = policy.encode(text)
        ids, answer = cache[prompt], cache[completion]
        _check_lengths(number, ids, answer, config)
        padding = [policy.vocabulary.eos_id] * (config.sampler.max_completion_tokens - len(answer))
        if len(cache) > 100_000:
            cache.clear()
        yield ids, answer + padding


def _from_task(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    index = 0
    while True:
        example = task.example("train", index)
        yield example.prompt, task.demonstration(example, derive(seed, index))
        index += 1


def _orders(count: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield np.random.default_rng([seed, epoch]).permutation(count).tolist()
        epoch += 1


def read_demonstrations(path: str) -> list[tuple[str, str]]:
    """Pairs of a JSONL file with `prompt` and `completion`.

    Raises:
        UserError: naming file and line when something is missing or malformed, or when there is nothing.
    """
    if not Path(path).is_file():
        raise UserError(f"warm_start.file={path}: no such file; give a JSONL file with `prompt` and `completion`")
    pairs = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((str(row["prompt"]), str(row["completion"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: expected an object with `prompt` and `completion`, got {line[:60]!r} ({error})"
            ) from error
    if not pairs:
        raise UserError(f"warm_start.file={path} holds no demonstrations; add lines or leave the key out")
    return pairs


def _check_lengths(number: int, prompt: list[int], completion: list[int], config: Config) -> None:
    for name, ids, limit in (
        ("prompt", prompt, config.sampler.max_prompt_tokens),
        ("completion", completion, config.sampler.max_completion_tokens),
    ):
        if len(ids) > limit:
            raise UserError(
                f"demonstration {number}: {name} of {len(ids)} tokens exceeds sampler.max_{name}_tokens={limit}; "
                "raise the limit or shorten the text"
            )


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
    logits = policy.logits(hidden[:, -completion.shape[1] :][masked])
    losses = nll_loss(reveal_log_probs(logits, vocabulary.mask_id), completion[masked], reduction="none")
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
    stream = demonstrations(config, task, policy)
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
    """The policy that RL starts from, saved in `folder`: warm-started here unless it was given or steps are 0."""
    policy = open_policy(config, task)
    torch.set_num_threads(config.warm_start.threads)
    warm_start(policy, task, config, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder)
    return policy


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """`count` masking probabilities, each uniform on (0, 1] and together evenly spread *(ours; less variance)*."""
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
