"""Benchmark `engine`: its baseline is the sampler it says, its statistics find what they look for."""

from dataclasses import replace

import pytest
import torch

from actors.reference_sampler import reference_sample
from common.config import ModelConfig
from common.policy import Policy
from learner.benchmarks.engine import (
    GROUP,
    Recorder,
    chi_square_p,
    engine_of,
    identical,
    nfe_cv,
    policy_of,
    requests_of,
    row_forward_ratio,
)
from learner.benchmarks.llada_sampler import llada_sample

RULES = {"entropy_bound": 3.0, "confidence": 0.4, "top_k": 2.0}


@pytest.fixture
def endless(policy: Policy) -> Policy:
    """The tiny policy without stop tokens, as the benchmark uses its own."""
    other = Policy(policy.model, policy.head, policy.tokenizer)
    other.vocabulary = replace(policy.vocabulary, stop_ids=())
    return other


@pytest.mark.parametrize("rule", RULES)
def test_the_baseline_is_the_textbook_sampler_in_a_batch(endless: Policy, rule: str) -> None:
    prompts = torch.tensor([[5, 6, 7], [9, 8, 4], [4, 4, 4]])
    parameter = torch.tensor([RULES[rule]] * 3, dtype=torch.float64)
    ids, nfe = llada_sample(endless, prompts, rule=rule, parameter=parameter, temperature=0.0, length=16, block=8)
    for row, prompt in enumerate(prompts.tolist()):
        expected = reference_sample(
            endless, tuple(prompt), rule=rule, parameter=RULES[rule], temperature=0.0, seed=0, length=16, block=8
        )
        assert ids[row].tolist() == expected.tokens
        assert nfe[row] == expected.nfe


def test_chi_square_accepts_the_right_distribution_and_refuses_another() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.00999, 0.00001, 0.0], dtype=torch.float64)
    drawn = torch.multinomial(exact, 20_000, replacement=True, generator=generator)
    counts = torch.bincount(drawn, minlength=7).double()
    assert 0.01 < chi_square_p(counts, exact * 20_000) < 0.99
    skewed = torch.tensor([0.48, 0.32, 0.15, 0.04, 0.00999, 0.00001, 0.0], dtype=torch.float64)
    assert chi_square_p(counts, skewed * 20_000) < 1e-4
    impossible = counts.clone()
    impossible[-1] = 1
    assert chi_square_p(impossible, exact * 20_000) == 0.0


def test_thresholds_spread_nfe_as_asked() -> None:
    """On a model that is flat, as the benchmark's are: mean about 11, and a coefficient of variation of about 0.5."""
    policy = policy_of(ModelConfig(hidden_size=16, layers=1, heads=1, intermediate_size=16))
    assert nfe_cv(policy, 128) == pytest.approx(0.5, abs=0.04)


def test_what_is_replayed_is_what_the_engine_computed(endless: Policy) -> None:
    short = [replace(request, prompt_ids=(5, 6, 7)) for request in requests_of(endless, 2 * GROUP)]
    with Recorder(endless) as recorder:
        engine = engine_of(endless, slots=5, max_prompt_tokens=3, completion_tokens=16, block_length=8)
        engine.generate(short)
    passes = [given for function, given, _ in recorder.calls if function == endless.hidden]
    assert len(passes) == engine.cost.calls == len(recorder.calls) / 2
    assert sum(len(ids) for ids, _ in passes) == engine.cost.row_forwards
    recorder.replay()


def test_the_engine_wastes_nothing_and_equals_the_textbook() -> None:
    assert identical(2) == 1.0


def test_no_row_is_forwarded_twice(endless: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.benchmarks.engine.PROMPT", 8)
    monkeypatch.setattr("learner.benchmarks.engine.LENGTH", 32)
    assert row_forward_ratio(endless, 8 * GROUP) == 1.0
