"""Threshold policy: what both heads say at the start, and that sampling, density and entropy agree with torch's."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from common.config import ThresholdConfig
from common.keyed_random import uniform
from common.threshold import ThresholdHead, build_threshold_head

HEADS = ["categorical", "log_normal"]
HIDDEN = 8
FINE = tuple(math.exp(step / 10) for step in range(-60, 61))


def fresh(kind: str, **keys: object) -> ThresholdHead:
    return build_threshold_head(HIDDEN, ThresholdConfig(head=kind, **keys)).double()


def trained(kind: str, **keys: object) -> ThresholdHead:
    """A head whose distribution depends on the prompt."""
    head = fresh(kind, **keys)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head.requires_grad_(False)


def features(rows: int = 4) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def reference(head: ThresholdHead, prompts: Tensor) -> Categorical | Normal:
    """The distribution over grid indices, or over ln gamma."""
    outputs = prompts / math.sqrt(prompts.shape[1]) @ head.linear.weight.T + head.linear.bias
    if head.config.head == "categorical":
        return Categorical(logits=outputs)
    return Normal(outputs.squeeze(-1), head.log_width.exp())


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("gamma_init", [0.05, 0.3, 2.0])
def test_a_fresh_head_says_the_same_for_every_prompt_around_gamma_init(kind: str, gamma_init: float) -> None:
    head = fresh(kind, gamma_init=gamma_init, init_width=0.5, gamma_grid=FINE).requires_grad_(False)
    prompts = 100 * features()
    mean = head.mean(prompts)
    assert torch.equal(mean, mean[:1].expand(4))
    assert float(mean[0]) == pytest.approx(gamma_init, rel=1e-3)
    log_prob = head.log_prob(prompts, torch.tensor([FINE[40]] * 4, dtype=torch.float64))
    assert torch.equal(log_prob, log_prob[:1].expand(4))
    drawn = head.sample(prompts[:1].expand(5000, -1), uniform(torch.arange(5000), 0, -1)).log()
    assert float(drawn.mean()) == pytest.approx(math.log(gamma_init), abs=5 * 0.5 / 5000**0.5)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("kind", HEADS)
def test_log_prob_entropy_and_mean_are_those_of_torch(kind: str) -> None:
    head, prompts = trained(kind), features()
    expected = reference(head, prompts)
    torch.testing.assert_close(head.entropy(prompts), expected.entropy())
    gamma = head.sample(prompts, torch.tensor([0.05, 0.4, 0.6, 0.99], dtype=torch.float64))
    if isinstance(expected, Categorical):
        index = (gamma.unsqueeze(-1) == head.grid).int().argmax(-1)
        torch.testing.assert_close(head.log_prob(prompts, gamma), expected.log_prob(index))
        torch.testing.assert_close(head.mean(prompts).log(), (expected.probs * head.grid.log()).sum(-1))
    else:
        torch.testing.assert_close(head.log_prob(prompts, gamma), expected.log_prob(gamma.log()))
        torch.testing.assert_close(head.mean(prompts).log(), expected.mean)
    assert head.mean(prompts).unique().numel() == 4


@pytest.mark.parametrize("kind", HEADS)
def test_gamma_keeps_its_log_prob_through_the_float32_of_a_trajectory(kind: str) -> None:
    head, prompts = trained(kind), features()
    gamma = head.sample(prompts, torch.tensor([0.05, 0.4, 0.6, 0.99], dtype=torch.float64))
    stored = torch.tensor(gamma.float().tolist(), dtype=torch.float64)
    torch.testing.assert_close(head.log_prob(prompts, stored), head.log_prob(prompts, gamma), rtol=0, atol=1e-5)


def test_categorical_frequencies_are_its_probabilities() -> None:
    head, prompts, count = trained("categorical"), features(1), 50_000
    drawn = head.sample(prompts.expand(count, -1), uniform(torch.arange(count), 0, -1))
    observed = (drawn.unsqueeze(-1) == head.grid).sum(0).double()
    expected = count * reference(head, prompts).probs[0]
    assert int(observed.sum()) == count  # every draw is on the grid
    assert float(((observed - expected) ** 2 / expected).sum()) < 9 + 5 * math.sqrt(2 * 9)


def test_log_normal_draws_are_its_quantiles() -> None:
    head, prompts = trained("log_normal"), features(1)
    quantiles = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    drawn = head.sample(prompts.expand(99, -1), quantiles)
    torch.testing.assert_close(reference(head, prompts).cdf(drawn.log()), quantiles)


@pytest.mark.parametrize("kind", HEADS)
def test_extreme_uniforms_give_finite_positive_thresholds(kind: str) -> None:
    head = trained(kind)
    gamma = head.sample(features(2), torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64))
    assert (gamma > 0).all()
    assert gamma.isfinite().all()
    assert head.log_prob(features(2), gamma).isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_a_prompt_blind_head_ignores_the_prompt_and_passes_it_no_gradient(kind: str) -> None:
    head = trained(kind, prompt_blind=True).requires_grad_(True)
    gamma = torch.full((4,), 0.205, dtype=torch.float64)
    log_prob = head.log_prob(features(), gamma)
    assert torch.equal(log_prob, log_prob[:1].expand(4))
    assert head.mean(features()).unique().numel() == 1
    log_prob.sum().backward()
    assert not head.linear.weight.grad.any()
    assert head.linear.bias.grad.any()


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_computes_in_its_own_precision(kind: str) -> None:
    head = build_threshold_head(HIDDEN, ThresholdConfig(head=kind))
    assert head.mean(features().bfloat16()).dtype == torch.float32
