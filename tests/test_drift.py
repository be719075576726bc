"""Remedies against threshold drift: controllers that hold what the first batch showed, and a set that is scored."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_fixtures import MODEL, generate_batch, learner_config, parameters, tiny_policy

from common.policy import Policy
from common.policy_loading import load_policy
from learner.advantage import advantages
from learner.batch import Batch
from learner.drift import DriftRemedy
from learner.learner import Learner
from learner.surrogate import draw_latents, surrogate_log_probs


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def batch(policy: Policy) -> Batch:
    return generate_batch(policy)


def with_nfe(batch: Batch, nfe: float) -> Batch:
    return replace(batch, nfe=torch.full_like(batch.nfe, round(nfe * 1000)))


def test_hold_nfe_finds_the_scale_that_brings_nfe_back(policy: Policy, batch: Batch) -> None:
    """On a sampler whose NFE falls with the cube root of gamma and which becomes bolder and bolder."""
    remedy = DriftRemedy(policy, "hold_nfe")
    seen = []
    for step in range(60):
        boldness = math.exp(min(step, 30) / 20)
        seen.append(10 * (boldness * policy.calibration.gamma_scale) ** (-1 / 3))
        remedy.update(with_nfe(batch, seen[-1]))
    assert min(seen) < 9.9  # it did drift
    assert seen[-1] == pytest.approx(10, rel=0.01)
    assert policy.calibration.gamma_scale == pytest.approx(math.exp(-1.5), rel=0.05)
    assert policy.calibration.reveal_temperature == 1


def test_hold_entropy_finds_the_temperature_that_brings_the_first_step_back(policy: Policy, batch: Batch) -> None:
    remedy = DriftRemedy(policy, "hold_entropy")
    for step in range(60):
        entropy = 0.8 * math.exp(-min(step, 30) / 30) * policy.calibration.reveal_temperature
        remedy.update(replace(batch, first_entropy=torch.full_like(batch.first_entropy, entropy)))
    assert entropy == pytest.approx(0.8, rel=0.01)
    assert policy.calibration.reveal_temperature == pytest.approx(math.e, rel=0.05)
    assert policy.calibration.gamma_scale == 1


@pytest.mark.parametrize("kind", ["hold_nfe", "hold_entropy"])
def test_controllers_stay_finite(policy: Policy, batch: Batch, kind: str) -> None:
    remedy = DriftRemedy(policy, kind)
    remedy.update(batch)
    for _ in range(100):
        gone = replace(batch, nfe=torch.ones_like(batch.nfe), first_entropy=torch.zeros_like(batch.first_entropy))
        gauges = remedy.update(gone)
    assert all(1e-4 < value < 1e4 for value in gauges.values())


def test_without_a_remedy_nothing_moves(policy: Policy, batch: Batch) -> None:
    before = parameters(policy.calibration)
    Learner(policy, learner_config()).step(batch, version=0)
    assert (parameters(policy.calibration) == before).all()


def test_the_learner_moves_the_calibration_and_it_is_saved(policy: Policy, batch: Batch, tmp_path: Path) -> None:
    learner = Learner(policy, learner_config(train="model", drift_remedy="hold_nfe"))
    learner.step(batch, version=0)
    metrics = learner.step(with_nfe(batch, 0.001), version=1)
    assert metrics["threshold_scale"] == policy.calibration.gamma_scale < 1
    policy.float().save(tmp_path)
    loaded = load_policy(tmp_path, MODEL, policy.head.config)
    assert loaded.calibration.gamma_scale == pytest.approx(policy.calibration.gamma_scale)


def test_features_are_standardised_once_and_thresholds_of_the_first_batch_stay(batch: Batch) -> None:
    start = tiny_policy()
    start.head.config.__dict__["standardise"] = True  # frozen for users
    start.head.linear.weight.data.zero_()
    found = generate_batch(start)
    learner = Learner(start, learner_config())
    learner.step(found, version=0)
    once = parameters(start.calibration)
    assert (once[2:] != parameters(tiny_policy().calibration)[2:]).any()
    learner.step(found, version=1)
    assert (parameters(start.calibration) == once).all()


def test_a_first_batch_without_advantage_is_the_first_batch_all_the_same() -> None:
    """What is fitted to the first batch does not wait for one that can be trained on."""
    start = tiny_policy()
    start.head.config.__dict__["standardise"] = True
    start.head.linear.weight.data.zero_()
    found = generate_batch(start)
    flat = replace(found, reward=torch.ones_like(found.reward))
    learner = Learner(start, learner_config(speed_weight=0.0))
    assert learner.step(flat, version=0)["learner_scored_completions"] == 0
    assert (parameters(start.calibration)[2:] != parameters(tiny_policy().calibration)[2:]).any()
    held = Learner(tiny_policy(), learner_config(train="model", drift_remedy="hold_nfe", speed_weight=0.0))
    assert held.step(flat, version=0)["threshold_scale"] == 1
    assert held.step(with_nfe(flat, 0.001), version=1)["threshold_scale"] < 1


# -- the rule that draws its set -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "log_scale", "log_temperature"), [(None, 0, 0), (4, 0, 0), (None, 1, 0), (4, 0, 0.7)]
)
def test_the_scored_set_has_the_recorded_likelihood(
    policy: Policy, block: int | None, log_scale: float, log_temperature: float
) -> None:
    """For every update, so for many values of tau: the latent is the true one, so nothing is approximate.

    Also for a policy that came with a calibration, from a run under a remedy.
    """
    policy.calibration.log_gamma_scale.fill_(log_scale)
    policy.calibration.log_reveal_temperature.fill_(log_temperature)
    batch = generate_batch(policy, rule="sampled_entropy_bound", threshold="sample", block=block, sizes=(4, 4, 4))
    config = learner_config(train="model")
    uncertain = 0
    for update in range(6):
        scores = surrogate_log_probs(policy, batch, draw_latents(batch, config, update=update))
        assert scores.reveal_logprob is not None
        assert scores.revealed is not None
        for row in range(len(batch.nfe)):
            recorded = batch.reveal_logprob[row][scores.revealed[row]]
            assert len(set(batch.reveal_step[row][scores.revealed[row]].tolist())) == 1
            torch.testing.assert_close(
                recorded.double(), scores.reveal_logprob[row].expand(len(recorded)), atol=1e-5, rtol=0
            )
            uncertain += float(recorded[0]) < -0.01
    assert uncertain > 10


def test_the_set_score_leaves_token_scores_as_they_are(policy: Policy) -> None:
    batch = generate_batch(policy, rule="sampled_entropy_bound", threshold=1.0)
    config = learner_config(train="model")
    with_sets = surrogate_log_probs(policy, batch, draw_latents(batch, config, update=0))
    plain = replace(batch, draws_sets=False)
    without = surrogate_log_probs(policy, plain, draw_latents(plain, config, update=0))
    torch.testing.assert_close(with_sets.logprob, without.logprob, atol=1e-12, rtol=0)
    assert without.reveal_logprob is None


def test_a_step_makes_well_paid_sets_likelier(policy: Policy) -> None:
    """Tokens get no weight, so sets alone move the model; what the learner scores is what is looked at."""
    batch = generate_batch(policy, rule="sampled_entropy_bound", threshold=1.0, sizes=(6, 6, 6))
    config = learner_config(train="model", learning_rate=1e-5)
    advantage = advantages(batch.reward, batch.group, baseline="mean", scale_by_std=True)

    def paid() -> float:
        with torch.no_grad():
            scores = surrogate_log_probs(policy, batch, draw_latents(batch, config, update=0))
        assert scores.reveal_logprob is not None
        return float((advantage * batch.nfe * scores.reveal_logprob / batch.scored.sum(-1)).mean())

    only_sets = replace(batch, behaviour_logprob=torch.full_like(batch.behaviour_logprob, 200.0))
    before = paid()
    Learner(policy, config).step(only_sets, version=0)
    assert paid() > before


def test_the_gradient_does_not_depend_on_the_cut(policy: Policy) -> None:
    batch = generate_batch(policy, rule="sampled_entropy_bound", threshold=1.0)
    found = []
    for tokens in (1, 1 << 20):
        own = copy.deepcopy(policy)
        Learner(own, learner_config(train="model", micro_batch_tokens=tokens)).step(batch, version=0)
        found.append(parameters(own.model))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
