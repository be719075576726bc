"""Benchmark `learner`: its baseline computes what the learner computes, and its bytes are those that autograd holds."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_fixtures import generate_batch, learner_config, tiny_policy
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from common.policy import Policy
from learner.batch import Batch
from learner.benchmarks import run_benchmark, sized_models
from learner.benchmarks.learner import SavedTensors, cut_gradient_difference, first_groups, groups_to_fill
from learner.benchmarks.plain_loop import PlainLoop
from learner.learner import Learner

CONFIG = Path(__file__).parents[1] / "deploy/configs/sudoku.yaml"
TIMED = ("two_mf_cost", "vs_plain_loop", "step_seconds", "one_mf_seconds", "plain_loop_seconds")
TIMED += ("completions_per_second", "diagnostics_cost")


@pytest.fixture(scope="module")
def original() -> Policy:
    return tiny_policy()


@pytest.fixture
def policy(original: Policy) -> Policy:
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def batch(original: Policy) -> Batch:
    """Prompts of several lengths, groups of several sizes; every completion has an advantage."""
    return generate_batch(original, sizes=(4, 6, 3), temperature=0.7)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norms compute in float32 even in a float64 model, which alone moves gradients by 1e-7 of them."""

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("budget", [1, 40, 1 << 20])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_weight": "none", "advantage_std": False, "threshold_weight": 0.3, "entropy_bonus": 0.2},
        {"tau_law": "distinct", "weight_cap": 1.1, "cost": "multiplicative", "advantage_baseline": "leave_one_out"},
    ],
)
def test_the_plain_loop_has_the_learners_loss_and_gradient(
    policy: Policy, batch: Batch, changes: dict, passes: int, budget: int
) -> None:
    given = {"train": "joint", "surrogate_passes": passes, "micro_batch_tokens": budget, "diagnostics_every": 0}
    config = learner_config(**given, grad_clip=0.01, warmup_steps=3, weight_decay=0.1, **changes)
    other = copy.deepcopy(policy)
    learner, plain = Learner(policy, config), PlainLoop(other, config, passes=passes)
    for _ in range(3):  # clip, optimizer and schedule must agree too
        metrics = learner.step(batch, version=0)
        assert metrics["learner_scored_completions"] == len(batch.reward)
        assert plain.step(batch) == pytest.approx(metrics["learner_loss"], rel=1e-10)
        assert plain.rows == passes * len(batch.reward) >= metrics["learner_rows_forwarded"]
        assert plain.rows > metrics["learner_rows_forwarded"] or budget == 1  # a row of each group is shared
        for mine, its in ((policy.model, other.model), (policy.head, other.head)):
            for ours, theirs in zip(mine.parameters(), its.parameters(), strict=True):
                assert ours.grad is not None
                assert ours.grad.any()
                largest = float(ours.grad.abs().max())
                torch.testing.assert_close(theirs.grad, ours.grad, rtol=0, atol=1e-10 * largest)
                torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-10)


def test_the_gradient_of_the_cut_batch_is_compared_and_found_equal(
    policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = learner_config(train="joint")
    assert 0 < cut_gradient_difference(policy, batch, config) < 1e-9
    whole = Learner._micro_batches
    monkeypatch.setattr(Learner, "_micro_batches", lambda *given: whole(*given)[:1])  # loses all groups but one
    assert cut_gradient_difference(policy, batch, config) > 0.01


def test_saved_bytes_are_counted_once_while_they_are_held(policy: Policy) -> None:
    saved = SavedTensors(policy)
    weights = nn.Parameter(torch.ones(1000, dtype=torch.float64))
    with saved:
        first = weights.exp()  # keeps its result
        assert saved.peak == 8000
        second = first.view(10, 100).square()  # keeps a view of the same storage
        assert saved.peak == 8000
        third = second.exp()
        assert saved.peak == 16000
        third.sum().backward()
        weights.sin().sum().backward()
        assert saved.peak == 16000
        (policy.head.linear.weight * 2).square().sum().backward()  # keeps the product, and no bytes of the weights
        assert saved.peak == 16000


def test_live_bytes_are_those_of_storages_that_something_holds() -> None:
    weights = torch.randn(1000, requires_grad=True)
    live = sized_models.LiveTensors()
    with live:
        first = weights.exp()
        second = first.view(10, 100).sin()  # a view is no storage of its own
        assert live.peak == 8000
        del second
        third = (first * 2).sum()  # its product goes at once
        assert live.peak == 8004
        third.backward()  # the gradient of the sum is expanded, that of the product and of the weights are not
    assert 12000 <= live.peak <= 16100


def test_groups_that_fill_a_budget(batch: Batch) -> None:
    some = first_groups(batch, 2)
    assert len(some.prompts) == 2
    assert len(some.reward) == 10
    width = some.prompts.shape[1] + some.length
    assert groups_to_fill(100 * width, some) * 5 / 2 >= 100  # half of five completions per group


def test_a_quick_run_names_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("learner.benchmarks.learner.QUICK_BUDGETS", (512, 1024))
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(sized_models.BODIES, "25m", tiny)
    monkeypatch.setattr(sized_models, "TIMED_VOCABULARY", 100)
    monkeypatch.setattr(sized_models, "LLADA_VOCABULARY", 5000)
    sizes = ["model.hidden_size=16", "model.layers=1", "model.intermediate_size=16", "learner.groups_per_step=2"]
    overrides = [*sizes, "warm_start.steps=1", "learner.group_size=3", "evaluation.drift_every=0"]
    run_benchmark("learner", quick=True, as_json=True, check=False, seeds=None, config=CONFIG, overrides=overrides)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {
        "nfe",
        "rows_ratio",
        *TIMED,
        *(f"{key}_spread" for key in TIMED),
        "cut_gradient_difference",
        "memory_per_token_512",
        "memory_per_token_1024",
        "memory_per_token_spread",
        "memory_linear",
        "tokens_vs_plain",
        "tokens_vs_plain_25m",
        "tokens_vs_plain_25m_spread",
        "memory_vs_plain_126k",
        "memory_vs_plain_126k_25m",
    }
    assert result["memory_vs_plain_126k"] < 0.6
    assert all(result[key] > 0 for key in result if not key.startswith("diagnostics_cost") and key[-7:] != "_spread")
    assert result["rows_ratio"] < 1
    assert result["cut_gradient_difference"] < 1e-9
    assert 1 <= result["memory_per_token_spread"] < 1.5
