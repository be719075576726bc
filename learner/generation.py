"""Generation for people: one prompt, and how its completion appears step by step."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from actors.engine import DenoisingEngine
from actors.request import WAY_OUT, Failure, Request
from common.config import ModelConfig, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError, UserError
from common.policy import Policy
from common.policy_loading import load_policy
from common.prompt import has_unknown
from common.trajectory import Completion
from learner.preflight import check_device
from learner.run_directory import RUN_CONFIG

BLANK, STOP = "░", "·"
USUAL_TOKENS = 16
SECONDS_SHOWN = 0.15  # of each step on a terminal, so that the eye can follow


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `diffpo generate` was asked for."""

    prompt: str
    tokens: int
    block: int | None
    rule: str
    threshold: float | None
    """The rule's parameter; None is the learned threshold, or for other rules their usual value."""
    temperature: float
    seed: int
    cache: str
    device: str
    raw: bool
    """Whether the prompt is taken as it is, without the tokenizer's chat template."""
    mask_token: str | None = None
    """MASK, where neither the tokenizer nor the model's configuration names it."""


def generate(folder: Path, choice: Choice, console: Console, *, show_steps: bool) -> Completion:
    """Denoise one completion and print it, with NFE and tokens per forward (TPF).

    Raises:
        UserError: for a model, device, prompt or parameter that cannot be used.
        RunError: when the model's logits are not finite.
    """
    check_device(choice.device)
    model = ModelConfig(
        device=choice.device, chat_template="off" if choice.raw else "auto", mask_token=choice.mask_token
    )
    policy = load_policy(folder, model, ThresholdConfig())
    prompt = checked_prompt(policy, choice.prompt)
    engine = DenoisingEngine(
        policy,
        slots=1,
        rule=choice.rule,
        max_prompt_tokens=max(1, len(prompt)),
        completion_tokens=choice.tokens,
        block_length=choice.block,
        cache=choice.cache,
    )
    own = own_threshold(folder)
    usual = {"entropy_bound": own, "sampled_entropy_bound": own, "confidence": 0.9, "top_k": 1.0}[choice.rule]
    threshold = usual if choice.threshold is None else choice.threshold
    handle = engine.submit(
        Request(prompt_ids=prompt, seed=choice.seed, group=0, temperature=choice.temperature, threshold=threshold)
    )
    outcome = _watch(engine, handle, policy, console) if show_steps else _run(engine)
    if isinstance(outcome, Failure):
        raise RunError(f"{outcome.reason}; {WAY_OUT}")
    given = not isinstance(threshold, str)  # else it is the policy's own, times its scale
    used = outcome.gamma * (1.0 if given else policy.calibration.gamma_scale)
    drawn = int((outcome.reveal_step <= outcome.nfe).sum())
    console.print(policy.decode(outcome.completion_ids.tolist()), style="bold")
    console.print(
        f"NFE {outcome.nfe}  TPF {drawn / outcome.nfe:.2f}  {drawn} tokens revealed  threshold {used:.3g}  "
        f"ended by {outcome.finish_reason}"
    )
    return outcome


def usual_tokens(folder: Path) -> int:
    """The completion length of the run that wrote a checkpoint, where the folder says which it was."""
    file = folder / RUN_CONFIG
    return load_config(file).sampler.max_completion_tokens if file.is_file() else USUAL_TOKENS


def own_threshold(folder: Path) -> Literal["mean", "initial"]:
    """What a policy takes for gamma: the mean of its head, or what a run that trained the model alone was given."""
    file = folder / RUN_CONFIG
    return "initial" if file.is_file() and load_config(file).learner.train == "model" else "mean"


def checked_prompt(policy: Policy, text: str) -> tuple[int, ...]:
    """The prompt's ids.

    Raises:
        UserError: for a text of which nothing is left, or which the tokenizer does not know.
    """
    ids = tuple(policy.encode_prompt(text))
    if not ids:
        raise UserError("the prompt is empty, or the chat template makes nothing of it; give some text, or --raw")
    if has_unknown(policy.tokenizer, ids):
        raise UserError(f"prompt {text[:60]!a} has characters that the tokenizer does not know; use others")
    return ids


def _run(engine: DenoisingEngine) -> Completion | Failure:
    while True:
        for _, outcome in engine.step():
            return outcome


def _watch(engine: DenoisingEngine, handle: int, policy: Policy, console: Console) -> Completion | Failure:
    """Step the engine and show every latent: redrawn in place on a terminal, a line each elsewhere."""
    before = engine.latent(handle)
    step = 0
    with Live(console=console, refresh_per_second=20, transient=True) as live:
        while True:
            ended = engine.step()
            step += 1
            outcome = ended[0][1] if ended else None
            if isinstance(outcome, Failure):
                return outcome
            after = engine.latent(handle) if outcome is None else outcome.completion_ids
            if after is None:
                raise RuntimeError(f"request {handle} is neither live nor ended after step {step}")
            line = _latent(policy, after, before, f"step {step:>3}  ")
            if console.is_terminal:
                live.update(line, refresh=True)
                time.sleep(SECONDS_SHOWN)
            else:
                console.print(line)
            if outcome is not None:
                return outcome
            before = after


def _latent(policy: Policy, ids: np.ndarray, before: np.ndarray | None, title: str) -> Text:
    """The latent as text: MASK as a blank, what this step revealed highlighted."""
    text = Text(title, style="dim")
    stops = policy.vocabulary.stop_ids
    for position, token in enumerate(ids.tolist()):
        new = before is None or before[position] == policy.vocabulary.mask_id
        if token == policy.vocabulary.mask_id:
            text.append(BLANK, style="dim")
        else:
            shown = STOP if token in stops else str(policy.tokenizer.decode([token]))
            text.append(shown, style="bold green" if new else "default")
    return text
