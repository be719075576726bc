"""Benchmark `engine`: what the denoising engine costs beside its forwards, and that it samples what it should.

- `speedup_v32k`, `speedup_v32`: completions per second over LLaDA's batched loop (`llada_sampler`), same model and
  rule, in float32: L = 64, blocks of 32, 128 requests in 64 slots (quick: fewer), groups of 8, a gamma of its own for
  each row that gives NFE a coefficient of variation (`nfe_cv_v32`) of about 0.5; no stop tokens, from which only the
  engine would profit.
- `overhead_small`, `overhead_25m`: wall time of the engine over that of bare forwards and output heads on the same
  rows, columns and positions, replayed right after; default model and one of 25 M parameters.
- `row_forward_ratio`: rows forwarded over rows needed (the sum of NFE less the shared first steps).
- `identical`: share of completions that equal the one-sequence textbook sampler, temperature 0, float64, every rule.
- `sampling_p_value`: smallest p of chi-square tests of 1e5 draws against the exact softmax, bf16 model, 4 temperatures.
- `prefix_speedup`, `dual_speedup`: completions per second with a cache over without, blocks of 16, the 25 M model;
  `prefix_drift`, `dual_drift`: mean KL(exact || cached) per masked position in nats, of an untrained model here.
- `compile_speedup`: with torch.compile over without, default model, compilation not counted (left out with `--quick`).

Ratios are medians over repeats, both sides in turn; `_spread` is half the distance between their quartiles.
`speedup_v32k` is one measurement: the baseline alone takes minutes. One torch thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from actors.engine import DenoisingEngine
from actors.reference_sampler import reference_sample
from actors.request import Request
from common.behaviour import behaviour_log_probs
from common.config import ModelConfig, ThresholdConfig
from common.keyed_random import derive
from common.policy import Policy
from common.policy_loading import build_policy
from learner.benchmarks import Options
from learner.benchmarks.llada_sampler import llada_sample

LENGTH, BLOCK, PROMPT = 64, 32, 32
REQUESTS, SLOTS, GROUP = 128, 64, 8
SMALL = ModelConfig()
LARGE = ModelConfig(hidden_size=512, layers=8, heads=8, intermediate_size=1408)
ALPHABET = "0123456789+-*/=() abcdefghij"  # with four special tokens a vocabulary of 32
TEMPERATURES = (0.5, 0.8, 1.0, 1.5)
RULES = {
    "entropy_bound": (0.0, 3.0, 9.0),
    "sampled_entropy_bound": (0.0, 3.0, 9.0),
    "confidence": (0.2, 0.3, 0.6),
    "top_k": (1.0, 3.0, 5.0),
}


def run(options: Options) -> dict[str, Any]:
    """All measurements; each is printed as it comes, since the whole takes a quarter of an hour (quick: one minute)."""
    torch.set_num_threads(1)
    quick = options.quick
    repeats = 1 if quick else 3
    few, large_few = (16, 4) if quick else (REQUESTS, 8)
    small, large = policy_of(SMALL), policy_of(LARGE)
    result: dict[str, Any] = {}

    def add(found: dict[str, float]) -> None:
        result.update(found)
        options.console.print(str(found))

    add({"identical": identical(2 if quick else 12)})
    add({"sampling_p_value": sampling_p_value()})
    add({"row_forward_ratio": row_forward_ratio(small, few)})
    add(ratio("overhead_small", repeats, partial(overhead, small, few)))
    add(ratio("overhead_25m", repeats, partial(overhead, large, large_few)))
    add(ratio("speedup_v32", repeats, partial(speedup, small, few)))
    add({"nfe_cv_v32": nfe_cv(small, few)})
    wide = policy_of(SMALL, 32_000)
    add({"speedup_v32k": speedup(wide, GROUP if quick else REQUESTS)})
    for cache in ("prefix", "dual"):
        add(caching(large, cache, repeats, large_few))
    if not quick:
        add(compiling(small, repeats))
    return result


def ratio(key: str, repeats: int, measure: Callable[[], float]) -> dict[str, float]:
    """Median and half the interquartile distance of some measurements."""
    values = [measure() for _ in range(repeats)]
    low, _, high = quantiles(values, n=4, method="inclusive") if repeats > 1 else (0.0, 0.0, 0.0)
    return {key: median(values), f"{key}_spread": (high - low) / 2}


def policy_of(model: ModelConfig, vocabulary: int = 32) -> Policy:
    """An untrained policy without stop tokens."""
    policy = build_policy(model, ThresholdConfig(), alphabet=ALPHABET, seed=0)
    if vocabulary > len(policy.tokenizer):
        policy.model.resize_token_embeddings(vocabulary, mean_resizing=False)
        layers: list[Any] = [policy.model.get_input_embeddings(), policy.model.get_output_embeddings()]
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for layer in layers:
                layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=generator))
    policy.vocabulary = replace(policy.vocabulary, stop_ids=())
    return policy


def gammas(policy: Policy, count: int) -> Tensor:
    """A gamma for each row, for which NFE is about log-normal with a coefficient of variation of 0.5 and median 10.

    All entropies are near ln V, so a gamma of (k - 1/2) ln V reveals k tokens a step and NFE is about L / k. As k is
    whole, 0.56 goes in for 0.5 to come out.
    """
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    nfe = 10 * (math.sqrt(math.log(1 + 0.56**2)) * torch.special.ndtri(quantile)).exp()
    per_step = (LENGTH / nfe).round().clamp(min=1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return ((per_step - 0.5) * math.log(policy.model.config.vocab_size - 1))[order]


def requests_of(policy: Policy, count: int) -> list[Request]:
    """Groups of 8 on random prompts of one length."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(4, 32, (count // GROUP + 1, PROMPT), generator=generator).tolist()
    return [
        Request(
            prompt_ids=tuple(prompts[index // GROUP]),
            seed=derive(3, index),
            group=index // GROUP,
            threshold=gamma,
        )
        for index, gamma in enumerate(gammas(policy, count).tolist())
    ]


def engine_of(policy: Policy, **keys: Any) -> DenoisingEngine:
    given: dict[str, Any] = {"slots": SLOTS, "rule": "entropy_bound", "max_prompt_tokens": PROMPT}
    given |= {"completion_tokens": LENGTH, "block_length": BLOCK}
    return DenoisingEngine(policy, **{**given, **keys})


def timed(work: Callable[[], Any]) -> float:
    """Seconds of wall time, on a GPU until it has caught up."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def speedup(policy: Policy, count: int) -> float:
    """LLaDA's loop, in batches of as many rows as the engine has slots, over the engine."""
    requests = requests_of(policy, count)
    prompts = torch.tensor([request.prompt_ids for request in requests], device=policy.device)
    parameter = gammas(policy, count).to(policy.device)
    slots = min(SLOTS, count // 2)

    def baseline() -> None:
        for start in range(0, count, slots):
            rows = slice(start, start + slots)
            llada_sample(
                policy,
                prompts[rows],
                rule="entropy_bound",
                parameter=parameter[rows],
                temperature=1.0,
                length=LENGTH,
                block=BLOCK,
                noise=torch.float32 if policy.model.config.vocab_size > 1000 else torch.float64,
            )

    engine = engine_of(policy, slots=slots)
    return timed(baseline) / timed(lambda: engine.generate(requests))


def nfe_cv(policy: Policy, count: int) -> float:
    """Coefficient of variation of NFE over the requests."""
    nfe = torch.tensor([float(c.nfe) for c in engine_of(policy).generate(requests_of(policy, count))])
    return float(nfe.std() / nfe.mean())


def row_forward_ratio(policy: Policy, count: int) -> float:
    """Rows forwarded over rows needed."""
    engine = engine_of(policy)
    nfe = sum(completion.nfe for completion in engine.generate(requests_of(policy, count)))
    return engine.cost.row_forwards / (nfe - count + count // GROUP)


@dataclass
class Recorder:
    """Stands in for a policy's forward and head while an engine runs, and keeps what they were given."""

    policy: Policy

    def __post_init__(self) -> None:
        self.calls: list[tuple[Callable, tuple, dict]] = []
        self._originals = (self.policy.hidden, self.policy.logits)

    def __enter__(self) -> "Recorder":
        forward, logits = self._originals

        def record_hidden(ids: Tensor, attended: Tensor, **keys: Any) -> Tensor:
            self.calls.append((forward, (ids, attended), keys))
            return forward(ids, attended, **keys)

        def record_logits(hidden: Tensor) -> Tensor:
            self.calls.append((logits, (hidden,), {}))
            return logits(hidden)

        self.policy.hidden, self.policy.logits = record_hidden, record_logits
        return self

    def __exit__(self, *_: object) -> None:
        del self.policy.hidden, self.policy.logits

    @torch.inference_mode()
    def replay(self) -> None:
        for function, given, keys in self.calls:
            function(*given, **keys)


def overhead(policy: Policy, count: int) -> float:
    """Engine over the bare forwards and heads that it made."""
    requests = requests_of(policy, count)
    with Recorder(policy) as recorder:
        engine_of(policy).generate(requests)
    engine = engine_of(policy)
    return timed(lambda: engine.generate(requests)) / timed(recorder.replay)


def caching(policy: Policy, cache: str, repeats: int, count: int) -> dict[str, float]:
    """Throughput with a cache over without, and its drift."""
    requests = requests_of(policy, count)
    plain = engine_of(policy, block_length=16)
    cached = engine_of(policy, block_length=16, cache=cache, drift_every=0)

    def measure() -> float:
        return timed(lambda: plain.generate(requests)) / timed(lambda: cached.generate(requests))

    probing = engine_of(policy, block_length=16, cache=cache, drift_every=2)
    probing.generate(requests[:16])
    drift = probing.cost.probed_kl / max(1, probing.cost.probed_positions)
    return {**ratio(f"{cache}_speedup", repeats, measure), f"{cache}_drift": drift}


def compiling(policy: Policy, repeats: int) -> dict[str, float]:
    """Throughput with torch.compile over without; a first run of both is not measured, and compiles."""
    requests = requests_of(policy, REQUESTS)
    plain, compiled = engine_of(policy), engine_of(policy, compiled=True)
    for engine in (plain, compiled):
        engine.generate(requests)
    return ratio(
        "compile_speedup",
        repeats,
        lambda: timed(lambda: plain.generate(requests)) / timed(lambda: compiled.generate(requests)),
    )


def identical(count: int) -> float:
    """Share of completions that equal the textbook sampler's, tokens and reveal steps."""
    policy = policy_of(ModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)).double()
    with torch.no_grad():  # an untrained model is nearly flat, and rules would hardly differ
        for weights in policy.model.parameters():
            weights.mul_(8.0 if weights.ndim > 1 else 1.0)
    equal, total = 0, 0
    for rule, parameters in RULES.items():
        requests = [
            replace(request, temperature=0.0, threshold=parameters[index % len(parameters)])
            for index, request in enumerate(requests_of(policy, count))
        ]
        for index, completion in enumerate(engine_of(policy, rule=rule).generate(requests)):
            request = requests[index]
            expected = reference_sample(
                policy,
                request.prompt_ids,
                rule=rule,
                parameter=parameters[index % len(parameters)],
                temperature=0.0,
                seed=request.seed,
                length=LENGTH,
                block=BLOCK,
            )
            same = completion.completion_ids.tolist() == expected.tokens
            equal += same and completion.reveal_step.tolist() == expected.reveal_step
            total += 1
    return equal / total


def sampling_p_value(draws: int = 100_000) -> float:
    """Smallest p over temperatures: single tokens drawn by the engine against the softmax of the same bf16 logits."""
    policy = policy_of(SMALL)
    with torch.no_grad():
        head: Any = policy.model.get_output_embeddings()
        head.weight.mul_(8.0)
    policy.model.bfloat16()
    prompt = tuple(range(4, 4 + PROMPT - 8))
    ids = torch.tensor([[*prompt, policy.vocabulary.mask_id]])
    with torch.inference_mode():
        logits = policy.logits(policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1].double()
    smallest = 1.0
    for temperature in TEMPERATURES:
        engine = engine_of(policy, slots=4096, completion_tokens=1, block_length=1, max_prompt_tokens=len(prompt))
        completions = engine.generate(
            Request(prompt_ids=prompt, seed=derive(5, index), group=0, temperature=temperature, threshold=0.0)
            for index in range(draws)
        )
        found = torch.tensor([int(completion.completion_ids[0]) for completion in completions])
        counts = torch.bincount(found, minlength=len(logits)).double()
        exact = behaviour_log_probs(logits, torch.tensor(temperature), policy.vocabulary.mask_id).exp() * draws
        smallest = min(smallest, chi_square_p(counts, exact))
    return smallest


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """Pearson's test; bins expected to hold fewer than 5 are pooled, and a count where none can be gives 0."""
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    pooled = torch.stack([counts[rare].sum(), expected[rare].sum()])
    observed = torch.cat([counts[~rare], pooled[:1]]) if rare.any() else counts
    means = torch.cat([expected[~rare], pooled[1:]]) if rare.any() else expected
    observed, means = observed[means > 0], means[means > 0]
    statistic = ((observed - means).square() / means).sum()
    return float(torch.special.gammaincc(torch.tensor((len(means) - 1) / 2, dtype=torch.float64), statistic / 2))
