"""Warm start: supervised masked-diffusion training on demonstrations.

LLaDA's objective (arXiv 2502.09992, eq. 5): t ~ U(0, 1], each completion token is masked with probability t, and the
cross-entropy of the masked ones is divided by t; the prompt is never masked. Completions are padded with EOS, which
counts as part of them. The loss is the mean over demonstrations of the mean over a completion's tokens, whatever rows
and micro-batches they are laid out in (`learner.packing`).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common.autocast import autocast
from common.checkpoint_store import CheckpointStore
from common.config import Config, WarmStartConfig
from common.errors import RunError, one_line
from common.keyed_random import derive
from common.new_folder import sync, writing
from common.policy import Policy
from common.policy_loading import load_policy, open_policy
from common.tasks.task import Task
from common.token_scores import token_scores
from learner.activation_checkpointing import activation_checkpointing
from learner.demonstrations import Demonstration, Demonstrations
from learner.packing import Rows, micro_batches

WARMUP_SHARE = 0.05
FINAL_RATE = 0.1
SMALLEST_T = 1e-3  # keeps 1/t finite
STATE = "warm_start_state.pt"
KEPT_CHECKPOINTS = 2

Report = Callable[[dict[str, float]], None]


def masked_diffusion_loss(policy: Policy, rows: Rows) -> Tensor:
    """LLaDA's bound on the negative log-likelihood, per token (nats): the part of a step that these rows are."""
    mask_id = policy.vocabulary.mask_id
    masked = rows.noise < rows.rate
    noisy = torch.where(masked, mask_id, rows.ids)
    segments = rows.segments if rows.several else None
    hidden = policy.hidden(noisy, rows.segments > 0, segments=segments)
    states = hidden[masked]
    each = torch.arange(len(states), device=states.device)
    losses = -token_scores(policy, states, each, rows.ids[masked])[0]
    return (losses / rows.rate[masked] * rows.weight[masked]).sum()


class WarmStart:
    """Trains a policy's model in place, step by step; `state` and `restore` let another process go on."""

    def __init__(self, policy: Policy, task: Task, config: Config) -> None:
        """
        Args:
            policy: trained in place.
            task: source of demonstrations unless `warm_start.file` is set.
            config: the run's configuration.

        Raises:
            UserError: for a file of demonstrations that cannot be used.
        """
        self.policy, self._config, self._settings = policy, config, config.warm_start
        self.steps = self.tokens = self.skipped = 0
        """Steps done; tokens of the demonstrations that they took; demonstrations left out as too long."""
        self._position = 0
        self._generator = torch.Generator().manual_seed(derive(config.run.seed, 1))
        self._demonstrations = Demonstrations(config, task, policy.tokenizer)
        self._held_out = self._demonstrations.held_out()
        self._parameters = [one for one in policy.model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._settings.learning_rate, weight_decay=self._settings.weight_decay, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step, self._settings))

    def step(self) -> float:
        """One optimizer step; its loss.

        Raises:
            UserError: for a demonstration that cannot be used.
            RunError: when the loss or the gradient is not finite; the weights stay as they were.
        """
        demonstrations = self._take()
        self.policy.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows in self._laid_out(demonstrations, self._generator):
            cache = not self._config.learner.activation_checkpointing
            with autocast(self.policy.device, enabled=self._settings.autocast, cache=cache), self._checkpointing():
                loss = masked_diffusion_loss(self.policy, rows)
            loss.backward()
            total += float(loss.detach())
        self.policy.eval()
        if not math.isfinite(total):
            raise RunError(f"warm start: loss {total} at step {self.steps + 1}; lower warm_start.learning_rate")
        norm = float(clip_grad_norm_(self._parameters, self._settings.grad_clip))
        if not math.isfinite(norm):
            raise RunError(f"warm start: gradient norm {norm} at step {self.steps + 1}; lower warm_start.learning_rate")
        self._optimizer.step()
        self._schedule.step()
        self.steps += 1
        return total

    def held_out_loss(self) -> float:
        """Loss of the held-out demonstrations, with the same masks each time; NaN where there are none."""
        if not self._held_out:
            return math.nan
        with torch.no_grad(), autocast(self.policy.device, enabled=self._settings.autocast):
            rows = self._laid_out(self._held_out, torch.Generator().manual_seed(0))
            return sum(float(masked_diffusion_loss(self.policy, one)) for one in rows)

    def state(self) -> dict[str, Any]:
        """All but the weights."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "position": self._position,
            "generator": self._generator.get_state(),
            "global_generator": torch.get_rng_state(),  # dropout draws from it
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; the policy must have its weights already."""
        self.steps, self.tokens, self.skipped = state["steps"], state["tokens"], state["skipped"]
        self._position = state["position"]
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _checkpointing(self) -> AbstractContextManager[None]:
        return activation_checkpointing(self.policy.model, enabled=self._config.learner.activation_checkpointing)

    def _take(self) -> list[Demonstration]:
        """The demonstrations of the next step."""
        settings, taken, tokens = self._settings, [], 0
        while tokens < settings.batch_tokens if settings.batch_tokens else len(taken) < settings.batch_size:
            found, place = self._demonstrations.fitting(self._position)
            self.skipped += place - self._position
            self._position = place + 1
            taken.append(found)
            tokens += found.tokens
        self.tokens += tokens
        return taken

    def _laid_out(self, demonstrations: list[Demonstration], generator: torch.Generator) -> list[Rows]:
        settings = self._settings
        t = stratified(len(demonstrations), generator)
        noise = torch.rand(sum(len(one.completion) for one in demonstrations), generator=generator)
        packs = settings.pack and self.policy.takes_segments
        rows = micro_batches(
            demonstrations,
            t,
            noise,
            pad_id=self.policy.vocabulary.pad_id,
            width=settings.max_tokens if packs else None,
            budget=settings.micro_batch_tokens,
        )
        return [one.to(self.policy.device) for one in rows]


def warm_start(policy: Policy, task: Task, config: Config, *, report: Report | None = None) -> list[float]:
    """Train the policy's model in place to the end; returns the loss of every step. Arguments as `WarmStart`."""
    return _run(WarmStart(policy, task, config), config, report)


def supervised(
    config: Config, task: Task, folder: Path, report: Report | None = None, checkpoints: CheckpointStore | None = None
) -> Policy:
    """Open the policy, train it on demonstrations, and save it in `folder`.

    Args:
        config: the run's configuration.
        task: see `WarmStart`.
        folder: written at the end.
        report: called after every step with `warm_start_` metrics.
        checkpoints: where `warm_start.checkpoint_every` writes, and where it goes on, if there is one; removed at the
            end.

    Raises:
        UserError, RunError: as `WarmStart.step`; also when a checkpoint is not this warm start's, or when there is
            no room.
    """
    torch.set_num_threads(config.warm_start.threads)
    found = checkpoints.newest_sound() if checkpoints is not None else None
    if checkpoints is None or found is None:
        started = WarmStart(open_policy(config, task), task, config)
    else:
        with checkpoints.fetch(found.checkpoint) as saved:
            started = _restored(saved, task, config)
    _run(started, config, report, checkpoints)
    save_start(started.policy, folder)
    if checkpoints is not None:
        checkpoints.remove()
    return started.policy


def save_start(policy: Policy, folder: Path) -> None:
    """Write the weights that training starts from, to survive a power failure. Raises RunError when that fails."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        policy.save(folder)
        for path in (*folder.iterdir(), folder):
            sync(path)


def _run(
    started: WarmStart, config: Config, report: Report | None, checkpoints: CheckpointStore | None = None
) -> list[float]:
    settings, losses = config.warm_start, []
    while started.steps < settings.steps:
        losses.append(started.step())
        last = started.steps == settings.steps
        if report is not None:
            values = {
                "warm_start_steps": float(started.steps),
                "warm_start_loss": losses[-1],
                "warm_start_tokens": float(started.tokens),
                "warm_start_skipped": float(started.skipped),
            }
            if settings.held_out and (last or started.steps % settings.held_out_every == 0):
                values["warm_start_held_out_loss"] = started.held_out_loss()
            report(values)
        due = settings.checkpoint_every and started.steps % settings.checkpoint_every == 0
        if checkpoints is not None and due and not last:
            _save(started, checkpoints)
    return losses


def _save(started: WarmStart, checkpoints: CheckpointStore) -> None:
    draft = checkpoints.begin(started.steps)
    try:
        started.policy.save(draft.path)
        torch.save(started.state(), draft.path / STATE)
        draft.commit(version=started.steps, journal_index=0, facts={})
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        draft.abandon()
        raise RunError(
            f"checkpoint of warm-start step {started.steps} in {checkpoints.name} cannot be written: "
            f"{one_line(error)}; make room there"
        ) from error
    checkpoints.prune(KEPT_CHECKPOINTS)


def _restored(folder: Path, task: Task, config: Config) -> WarmStart:
    model = config.model
    if model.path is None:  # all of a small model is trained, and adapted when that is done
        model = model.model_copy(update={"lora": None})
    started = WarmStart(load_policy(folder, model, config.sampler.threshold), task, config)
    try:
        started.restore(torch.load(folder / STATE, map_location="cpu", weights_only=True))
    except Exception as error:  # a state can be wrong in more ways than torch has errors for
        raise RunError(
            f"checkpoint {folder} does not fit this warm start: {one_line(error)}; resume the run it belongs to"
        ) from error
    return started


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
