"""The rule that draws its set: against the textbook loop, the entropy bound, and the axioms of probability."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from engine_fixtures import make_engine, make_requests
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.reference_sampler import entropy_of, forward, select, softmax
from actors.reveal_rules import entropy_bound
from common.policy import Policy
from common.reveal_likelihood import draw_set, gate_logits, set_log_prob

WIDE = torch.float64


def random_rows(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies, active positions (at least one a row), gammas."""
    generator = torch.Generator().manual_seed(seed)
    entropy = 2 * torch.rand(rows, length, generator=generator, dtype=WIDE)
    active = torch.rand(rows, length, generator=generator) < 0.7
    active[:, 0] |= ~active.any(-1)
    return entropy, active, 3 * torch.rand(rows, generator=generator, dtype=WIDE)


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_the_set_is_the_textbook_loops(seed: int) -> None:
    entropy, active, gamma = random_rows(5, 6, seed)
    uniforms = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed + 1), dtype=WIDE)
    chosen = draw_set(gate_logits(entropy, active, gamma), uniforms, torch.zeros(5, dtype=torch.bool))
    for row in range(5):
        where = active[row].nonzero().flatten().tolist()
        entropies = {at: float(entropy[row, at]) for at in where}
        gates = {at: float(uniforms[row, at]) for at in where}
        expected = select("sampled_entropy_bound", entropies, {}, float(gamma[row]), gates)
        assert chosen[row].nonzero().flatten().tolist() == sorted(expected)


def test_greedy_rows_follow_the_entropy_bound() -> None:
    entropy, active, gamma = random_rows(200, 7)
    drawn = draw_set(gate_logits(entropy, active, gamma), torch.rand(200, 7), torch.ones(200, dtype=torch.bool))
    assert torch.equal(drawn, entropy_bound(entropy, entropy, active, gamma))


def test_probabilities_of_all_sets_sum_to_one() -> None:
    entropy, active, gamma = random_rows(20, 5)
    logits = gate_logits(entropy, active, gamma)
    total = torch.zeros(20, dtype=WIDE)
    for members in product([False, True], repeat=5):
        chosen = torch.tensor(members).expand(20, 5)
        possible = ~(chosen & ~active).any(-1)
        total += set_log_prob(logits, chosen).exp() * possible
    torch.testing.assert_close(total, torch.ones(20, dtype=WIDE))


def test_draws_come_as_often_as_their_likelihood_says() -> None:
    entropy, gamma = torch.tensor([[0.3, 0.9, 0.5, 0.7]]), torch.tensor([0.8])
    active = torch.ones(1, 4, dtype=torch.bool)
    draws = 20_000
    logits = gate_logits(entropy, active, gamma).expand(draws, -1)
    uniforms = torch.rand(draws, 4, generator=torch.Generator().manual_seed(0), dtype=WIDE)
    chosen = draw_set(logits, uniforms, torch.zeros(draws, dtype=torch.bool))
    sets, counts = chosen.unique(dim=0, return_counts=True)
    expected = set_log_prob(logits[: len(sets)], sets).exp() * draws
    assert len(sets) == 8
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1).all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    entropy, active, gamma = random_rows(4, 5, seed=8)
    chosen = draw_set(gate_logits(entropy, active, gamma), torch.full((4, 5), 0.4), torch.zeros(4, dtype=torch.bool))
    assert torch.autograd.gradcheck(
        lambda e: set_log_prob(gate_logits(e, active, gamma), chosen), entropy.clone().requires_grad_()
    )


@pytest.mark.parametrize("gamma", [0.0, 1e30])
def test_extreme_thresholds_leave_no_choice(gamma: float) -> None:
    entropy, active, _ = random_rows(10, 5)
    entropy[0] = 0.0  # certain everywhere
    logits = gate_logits(entropy, active, torch.full((10,), gamma, dtype=WIDE))
    chosen = draw_set(logits, torch.full((10, 5), 0.5), torch.zeros(10, dtype=torch.bool))
    assert set_log_prob(logits, chosen).isfinite().all()
    expected = active if gamma else entropy_bound(entropy, entropy, active, torch.zeros(10, dtype=WIDE))
    assert torch.equal(chosen, expected)


def test_the_recorded_likelihood_follows_from_the_trajectory_alone(policy: Policy) -> None:
    requests = make_requests(6, "sampled_entropy_bound")
    completions = make_engine(policy, rule="sampled_entropy_bound", block_length=8).generate(requests)
    below_certain = 0
    for completion in completions:
        prompt, mask_id = completion.prompt_ids.tolist(), policy.vocabulary.mask_id
        for step in range(1, completion.nfe + 1):
            latent = np.where(completion.reveal_step < step, completion.completion_ids, mask_id)
            logits = forward(policy, [*prompt, *latent.tolist()])[len(prompt) :].tolist()
            start = latent.tolist().index(mask_id) // 8 * 8
            masked = [at for at in range(start, start + 8) if latent[at] == mask_id]
            order = sorted((entropy_of(softmax(logits[at], mask_id, 1.0)), at) for at in masked)
            expected, before = 0.0, 0.0
            for rank, (entropy, at) in enumerate(order):
                if rank:
                    odds = (max(completion.gamma, 1e-9) / before) ** 4
                    revealed = completion.reveal_step[at] == step
                    expected -= math.log1p(1 / odds) if revealed else math.log1p(odds)
                before += entropy
            here = completion.reveal_logprob[completion.reveal_step == step]
            np.testing.assert_allclose(here, expected, rtol=1e-5, atol=1e-6)
            below_certain += expected < -0.01
            if step == 1:
                assert completion.first_entropy == pytest.approx(before / len(masked))
    assert below_certain > 5


def test_other_rules_record_certainty(policy: Policy) -> None:
    for completion in make_engine(policy).generate(make_requests(4)):
        assert not completion.reveal_logprob.any()


def test_scale_and_temperature_of_the_policy_reach_the_rule_and_given_numbers_stay(policy: Policy) -> None:
    """A scaled threshold is the same as a larger one given; entropies are those of the tempered distribution."""
    request = replace(make_requests(1)[0], threshold="initial")
    gamma = policy.head.config.gamma_init
    calibration = policy.calibration
    try:
        calibration.log_gamma_scale.fill_(math.log(5))
        scaled = make_engine(policy).generate([request])[0]
        given = make_engine(policy).generate([replace(request, threshold=5 * gamma)])[0]
        plain = make_engine(policy).generate([replace(request, threshold=gamma)])[0]
        np.testing.assert_array_equal(scaled.reveal_step, given.reveal_step)
        assert scaled.gamma == pytest.approx(gamma)
        calibration.log_gamma_scale.zero_()
        calibration.log_reveal_temperature.fill_(math.log(2))
        tempered = make_engine(policy).generate([replace(request, threshold=gamma)])[0]
    finally:
        calibration.log_gamma_scale.zero_()
        calibration.log_reveal_temperature.zero_()
    assert plain.nfe > scaled.nfe
    latent = np.full(len(plain.completion_ids), policy.vocabulary.mask_id)
    logits = forward(policy, [*request.prompt_ids, *latent.tolist()])[len(request.prompt_ids) :].tolist()
    entropies = [entropy_of(softmax(row, policy.vocabulary.mask_id, 2.0)) for row in logits]
    assert tempered.first_entropy == pytest.approx(np.mean(entropies))
    assert tempered.first_entropy > plain.first_entropy
