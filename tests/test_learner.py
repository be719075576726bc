"""Learner: what one step changes, what it leaves alone, and that it does not depend on how the batch is cut."""

import copy
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_fixtures import (
    generate_batch,
    learner_config,
    loop_log_probs,
    parameters,
    tiny_policy,
    with_reward,
)
from torch import Tensor

import learner.learner as module
from common.errors import RunError
from common.metrics import CATALOGUE, split_labels
from common.policy import Policy
from common.trajectory import Completion, decode_group, encode_group
from learner.batch import Batch, build_batch
from learner.learner import Learner
from learner.surrogate import draw_taus, surrogate_log_probs

HUGE, ONE_GROUP = 1 << 20, 1


@pytest.fixture(scope="module")
def original() -> Policy:
    """Never trained; every test trains a copy."""
    return tiny_policy()


@pytest.fixture
def policy(original: Policy) -> Policy:
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def batch(original: Policy) -> Batch:
    """Groups of unequal size, each with spread."""
    found = generate_batch(original, sizes=(4, 6, 3))
    for group in range(3):
        assert len(set(found.reward[found.group == group].tolist())) > 1
    return found


def scored_log_probs(policy: Policy, batch: Batch) -> Tensor:
    """Mean log-probability of each completion's scored tokens, as exact as can be; `[N]`."""
    taus = draw_taus(batch.seed, batch.nfe, passes=99, law="distinct", update=0)
    with torch.no_grad():
        return surrogate_log_probs(policy, batch, taus).logprob.sum(-1) / batch.scored.sum(-1)


def gradients(learner: Learner) -> np.ndarray:
    found = [p.grad for group in learner.optimizer.param_groups for p in group["params"]]
    return torch.cat([g.flatten() for g in found if g is not None]).numpy()


def hand_made(prompt: list[int], rows: list[tuple[list[int], list[int]]]) -> pa.Table:
    """A group's table from (ids, token versions) per completion; everything else counts up."""
    completions = [
        Completion(
            prompt_ids=np.array(prompt, dtype=np.int32),
            completion_ids=np.array(ids, dtype=np.int32),
            reveal_step=np.arange(1, len(ids) + 1, dtype=np.int16),
            behaviour_logprob=-np.arange(len(ids), dtype=np.float32),
            entropy=np.arange(len(ids), dtype=np.float32),
            token_version=np.array(versions, dtype=np.int32),
            gamma=0.5 + index,
            gamma_logprob=-0.5 - index,
            nfe=len(ids) + index,
            finish_reason="length",
            seed=100 + index,
            temperature=1.0 + index,
        )
        for index, (ids, versions) in enumerate(rows)
    ]
    shared = {"group_id": 1, "task": "t", "reveal_rule": "entropy_bound", "block_length": 4, "cache": "none"}
    shared |= {"attempt": 1, "worker": "w", "model_digest": ""}
    scores = [{"reward": 0.25 * index} for index in range(len(rows))]
    return decode_group(encode_group(completions, shared, scores))


EOS = 1


def test_what_is_scored_is_drawn_and_not_behind_the_first_stop_token(policy: Policy) -> None:
    tables = [
        hand_made([4, 5, 6], [([4, EOS, 5, EOS], [0, 0, 0, -1]), ([4, 5, 6, 7], [0, -1, 2, 3])]),
        hand_made([7], [([EOS, 4, 4, 4], [1, 1, 1, 1]), ([4, 4, 4, EOS], [1, 1, 1, 1]), ([4, 4, EOS, EOS], [1] * 4)]),
    ]
    batch = build_batch(tables, policy.vocabulary, width=None, device=torch.device("cpu"))
    assert batch.scored.int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.group.tolist() == [0, 0, 1, 1, 1]
    assert batch.prompts.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert batch.attended.tolist() == [[True] * 3, [False, False, True]]
    assert batch.reveal_step.tolist() == [[1, 2, 3, 4]] * 5
    assert batch.behaviour_logprob.tolist() == [[0.0, -1.0, -2.0, -3.0]] * 5
    assert batch.nfe.tolist() == [4, 5, 4, 5, 6]
    assert batch.gamma.tolist() == [0.5, 1.5, 0.5, 1.5, 2.5]
    assert batch.gamma_logprob.tolist() == [-0.5, -1.5, -0.5, -1.5, -2.5]
    assert batch.seed.tolist() == [100, 101, 100, 101, 102]
    assert batch.temperature.tolist() == [1.0, 2.0, 1.0, 2.0, 3.0]
    assert batch.reward.tolist() == [0.0, 0.25, 0.0, 0.25, 0.5]

    wider = build_batch(tables, policy.vocabulary, width=5, device=torch.device("cpu"))
    assert wider.prompts.tolist() == [[0, 0, 4, 5, 6], [0, 0, 0, 0, 7]]
    some = batch.select(torch.tensor([2, 4]))
    assert some.prompts.tolist() == [[0, 0, 7]]
    assert some.group.tolist() == [0, 0]
    assert some.seed.tolist() == [100, 102]


@pytest.mark.parametrize("passes", [1, 2, 99])
def test_a_step_raises_what_earned_more_and_lowers_what_earned_less(policy: Policy, batch: Batch, passes: int) -> None:
    good = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1])  # groups of 4, 6 and 3
    config = learner_config(surrogate_passes=passes, tau_law="distinct", learning_rate=1e-4, train="model")
    before = scored_log_probs(policy, batch)
    Learner(policy, config).step(with_reward(batch, good), version=0)
    change = scored_log_probs(policy, batch) - before
    assert change[good == 1].mean() > 1e-5
    assert change[good == 0].mean() < -1e-5


@pytest.mark.parametrize("loss_mean", ["completion", "token"])
@pytest.mark.parametrize("train", ["model", "threshold", "joint"])
@pytest.mark.parametrize("weight", ["truncated", "none"])
def test_the_first_loss_is_the_papers_formula_written_as_a_loop(
    policy: Policy, batch: Batch, train: str, loss_mean: str, weight: str
) -> None:
    config = learner_config(
        train=train, loss_mean=loss_mean, importance_weight=weight, threshold_weight=0.7, entropy_bonus=0.05,
        weight_cap=1.5, advantage_std=False, cost="multiplicative", speed_weight=0.4,
    )  # fmt: skip
    taus = draw_taus(batch.seed, batch.nfe, passes=2, law="paper", update=0)
    with torch.no_grad():
        tokens = loop_log_probs(policy, batch, taus.tolist())
        features = surrogate_log_probs(policy, batch, taus, features=True).features
        assert features is not None
        gammas = policy.head.log_prob(features[batch.group], batch.gamma)
        entropies = policy.head.entropy(features)[batch.group]
    costed = [float(r) * (1 - 0.4 * int(n) / batch.length) for r, n in zip(batch.reward, batch.nfe, strict=True)]
    model, threshold = [], []
    for n, group in enumerate(batch.group.tolist()):
        peers = [costed[other] for other in range(len(costed)) if int(batch.group[other]) == group]
        advantage = costed[n] - sum(peers) / len(peers)
        ratios = [
            min(1.5, math.exp(tokens[n, i] - batch.behaviour_logprob[n, i])) if weight == "truncated" else 1.0
            for i in batch.scored[n].nonzero().flatten().tolist()
        ]
        model.append([ratio * advantage for ratio in ratios])
        gamma_ratio = min(1.5, math.exp(gammas[n] - batch.gamma_logprob[n])) if weight == "truncated" else 1.0
        threshold.append(gamma_ratio * advantage + 0.05 * float(entropies[n]))
    objective = 0.0
    if train != "threshold":
        means = [sum(row) / len(row) for row in model]
        objective += sum(map(sum, model)) / sum(map(len, model)) if loss_mean == "token" else sum(means) / len(means)
    if train != "model":
        objective += (0.7 if train == "joint" else 1.0) * sum(threshold) / len(threshold)
    metrics = Learner(policy, config).step(batch, version=0)
    assert metrics["learner_loss"] == pytest.approx(-objective, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss_mean", ["completion", "token"])
@pytest.mark.parametrize("train", ["model", "threshold", "joint"])
def test_gradient_and_weights_do_not_depend_on_how_the_batch_is_cut(
    original: Policy, batch: Batch, train: str, loss_mean: str
) -> None:
    found = []
    kl_beta = 0.0 if train == "threshold" else 0.1
    for budget in (ONE_GROUP, HUGE):
        trained = copy.deepcopy(original)
        config = learner_config(
            train=train, loss_mean=loss_mean, micro_batch_tokens=budget, grad_clip=1e9, inner_updates=2,
            kl_beta=kl_beta, tau_law="distinct", surrogate_passes=3,
        )  # fmt: skip
        learner = Learner(trained, config)
        metrics = learner.step(batch, version=0)
        found.append((parameters(trained), gradients(learner), metrics))
    (weights, gradient, metrics), (other_weights, other_gradient, other_metrics) = found
    assert np.abs(gradient).max() > 1e-3
    # Llama's norms are float32 inside, so sums of another order differ in the seventh digit
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(weights - other_weights).max() < 1e-6
    for name in ("learner_loss", "learner_gradient_norm", "learner_weight_mean", "learner_weight_ess", "learner_kl"):
        assert metrics[name] == pytest.approx(other_metrics[name], rel=1e-5, abs=1e-9)


def test_micro_batches_are_whole_groups_within_the_budget(policy: Policy, batch: Batch) -> None:
    width = batch.prompts.shape[1] + batch.length
    fits_two = (1 + 4 + 1 + 6) * width
    parts = Learner(policy, learner_config(micro_batch_tokens=fits_two))._micro_batches(batch, batch.reward)
    assert [part.seed.tolist() for part, _ in parts] == [batch.seed[:10].tolist(), batch.seed[10:].tolist()]
    assert [advantage.tolist() for _, advantage in parts] == [batch.reward[:10].tolist(), batch.reward[10:].tolist()]


def record_objectives(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Spy on (current, proximal) of every token objective."""
    seen = []
    inner = module.clipped_objective

    def spy(current: Tensor, proximal: Tensor, *rest: Tensor, **clips: float) -> Tensor:
        seen.append((current.detach().clone(), proximal.clone()))
        return inner(current, proximal, *rest, **clips)

    monkeypatch.setattr(module, "clipped_objective", spy)
    return seen


def test_proximal_scores_are_those_of_the_weights_before_the_first_update(
    original: Policy, policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = record_objectives(monkeypatch)
    config = learner_config(train="model", inner_updates=3, learning_rate=1e-2, advantage_baseline="leave_one_out")
    Learner(policy, config).step(batch, version=0)
    assert len(seen) == 3
    rows = (module.advantages(batch.reward, batch.group, baseline="mean", scale_by_std=True) != 0).nonzero().flatten()
    kept = batch.select(rows)
    for update, (current, proximal) in enumerate(seen):
        taus = draw_taus(kept.seed, kept.nfe, passes=2, law="paper", update=update)
        with torch.no_grad():
            expected = surrogate_log_probs(original, kept, taus).logprob
        torch.testing.assert_close(proximal, expected, rtol=0, atol=1e-9)
        ratio = (current - proximal).exp()
        assert update > 0 or (ratio == 1).all()
        assert update == 0 or (ratio - 1).abs().max() > 1e-3


def test_one_tau_per_update_scores_proximal_current_and_reference(
    policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[list[int]]]] = []

    def spy(scored: Policy, part: Batch, taus: Tensor, **rest: bool) -> object:
        kind = "reference" if scored is not policy else "current" if torch.is_grad_enabled() else "proximal"
        seen.append((kind, taus.tolist()))
        return surrogate_log_probs(scored, part, taus, **rest)

    monkeypatch.setattr(module, "surrogate_log_probs", spy)
    config = learner_config(train="model", inner_updates=3, kl_beta=0.1, surrogate_passes=3, tau_law="distinct")
    Learner(policy, config).step(batch, version=0)
    expected = [
        draw_taus(batch.seed, batch.nfe, passes=3, law="distinct", update=update).tolist() for update in range(3)
    ]
    assert [taus for kind, taus in seen if kind == "proximal"] == expected[1:]
    assert [taus for kind, taus in seen if kind == "current"] == expected
    assert [taus for kind, taus in seen if kind == "reference"] == expected


@pytest.mark.parametrize("clip", [0.01, 0.9])
def test_a_second_update_has_the_gradient_of_the_clipped_formula(
    original: Policy, policy: Policy, batch: Batch, clip: float
) -> None:
    """Current from the weights after one update, proximal and weight from those before it."""
    config = learner_config(
        train="model", surrogate_passes=1, clip_low=clip, clip_high=clip / 2, learning_rate=3e-3, grad_clip=1e9
    )
    Learner(policy, config).step(batch, version=0)
    advantage = module.advantages(batch.reward, batch.group, baseline="mean", scale_by_std=True).unsqueeze(-1)
    nothing = batch.reveal_step[:, :0]
    with torch.no_grad():
        proximal = surrogate_log_probs(original, batch, nothing).logprob
    ratio = (surrogate_log_probs(policy, batch, nothing).logprob - proximal).exp()
    weight = (proximal - batch.behaviour_logprob).exp().clamp(max=2.0)
    values = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip / 2) * advantage) * weight
    loss = -(values.masked_fill(~batch.scored, 0.0).sum(-1) / batch.scored.sum(-1)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.model.parameters()))]).numpy()
    outside = ((ratio < 1 - clip) | (ratio > 1 + clip / 2))[batch.scored].double().mean()

    learner = Learner(copy.deepcopy(original), config.model_copy(update={"inner_updates": 2}))
    metrics = learner.step(batch, version=0)
    np.testing.assert_allclose(gradients(learner), expected, rtol=1e-4, atol=1e-6)
    assert metrics["learner_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert metrics["learner_clip_fraction"] == pytest.approx(float(outside), abs=1e-9)
    assert (metrics["learner_clip_fraction"] > 0.3) == (clip < 0.1)


@pytest.mark.parametrize(("train", "model", "head"), [("model", 1, 0), ("threshold", 0, 1), ("joint", 1, 1)])
@pytest.mark.parametrize("updates", [1, 2])
def test_only_what_learns_changes(
    original: Policy, policy: Policy, batch: Batch, train: str, model: int, head: int, updates: int
) -> None:
    config = learner_config(train=train, weight_decay=0.1, inner_updates=updates)
    Learner(policy, config).step(batch, version=0)
    assert (parameters(policy.model) != parameters(original.model)).any() == bool(model)
    assert (parameters(policy.head) != parameters(original.head)).any() == bool(head)
    for part, learns in ((policy.model, model), (policy.head, head)):
        assert {parameter.requires_grad for parameter in part.parameters()} == {bool(learns)}


@pytest.mark.parametrize("train", ["model", "threshold", "joint"])
def test_a_batch_without_advantage_changes_nothing_and_reports_numbers(
    original: Policy, policy: Policy, batch: Batch, train: str
) -> None:
    learner = Learner(policy, learner_config(train=train, weight_decay=0.1))
    metrics = learner.step(with_reward(batch, torch.full_like(batch.reward, 0.3)), version=2)
    assert (parameters(policy) == parameters(original)).all()
    assert learner.steps_done == 1
    assert learner.updates_done == 0
    assert metrics["learner_scored_completions"] == 0.0
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(original: Policy, policy: Policy, batch: Batch, value: float) -> None:
    reward = batch.reward.clone()
    reward[5] = value
    learner = Learner(policy, learner_config())
    with pytest.raises(RunError, match="rewards of the batch at version 3 are not finite"):
        learner.step(with_reward(batch, reward), version=3)
    assert (parameters(policy) == parameters(original)).all()


@pytest.mark.parametrize("budget", [ONE_GROUP, HUGE])
def test_a_loss_that_is_not_finite_changes_neither_weights_nor_optimizer(
    original: Policy, policy: Policy, batch: Batch, budget: int
) -> None:
    broken = batch.behaviour_logprob.clone()
    broken[-1, int(batch.scored[-1].nonzero()[0])] = math.nan  # in the last micro-batch
    learner = Learner(policy, learner_config(micro_batch_tokens=budget))
    with pytest.raises(RunError, match=r"not finite at version 0.*weights unchanged"):
        learner.step(replace(batch, behaviour_logprob=broken), version=0)
    assert (parameters(policy) == parameters(original)).all()
    assert not learner.optimizer.state_dict()["state"]
    assert learner.updates_done == learner.scheduler.last_epoch == 0


def test_an_inner_update_that_fails_keeps_the_one_before_it(original: Policy, policy: Policy, batch: Batch) -> None:
    learner = Learner(policy, learner_config(train="model", inner_updates=2, learning_rate=1e200))
    with pytest.raises(RunError, match="weights unchanged"):
        learner.step(batch, version=0)
    assert learner.updates_done == 1
    assert (parameters(policy) != parameters(original)).any()


def test_the_kl_term_works_with_one_update_and_pulls_back(policy: Policy, batch: Batch) -> None:
    """d1 crashes on beta > 0 with one inner update."""
    learner = Learner(policy, learner_config(train="model", kl_beta=0.5, learning_rate=3e-3))
    first, second = (learner.step(batch, version=version) for version in range(2))
    assert first["learner_kl"] == 0.0
    assert second["learner_kl"] > 1e-4
    flat = with_reward(batch, torch.zeros_like(batch.reward))  # nothing but the KL term is left
    kls = [learner.step(flat, version=2)["learner_kl"] for _ in range(15)]
    assert kls[-1] < 0.7 * max(kls)


def test_the_reference_stays_at_the_start(original: Policy, policy: Policy, batch: Batch) -> None:
    learner = Learner(policy, learner_config(kl_beta=0.1))
    learner.step(batch, version=0)
    assert learner.reference is not None
    assert (parameters(learner.reference) == parameters(original)).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "model"}, {"train": "threshold"}, {"kl_beta": 0.1, "inner_updates": 2}],
    ids=str,
)
def test_every_metric_is_in_the_catalogue_with_its_labels(policy: Policy, batch: Batch, changes: dict) -> None:
    metrics = Learner(policy, learner_config(**changes)).step(batch, version=4)
    for key, value in metrics.items():
        name, labels = split_labels(key)
        assert name in CATALOGUE
        assert len(labels) in (0, len(CATALOGUE[name].labels))
        assert math.isfinite(value), key
    assert metrics["replay_staleness_mean"] == metrics["replay_staleness_max"] == 4.0
    assert "learner_weight_mean{staleness=4}" in metrics
    assert "learner_weight_ess{reveal_step=1}" in metrics


def test_metrics_describe_the_batch(policy: Policy, batch: Batch) -> None:
    version = batch.token_version.clone()
    version[version >= 0] = 5
    version[0, int((version[0] >= 0).nonzero()[0])] = 3
    metrics = Learner(policy, learner_config(cost="additive", speed_weight=0.5)).step(
        replace(batch, token_version=version), version=6
    )
    count = len(batch.nfe)
    nfe = batch.nfe.double().numpy()
    drawn = (batch.token_version >= 0).sum(-1).numpy()
    reward = batch.reward.double().numpy()
    expected = {
        "rollout_reward": reward.mean(),
        "rollout_reward_costed": (reward - 0.5 * nfe / batch.length).mean(),
        "rollout_nfe": nfe.mean(),
        "rollout_tokens_per_forward": (drawn / nfe).mean(),
        "threshold_gamma": np.exp(np.log(batch.gamma.double().numpy()).mean()),
        "replay_staleness_mean": (3 + (count - 1)) / count,
        "replay_staleness_max": 3.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_at_version_zero_tokens_of_the_first_step_have_weight_one(policy: Policy, batch: Batch) -> None:
    metrics = Learner(policy, learner_config(surrogate_passes=1)).step(batch, version=0)
    assert metrics["learner_weight_mean{reveal_step=1}"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["learner_weight_ess{reveal_step=1}"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["learner_weight_ess{reveal_step=2}"] < 0.99


def test_a_reward_for_small_thresholds_makes_them_likelier(policy: Policy, batch: Batch) -> None:
    thrifty = with_reward(batch, -batch.gamma.log())
    taus = draw_taus(batch.seed, batch.nfe, passes=1, law="paper", update=0)
    with torch.no_grad():
        features = surrogate_log_probs(policy, batch, taus, features=True).features
        assert features is not None

    def mean_log_gamma() -> Tensor:
        with torch.no_grad():
            return policy.head.mean(features).log()

    before = mean_log_gamma()
    learner = Learner(policy, learner_config(train="threshold", threshold_learning_rate=1e-2))
    for _ in range(8):
        learner.step(thrifty, version=0)
    assert (mean_log_gamma() < before - 0.02).all()


def test_equal_learners_stay_bit_equal_in_float32(batch: Batch) -> None:
    found = []
    for noise in range(2):
        torch.manual_seed(noise)  # a global generator must not matter
        learner = Learner(tiny_policy(double=False), learner_config(inner_updates=2, kl_beta=0.01))
        metrics = [learner.step(batch, version=version) for version in range(2)]
        found.append((parameters(learner.policy), metrics))
    assert (found[0][0] == found[1][0]).all()
    assert found[0][1] == found[1][1]


def test_the_learning_rate_warms_up_over_steps(policy: Policy, batch: Batch) -> None:
    learner = Learner(policy, learner_config(warmup_steps=2, inner_updates=2, learning_rate=1.0, train="threshold",
                                             threshold_learning_rate=1e-3))  # fmt: skip
    rates = []
    for version in range(3):
        rates.append(learner.scheduler.get_last_lr()[0])
        learner.step(batch, version=version)
    assert rates == pytest.approx([0.25e-3, 0.75e-3, 1e-3])
