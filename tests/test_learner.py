"""Learner: what one step changes, what it leaves alone, and that it does not depend on how the batch is cut."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_fixtures import (
    PROMPTS,
    generate_batch,
    learner_config,
    loop_log_probs,
    parameters,
    tiny_policy,
    with_reward,
)
from pydantic import ValidationError
from torch import Tensor

import learner.learner as module
from common.config import ThresholdConfig
from common.metrics import CATALOGUE, MOST_STALENESS, split_labels
from common.policy import Policy
from common.trajectory import Completion, decode_group, encode_group
from learner.batch import Batch, build_batch
from learner.learner import Learner
from learner.surrogate import (
    Latents,
    draw_latents,
    draw_taus,
    mean_field,
    surrogate_gap,
    surrogate_log_probs,
)
from learner.trainer import BatchRefused

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
        return surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob.sum(-1) / batch.scored.sum(-1)


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
            reveal_logprob=-0.5 * np.arange(len(ids), dtype=np.float32),
            entropy=np.arange(len(ids), dtype=np.float32),
            token_version=np.array(versions, dtype=np.int32),
            first_entropy=0.25 + index,
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
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weight", ["truncated", "none", "self_normalised"])
def test_the_first_loss_is_the_papers_formula_written_as_a_loop(
    policy: Policy, batch: Batch, train: str, loss_mean: str, weight: str, level: str
) -> None:
    taus = (
        draw_taus(batch.seed, batch.nfe, passes=2, law="paper", update=0)
        if train != "threshold"
        else batch.reveal_step[:, :0]
    )
    config = learner_config(
        train=train, loss_mean=loss_mean, importance_weight=weight, threshold_weight=0.7, entropy_bonus=0.05,
        weight_level=level, micro_batch_tokens=ONE_GROUP,
        weight_cap=1.5, advantage_std=False, cost="multiplicative", speed_weight=0.4,
    )  # fmt: skip
    with torch.no_grad():
        tokens = loop_log_probs(policy, batch, taus.tolist())
        features = surrogate_log_probs(policy, batch, mean_field(batch, taus), features=True).features
        assert features is not None
        gammas = policy.head.log_prob(features[batch.group], batch.gamma)
        entropies = policy.head.entropy(features)[batch.group]
    costed = [float(r) * (1 - 0.4 * int(n) / batch.length) for r, n in zip(batch.reward, batch.nfe, strict=True)]
    model, threshold, weights = [], [], []
    for n, group in enumerate(batch.group.tolist()):
        peers = [costed[other] for other in range(len(costed)) if int(batch.group[other]) == group]
        advantage = costed[n] - sum(peers) / len(peers)
        logs = [float(tokens[n, i] - batch.behaviour_logprob[n, i]) for i in batch.scored[n].nonzero().flatten()]
        logs = [sum(logs)] * len(logs) if level == "sequence" else logs
        ratios = [min(1.5, math.exp(log)) if weight != "none" else 1.0 for log in logs]
        weights.extend(ratios)
        model.append([ratio * advantage for ratio in ratios])
        gamma_ratio = min(1.5, math.exp(gammas[n] - batch.gamma_logprob[n])) if weight != "none" else 1.0
        threshold.append(gamma_ratio * advantage + 0.05 * float(entropies[n]))
    if weight == "self_normalised":
        mean = sum(weights) / len(weights)
        model = [[value / mean for value in row] for row in model]
    objective = 0.0
    if train != "threshold":
        means = [sum(row) / len(row) for row in model]
        objective += sum(map(sum, model)) / sum(map(len, model)) if loss_mean == "token" else sum(means) / len(means)
    if train != "model":
        objective += (0.7 if train == "joint" else 1.0) * sum(threshold) / len(threshold)
    metrics = Learner(policy, config).step(batch, version=0)
    assert metrics["learner_loss"] == pytest.approx(-objective, rel=1e-5, abs=1e-7)


OPTIONS = [
    {"surrogate": "coupled_masks"},
    {"prompt_masking": 0.3},
    {"importance_weight": "self_normalised"},
    {"weight_level": "sequence"},
    {
        "surrogate": "coupled_masks",
        "prompt_masking": 0.15,
        "importance_weight": "self_normalised",
        "weight_level": "sequence",
    },
]


@pytest.mark.parametrize(
    ("train", "loss_mean", "options"),
    [
        *((train, mean, {}) for train in ("model", "threshold", "joint") for mean in ("completion", "token")),
        *(("joint", "token", options) for options in OPTIONS),
        ("threshold", "completion", OPTIONS[-1]),
    ],
    ids=str,
)
def test_gradient_and_weights_do_not_depend_on_how_the_batch_is_cut(
    original: Policy, batch: Batch, train: str, loss_mean: str, options: dict
) -> None:
    found = []
    kl_beta = 0.0 if train == "threshold" else 0.1
    for budget in (ONE_GROUP, HUGE):
        trained = copy.deepcopy(original)
        config = learner_config(
            train=train, loss_mean=loss_mean, micro_batch_tokens=budget, grad_clip=1e9, inner_updates=2,
            kl_beta=kl_beta, tau_law="distinct", surrogate_passes=3, **options,
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


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"surrogate_passes": 1}, [1, 1, 1]),
        ({"surrogate_passes": 4, "tau_law": "distinct"}, [13, 19, 10]),
        ({"surrogate": "coupled_masks", "surrogate_passes": 1}, [9, 13, 7]),
        ({"prompt_masking": 0.1}, [9, 13, 7]),
        ({"prompt_masking": 0.1, "train": "model"}, [8, 12, 6]),
        ({"prompt_masking": 0.1, "surrogate": "coupled_masks"}, [13, 19, 10]),
        ({"prompt_masking": 0.1, "surrogate": "coupled_masks", "train": "threshold"}, [1, 1, 1]),
    ],
    ids=str,
)
def test_the_token_budget_counts_the_rows_of_every_option(
    policy: Policy, batch: Batch, options: dict, rows: list[int]
) -> None:
    width = batch.prompts.shape[1] + batch.length
    for budget, groups in (((rows[0] + rows[1]) * width, [2, 1]), ((rows[0] + rows[1]) * width - 1, None)):
        config = learner_config(micro_batch_tokens=budget, **options)
        parts = Learner(copy.deepcopy(policy), config)._micro_batches(batch, batch.reward)
        found = [len(part.prompts) for part, _ in parts]
        assert found == groups if groups else found[0] == 1


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
            expected = surrogate_log_probs(original, kept, mean_field(kept, taus)).logprob
        torch.testing.assert_close(proximal, expected, rtol=0, atol=1e-9)
        ratio = (current - proximal).exp()
        assert update > 0 or (ratio == 1).all()
        assert update == 0 or (ratio - 1).abs().max() > 1e-3


def described(latents: Latents) -> list[object]:
    """Latents as lists, to be compared."""
    fields = [getattr(latents, name) for name in Latents.__dataclass_fields__]
    return [None if field is None else field.tolist() for field in fields]


@pytest.mark.parametrize(
    "options",
    [{}, {"surrogate": "coupled_masks"}, {"prompt_masking": 0.3, "importance_weight": "self_normalised"}],
    ids=str,
)
def test_the_same_latents_score_proximal_current_and_reference(
    policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    seen: list[tuple[str, list[object]]] = []

    def spy(scored: Policy, part: Batch, latents: Latents, **rest: bool) -> object:
        kind = "reference" if scored is not policy else "current" if torch.is_grad_enabled() else "proximal"
        seen.append((kind, described(latents)))
        return surrogate_log_probs(scored, part, latents, **rest)

    monkeypatch.setattr(module, "surrogate_log_probs", spy)
    changes: dict = {"inner_updates": 3, "kl_beta": 0.1, "surrogate_passes": 3, "tau_law": "distinct"} | options
    config = learner_config(train="model", **changes)
    Learner(policy, config).step(batch, version=0)
    expected = [described(draw_latents(batch, config, update=update)) for update in range(3)]
    if not options:
        for update, found in enumerate(expected):
            taus = draw_taus(batch.seed, batch.nfe, passes=3, law="distinct", update=update)
            assert found == described(mean_field(batch, taus))
    assert expected[0] != expected[1]
    normalised = config.importance_weight == "self_normalised"
    assert [latents for kind, latents in seen if kind == "proximal"] == expected[0 if normalised else 1 :]
    assert [latents for kind, latents in seen if kind == "current"] == expected
    assert [latents for kind, latents in seen if kind == "reference"] == expected


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
    nothing = mean_field(batch, batch.reveal_step[:, :0])
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_first_update_starts_from_the_proximal_policy_whatever_the_options(
    policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    seen = record_objectives(monkeypatch)
    metrics = Learner(policy, learner_config(train="model", **options)).step(batch, version=0)
    assert all((current == proximal).all() for current, proximal in seen)
    assert metrics["learner_clip_fraction"] == 0.0


def test_self_normalised_weights_keep_the_direction_and_change_the_size(original: Policy, batch: Batch) -> None:
    found = []
    for kind in ("truncated", "self_normalised"):
        config = learner_config(train="model", importance_weight=kind, grad_clip=1e9, weight_cap=1.5)
        learner = Learner(copy.deepcopy(original), config)
        learner.step(batch, version=0)
        found.append(gradients(learner))
    taus = draw_taus(batch.seed, batch.nfe, passes=2, law="paper", update=0)
    with torch.no_grad():
        proximal = surrogate_log_probs(original, batch, mean_field(batch, taus)).logprob
    mean = float((proximal - batch.behaviour_logprob).exp().clamp(max=1.5)[batch.scored].mean())
    assert abs(mean - 1) > 0.01
    np.testing.assert_allclose(found[0], found[1] * mean, rtol=1e-4, atol=1e-6)


SURROGATES = [{}, {"surrogate_passes": 1}, {"surrogate": "coupled_masks"}, {"prompt_masking": 0.5}]
WEIGHTS = [
    {"importance_weight": kind, "weight_level": level}
    for kind in ("truncated", "none", "self_normalised")
    for level in ("token", "sequence")
]


def of_one_forward(policy: Policy) -> Batch:
    found = generate_batch(policy, threshold=1e9, sizes=(3, 2, 2))
    assert found.nfe.tolist() == [1] * 7
    return found


def ended_at_once(policy: Policy) -> Batch:
    """Every completion's first token is EOS, revealed first; nothing else was drawn."""
    found = generate_batch(policy, sizes=(3, 2, 2))
    first = torch.arange(found.length) == 0
    return replace(
        found,
        completion_ids=torch.full_like(found.completion_ids, policy.vocabulary.eos_id),
        reveal_step=torch.where(first, 1, 2).expand_as(found.reveal_step),
        scored=first.expand_as(found.scored),
        token_version=torch.where(first, 0, -1).expand_as(found.token_version),
        nfe=torch.ones_like(found.nfe),
    )


def of_one_completion(policy: Policy) -> Batch:
    """Two groups of one, and one with spread."""
    return generate_batch(policy, sizes=(1, 4, 1))


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "-".join(w.values()))
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("odd", [of_one_forward, ended_at_once, of_one_completion])
def test_odd_completions_give_finite_losses_gradients_and_metrics(
    policy: Policy, odd: Callable[[Policy], Batch], surrogate: dict, weights: dict
) -> None:
    config = learner_config(inner_updates=2, kl_beta=0.01, advantage_baseline="leave_one_out", **surrogate, **weights)
    learner = Learner(policy, config)
    metrics = learner.step(odd(policy), version=0)
    assert learner.updates_done == 2
    assert {key: value for key, value in metrics.items() if not math.isfinite(value)} == {}
    assert np.isfinite(gradients(learner)).all()
    assert np.abs(gradients(learner)).max() > 0


def test_a_batch_of_one_completion_moves_nothing_and_is_counted(original: Policy, policy: Policy) -> None:
    batch = generate_batch(policy, prompts=[(4, 5)], sizes=(1,))
    metrics = Learner(policy, learner_config(advantage_baseline="leave_one_out")).step(batch, version=0)
    assert metrics["learner_flat_groups"] == 1.0
    assert metrics["learner_scored_completions"] == 0.0
    assert all(map(math.isfinite, metrics.values()))
    assert (parameters(policy) == parameters(original)).all()


def test_groups_without_advantage_are_counted(policy: Policy, batch: Batch) -> None:
    reward = batch.reward.masked_fill(batch.group == 1, 0.5)
    metrics = Learner(policy, learner_config()).step(with_reward(batch, reward), version=0)
    assert metrics["learner_flat_groups"] == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_weight": "self_normalised"},
        {"inner_updates": 3},
        {"inner_updates": 2, "importance_weight": "self_normalised"},
        {"kl_beta": 0.1, "inner_updates": 2},
    ],
)
def test_rows_of_a_step_are_those_of_every_pass(
    policy: Policy, batch: Batch, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    learner = Learner(policy, learner_config(diagnostics_every=0, **changes))
    forwarded = []
    forward = Policy.hidden
    monkeypatch.setattr(
        Policy, "hidden", lambda self, ids, attended: forwarded.append(len(ids)) or forward(self, ids, attended)
    )
    metrics = learner.step(batch, version=0)
    assert metrics["learner_rows_forwarded"] == sum(forwarded) > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_behaviour_that_nothing_explains_is_huge_and_finite(policy: Policy, batch: Batch, level: str) -> None:
    """A log-prob of -1000 nats was recorded: the ratio overflows, the weight is the cap."""
    behaviour = batch.behaviour_logprob.masked_fill(batch.scored, -1000.0)
    learner = Learner(policy, learner_config(weight_level=level, importance_weight="self_normalised"))
    metrics = learner.step(replace(batch, behaviour_logprob=behaviour), version=0)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["learner_weight_mean"] > 1e30
    assert metrics["learner_weight_ess"] == pytest.approx(1.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("train", ["model", "threshold", "joint"])
@pytest.mark.parametrize("kind", ["truncated", "none", "self_normalised"])
def test_a_weight_that_is_not_a_number_is_refused_even_where_the_loss_does_not_see_it(
    original: Policy, policy: Policy, batch: Batch, kind: str, train: str, level: str
) -> None:
    broken = batch.behaviour_logprob.clone()
    broken[-1, int(batch.scored[-1].nonzero()[0])] = math.nan  # in the last micro-batch
    config = learner_config(train=train, importance_weight=kind, weight_level=level, micro_batch_tokens=ONE_GROUP)
    learner = Learner(policy, config)
    with pytest.raises(BatchRefused, match=r"not finite at version 0.*weights unchanged"):
        learner.step(replace(batch, behaviour_logprob=broken), version=0)
    assert (parameters(policy) == parameters(original)).all()
    assert not learner.optimizer.state_dict()["state"]
    assert learner.updates_done == learner.scheduler.last_epoch == 0


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
    with pytest.raises(BatchRefused, match="rewards of the batch at version 3 are not finite"):
        learner.step(with_reward(batch, reward), version=3)
    assert (parameters(policy) == parameters(original)).all()


REFUSALS = [
    {"train": "model", "inner_updates": 2},
    {"train": "joint", "inner_updates": 2, "kl_beta": 0.1, "importance_weight": "self_normalised"},
    {"train": "model", "inner_updates": 3, "drift_remedy": "hold_nfe"},
    {"train": "joint", "inner_updates": 1},
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("changes", REFUSALS, ids=str)
def test_a_refused_batch_leaves_everything_bit_equal(
    batch: Batch, changes: dict, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last inner update is the one that fails; those before it are taken back."""
    policy = tiny_policy(double=False, threshold=ThresholdConfig(gamma_init=1.5, standardise=True))
    with torch.no_grad():
        policy.head.linear.weight.zero_()  # features are fitted to the first batch
    learner = Learner(policy, learner_config(warmup_steps=3, **changes))
    if changes["inner_updates"] == 1:
        monkeypatch.setattr(learner, "_copy", lambda: pytest.fail("weights and moments are copied for nothing"))
    for version in range(steps):
        learner.step(batch, version=version)
    before = everything(learner)

    update, updates = learner._update, []

    def fails_at_last(micro: list, proximal: module._Proximal, *others: object) -> dict[str, float]:
        updates.append(learner.updates_done)
        if proximal.update < learner.config.inner_updates - 1:
            return update(micro, proximal, *others)  # type: ignore[arg-type]
        assert_same(everything(learner), before, same=proximal.update == 0 and steps > 0)
        broken = [(replace(part, behaviour_logprob=part.behaviour_logprob * math.nan), own) for part, own in micro]
        return update(broken, proximal, *others)  # type: ignore[arg-type]

    learner._update = fails_at_last
    with pytest.raises(BatchRefused, match="weights unchanged"):
        learner.step(batch, version=steps)
    assert len(updates) == learner.config.inner_updates
    assert_same(everything(learner), before)
    learner._update = update
    twin = copy.deepcopy(policy)
    learner.step(batch, version=steps)
    assert (parameters(policy) != parameters(twin)).any(), "the next batch is trained on"


def everything(learner: Learner) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return copy.deepcopy({"policy": learner.policy.state_dict()} | learner.state())


def assert_same(found: object, expected: object, *, same: bool = True) -> None:
    """Bit for bit, or not."""
    leaves, _ = torch.utils._pytree.tree_flatten(found)
    others, _ = torch.utils._pytree.tree_flatten(expected)
    equal = len(leaves) == len(others) and all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(leaves, others, strict=True)
    )
    assert equal == same


CONTINUATIONS = [
    {},
    {"kl_beta": 0.1, "inner_updates": 2, "warmup_steps": 3},
    {"train": "model", "drift_remedy": "hold_nfe", "importance_weight": "self_normalised"},
    {"train": "model", "drift_remedy": "hold_entropy", "inner_updates": 2},
    {"train": "threshold"},
]


@pytest.mark.parametrize("changes", CONTINUATIONS, ids=str)
def test_a_restored_learner_goes_on_bit_equal(changes: dict) -> None:
    """With the optimizer's moments, schedule, counters, reference, what the remedy holds to, and torch's generator."""
    policy = tiny_policy(double=False)
    batches = [
        generate_batch(policy, prompts=prompts)
        for prompts in (PROMPTS, ((5, 6), (6, 7, 8), (4,)), ((8, 8), (7,), (5,)))
    ]
    learner = Learner(copy.deepcopy(policy), learner_config(learning_rate=1e-2, diagnostics_every=2, **changes))
    learner.step(batches[0], version=0)
    saved = everything(learner)
    onward = [learner.step(batch, version=1 + n) for n, batch in enumerate(batches[1:])]
    drawn = torch.rand(3)

    other = Learner(copy.deepcopy(policy), learner.config)  # the reference is the policy of the start
    other.policy.load_state_dict(saved.pop("policy"))
    other.restore(saved)
    again = [other.step(batch, version=1 + n) for n, batch in enumerate(batches[1:])]
    assert again == onward
    assert torch.equal(torch.rand(3), drawn)
    assert_same(everything(other), everything(learner))
    moved = Learner(copy.deepcopy(policy), learner.config)
    assert_same(everything(moved), everything(learner), same=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimizer_keeps_its_own_kernels(batch: Batch, fused: bool) -> None:
    """Those of the saved one were for other ranks. Fused ones want `step` on the parameters' device, loops do not."""
    saved = Learner(tiny_policy(double=False), learner_config())
    saved.step(batch, version=0)
    state = saved.state()
    for group in state["optimizer"]["param_groups"]:
        group.update(fused=not fused, foreach=False if fused else None)
    policy = tiny_policy(double=False)
    policy.head.to("meta")
    policy.model.to("meta")
    learner = Learner(policy, learner_config())
    own = {"fused": fused, "foreach": None if fused else False}
    learner.optimizer.defaults.update(own)
    learner.restore(state)
    assert all(group.items() >= own.items() for group in learner.optimizer.param_groups)
    steps = [moments["step"] for moments in learner.optimizer.state.values()]
    assert {step.device.type for step in steps} == {"meta" if fused else "cpu"}


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
    [{}, {"train": "model"}, {"train": "threshold"}, {"kl_beta": 0.1, "inner_updates": 2}, *OPTIONS],
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
    assert "learner_surrogate_kl{passes=2,reveal_step=1}" in metrics
    assert "threshold_gamma_by_difficulty{group_reward=middle}" in metrics


def test_staleness_has_few_values_however_old_tokens_are(policy: Policy, batch: Batch) -> None:
    metrics = Learner(policy, learner_config()).step(batch, version=400)
    assert metrics["replay_staleness_max"] == 400
    named = [key for key in metrics if "{staleness=" in key]
    assert named == [f"learner_weight_{kind}{{staleness={MOST_STALENESS}}}" for kind in ("mean", "ess")]
    assert metrics[named[0]] == metrics["learner_weight_mean"]


@pytest.mark.parametrize(("every", "reported"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_the_gap_is_measured_as_often_as_asked(policy: Policy, batch: Batch, every: int, reported: list[int]) -> None:
    learner = Learner(policy, learner_config(diagnostics_every=every))
    flat = with_reward(batch, torch.zeros_like(batch.reward))  # also on batches without advantage
    steps = [learner.step(flat if step == 2 else batch, version=step) for step in range(5)]
    assert [n for n, step in enumerate(steps) if any("learner_surrogate_kl" in key for key in step)] == reported


@pytest.mark.parametrize("budget", [ONE_GROUP, 200, HUGE])
def test_the_gap_is_that_of_the_weights_before_the_step_by_reveal_step(
    original: Policy, policy: Policy, batch: Batch, budget: int
) -> None:
    metrics = Learner(policy, learner_config(micro_batch_tokens=budget, learning_rate=1e-2)).step(batch, version=0)
    gaps = surrogate_gap(original, batch, (1, 2, 4))
    for passes, gap in gaps.items():
        for low, high in ((1, 2), (2, 4), (4, 8), (8, 99)):
            inside = batch.scored & (batch.reveal_step >= low) & (batch.reveal_step < high)
            key = f"learner_surrogate_kl{{passes={passes},reveal_step={low}}}"
            assert (key in metrics) == bool(inside.any())
            if key in metrics:
                assert metrics[key] == pytest.approx(float(gap[inside].mean()), abs=1e-9)
    assert metrics["learner_surrogate_kl{passes=1,reveal_step=2}"] > 1e-3


def test_the_gap_is_measured_on_few_completions_from_all_over_the_batch(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = generate_batch(policy, sizes=(40, 20, 40))
    seen: list[int] = []

    def spy(scored: Policy, part: Batch, passes: tuple[int, ...]) -> dict[int, Tensor]:
        seen.extend(part.seed.tolist())
        return surrogate_gap(scored, part, passes)

    monkeypatch.setattr(module, "surrogate_gap", spy)
    Learner(policy, learner_config(micro_batch_tokens=500)).step(batch, version=0)
    assert len(seen) == len(set(seen)) == module.GAP_COMPLETIONS
    places = [batch.seed.tolist().index(seed) for seed in seen]
    assert places == sorted(places)
    assert max(b - a for a, b in pairwise(places)) <= math.ceil(100 / module.GAP_COMPLETIONS)
    assert places[-1] >= 96


def test_thresholds_are_reported_by_thirds_of_the_groups_rewards(policy: Policy) -> None:
    prompts = [(4, 5), (5, 6), (6, 7), (7, 8), (8, 4), (4, 6), (5, 5)]
    batch = generate_batch(policy, prompts=prompts, sizes=(2, 3, 2, 2, 4, 2, 2))
    metrics = Learner(policy, learner_config()).step(batch, version=0)
    means = [float(batch.reward[batch.group == group].mean()) for group in range(7)]
    order = sorted(range(7), key=means.__getitem__)
    for name, groups in (("low", order[:3]), ("middle", order[3:5]), ("high", order[5:])):
        logs = [math.log(g) for g, at in zip(batch.gamma.tolist(), batch.group.tolist(), strict=True) if at in groups]
        expected = math.exp(sum(logs) / len(logs))
        assert metrics[f"threshold_gamma_by_difficulty{{group_reward={name}}}"] == pytest.approx(expected, rel=1e-5)


def test_two_groups_have_no_thirds(policy: Policy) -> None:
    batch = generate_batch(policy, prompts=[(4, 5), (5, 6)], sizes=(3, 3))
    metrics = Learner(policy, learner_config()).step(batch, version=0)
    assert not any("by_difficulty" in key for key in metrics)


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
        features = surrogate_log_probs(policy, batch, mean_field(batch, taus), features=True).features
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


@pytest.mark.parametrize(
    "bad",
    [
        {"surrogate": "exact"},
        {"prompt_masking": 1.0},
        {"prompt_masking": -0.1},
        {"prompt_masking": math.nan},
        {"importance_weight": "clipped"},
        {"weight_level": "group"},
        {"diagnostics_every": -1},
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        learner_config(**bad)
