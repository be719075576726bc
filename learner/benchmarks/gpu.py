"""Benchmark `gpu`: what a CUDA device does with models of LLaDA's shape, 8 billion random weights, vocabulary 126,464.

Rollout: the 8 B model in bfloat16, 64 rows, prompts of 32 and completions of 64 tokens in blocks of 32, a gamma of its
own for each row, as in `engine`:

- `engine_speedup`: completions per second over LLaDA's batched loop, same model and rule (one measurement).
- `engine_overhead`: wall time over that of the bare forwards and output heads that the engine made.
- `engine_tokens_per_second`, `engine_forwards_per_second` (of one row).
- `prefix_speedup`, `dual_speedup`: completions per second with a cache over without; 16 rows, prompts of 256 and
  completions of 256 tokens in blocks of 32 (one measurement).
- `rollout_memory_vs_plan`: most bytes allocated at once over those that `diffpo plan` adds up for a rollout actor.

Learner:

- `lora_tokens_per_second`: completion tokens trained on, the 8 B model with adapters of rank 16, 8 groups of 8
  completions of 256 tokens after prompts of 256, 2-MF, activation checkpointing, autocast, micro-batches of 8,192.
- `learner_memory_vs_plan`: most bytes allocated at once in these steps over the plan's.
- `tokens_vs_plain_1b`, `memory_vs_plain_126k_1b`: as in `learner`, all weights of a body of a billion parameters.

Quick: bodies of 25 million parameters. `_spread` is half the distance between quartiles. Nothing of it needs a
checkpoint; random weights take as long as trained ones, and what they answer is not measured.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common.adapter import adapt
from common.config import Config, LoraConfig
from common.config_file import load_config
from common.errors import UserError
from common.policy import Policy
from learner.benchmarks import Options
from learner.benchmarks.engine import SLOTS, engine_of, overhead, ratio, requests_of, speedup, timed
from learner.benchmarks.sized_models import (
    GROUP,
    LLADA_VOCABULARY,
    TOKENS,
    drawn_batch,
    memory_vs_plain,
    sized_policy,
    tokens_vs_plain,
)
from learner.learner import Learner
from learner.memory_plan import learner_memory, measure, rollout_memory, settings_of

GROUPS, PROMPT, LENGTH, CACHED_ROWS = 8, 256, 256, 16
REPEATS = 3
SETTING = [
    "task.name=sudoku",  # unread: the model's folder is given
    "model.device=cuda",
    "model.lora.rank=16",
    "learner.importance_weight=truncated",
    "learner.activation_checkpointing=true",
    "learner.micro_batch_tokens=8192",
    "learner.diagnostics_every=0",
    "learner.drift_remedy=none",
    "evaluation.drift_every=0",
    "rollout.precision=bfloat16",
]
CUDA = torch.device("cuda")


def run(options: Options) -> dict[str, Any]:
    """All measurements, each printed as it comes; some five minutes on one H100.

    Raises:
        UserError: where torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("bench gpu measures a CUDA device, and torch sees none here; `diffpo doctor` says why")
    large, whole = ("25m", "25m") if options.quick else ("8b", "1b")
    result: dict[str, Any] = {}

    def add(found: dict[str, Any]) -> None:
        result.update(found)
        options.console.print(str(found))

    add({"device": torch.cuda.get_device_name()})
    for measurement in (rollout(large), adapters(large)):
        for found in measurement:
            add(found)
    config = setting(PROMPT, LENGTH).learner.model_copy(
        update={"micro_batch_tokens": TOKENS, "activation_checkpointing": False}
    )
    with emptied():
        add(tokens_vs_plain(whole, config, repeats=REPEATS, device=CUDA))
    with emptied():
        add(memory_vs_plain(whole, config, device=CUDA))
    return result


def rollout(name: str) -> Iterator[dict[str, float]]:
    """Of the engine."""
    with emptied():
        policy = sized_policy(name, LLADA_VOCABULARY, positions=PROMPT + LENGTH, device=CUDA, dtype=torch.bfloat16)
        policy.vocabulary = replace(policy.vocabulary, stop_ids=())
        requests = requests_of(policy, SLOTS)
        engine = engine_of(policy)
        engine.generate(requests)
        width = len(requests[0].prompt_ids)
        yield {"rollout_memory_vs_plan": torch.cuda.max_memory_allocated() / planned(policy, width, 64, learns=False)}
        before = engine.cost.row_forwards
        seconds = timed(lambda: engine.generate(requests))
        yield {
            "engine_tokens_per_second": SLOTS * 64 / seconds,
            "engine_forwards_per_second": (engine.cost.row_forwards - before) / seconds,
        }
        yield ratio("engine_overhead", REPEATS, partial(overhead, policy, SLOTS))
        yield {"engine_speedup": speedup(policy, 2 * SLOTS)}
        yield from caches(policy)


def caches(policy: Policy) -> Iterator[dict[str, float]]:
    """Of completions long enough for keys and values to be worth their keeping."""
    generator = torch.Generator().manual_seed(4)
    prompt = tuple(torch.randint(10, LLADA_VOCABULARY, (PROMPT,), generator=generator).tolist())
    requests = [replace(request, prompt_ids=prompt) for request in requests_of(policy, CACHED_ROWS)]
    given = {"slots": CACHED_ROWS, "max_prompt_tokens": PROMPT, "completion_tokens": LENGTH}

    def seconds(**cache: Any) -> float:
        engine = engine_of(policy, **given, **cache)
        engine.generate(requests)  # kernels are chosen at a new shape
        return timed(partial(engine.generate, requests))

    plain = seconds()
    for cache in ("prefix", "dual"):
        yield {f"{cache}_speedup": plain / seconds(cache=cache, drift_every=0)}


def adapters(name: str) -> Iterator[dict[str, float]]:
    """Of the learner, with adapters."""
    with emptied():
        policy = sized_policy(name, LLADA_VOCABULARY, positions=PROMPT + LENGTH, device=CUDA)
        plan = planned(policy, PROMPT, LENGTH, learns=True)
        adapt(policy.model, LoraConfig(rank=16), None, seed=0)
        policy.to(CUDA)
        learner = Learner(policy, setting(PROMPT, LENGTH).learner)
        batch = drawn_batch(LLADA_VOCABULARY, groups=GROUPS, prompt=PROMPT, length=LENGTH, device=CUDA)
        tokens = GROUPS * GROUP * LENGTH
        learner.step(batch, version=0)
        yield ratio("lora_tokens_per_second", REPEATS, lambda: tokens / timed(lambda: learner.step(batch, version=0)))
        yield {"learner_memory_vs_plan": torch.cuda.max_memory_allocated() / plan}


def setting(prompt: int, length: int, *more: str) -> Config:
    """The configuration that the plan is asked about."""
    return load_config(
        None, [*SETTING, f"sampler.max_prompt_tokens={prompt}", f"sampler.max_completion_tokens={length}", *more]
    )


def planned(policy: Policy, prompt: int, length: int, *, learns: bool) -> float:
    """Bytes that the memory plan adds up for the device of the learner, or of a rollout actor without adapters."""
    with TemporaryDirectory() as folder:
        policy.model.config.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        config = setting(prompt, length, f"model.path={Path(folder).as_posix()}", f"rollout.slots={SLOTS}")
        model, activations = measure(config)
    settings = settings_of(config, model)
    if learns:
        parts = learner_memory(model, activations, settings, lora=True, checkpointing=True, ranks=1)
    else:
        parts = rollout_memory(model, activations, settings, lora=False)
    return sum(parts.values())


@contextmanager
def emptied() -> Iterator[None]:
    """A device on which nothing was allocated before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
