"""Surrogates: the laws they are drawn by, the latents each token is scored on, and the scores against a loop."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_fixtures import (
    LENGTH,
    PROMPTS,
    generate_batch,
    learner_config,
    loop_coupled,
    loop_distribution,
    loop_log_probs,
    prompt_of,
    tiny_policy,
)
from torch import Tensor

from common.keyed_random import derive
from common.policy import Policy
from learner.batch import Batch
from learner.surrogate import (
    Latents,
    coupled_masks,
    draw_hidden_prompt,
    draw_latents,
    draw_taus,
    mean_field,
    most_rows,
    scored_after,
    shown_by,
    surrogate_gap,
    surrogate_log_probs,
)

MANY = 64


def seeds(count: int, start: int = 0) -> Tensor:
    return torch.tensor([derive(start, index) for index in range(count)])


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def batch(policy: Policy) -> Batch:
    """Groups of unequal size with both endings: cut by a stop token, and by the length."""
    found = generate_batch(policy, sizes=(4, 6, 3))
    cut = (found.scored.sum(-1) < LENGTH).tolist()
    assert any(cut)
    assert not all(cut)
    assert int(found.nfe.max()) > 3
    return found


def within_five_sigma(counts: Counter, kinds: int, draws: int) -> bool:
    expected, sigma = draws / kinds, (draws / kinds * (1 - 1 / kinds)) ** 0.5
    return len(counts) == kinds and all(abs(count - expected) < 5 * sigma for count in counts.values())


@pytest.mark.parametrize("nfe", [1, 2, 5, 16])
def test_the_papers_law_is_uniform_from_zero_to_nfe_minus_one(nfe: int) -> None:
    draws = 8000
    taus = draw_taus(seeds(draws), torch.full((draws,), nfe), passes=2, law="paper", update=0)
    assert taus.shape == (draws, 1)
    counts = Counter(taus.flatten().tolist())
    assert set(counts) == set(range(nfe))
    assert nfe == 1 or within_five_sigma(counts, nfe, draws)


@pytest.mark.parametrize("law", ["paper", "distinct"])
def test_one_pass_draws_nothing(law: str) -> None:
    taus = draw_taus(seeds(3), torch.tensor([1, 4, 9]), passes=1, law=law, update=0)
    assert taus.shape == (3, 0)


@pytest.mark.parametrize("passes", [2, 3, 5, 40])
def test_distinct_values_are_as_many_as_asked_or_possible(passes: int) -> None:
    nfe = torch.arange(1, 13).repeat(20)
    taus = draw_taus(seeds(len(nfe)), nfe, passes=passes, law="distinct", update=0)
    for row, forwards in zip(taus.tolist(), nfe.tolist(), strict=True):
        assert row == sorted(row)
        steps = [tau for tau in row if tau]
        assert len(set(steps)) == len(steps) == min(passes, forwards) - 1
        assert set(steps) <= set(range(1, forwards))


def test_every_set_of_distinct_values_is_as_likely_as_any_other() -> None:
    draws = 6000
    taus = draw_taus(seeds(draws), torch.full((draws,), 5), passes=3, law="distinct", update=0)
    counts = Counter(tuple(row) for row in taus.tolist())
    assert set(counts) == set(combinations(range(1, 5), 2))
    assert within_five_sigma(counts, 6, draws)


@pytest.mark.parametrize(("law", "passes"), [("paper", 2), ("distinct", 2), ("distinct", 4)])
def test_taus_depend_on_seed_and_update_only(law: str, passes: int) -> None:
    seed, nfe = seeds(MANY), torch.arange(MANY) % 9 + 1
    together = draw_taus(seed, nfe, passes=passes, law=law, update=1)
    torch.manual_seed(123)  # a global generator must not matter
    for n in range(MANY):
        alone = draw_taus(seed[n : n + 1], nfe[n : n + 1], passes=passes, law=law, update=1)
        assert [tau for tau in alone[0].tolist() if tau] == [tau for tau in together[n].tolist() if tau]
    other_update = draw_taus(seed, nfe, passes=passes, law=law, update=2)
    other_seed = draw_taus(seeds(MANY, start=1), nfe, passes=passes, law=law, update=1)
    assert (together != other_update).any()
    assert (together != other_seed).any()


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 8), max_size=4),
)
def test_each_token_is_scored_after_the_latest_tau_before_it(reveal: list[list[int]], taus: list[int]) -> None:
    drawn = torch.tensor([sorted(taus)] * len(reveal), dtype=torch.int64).reshape(len(reveal), -1)
    expected = [[max([0, *(tau for tau in taus if tau < at)]) for at in row] for row in reveal]
    assert scored_after(torch.tensor(reveal), drawn).tolist() == expected


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_a_latent_shows_what_was_revealed_up_to_its_step(reveal: list[list[int]], step: int) -> None:
    expected = [[[at <= other for at in row] for other in (0, step)] for row in reveal]
    found = shown_by(torch.tensor(reveal), torch.tensor([[0, step]] * len(reveal)))
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("law", "passes"), [("paper", 1), ("paper", 2), ("distinct", 2), ("distinct", 3), ("distinct", 99)]
)
def test_scores_equal_a_loop_over_completions_and_latents(policy: Policy, batch: Batch, law: str, passes: int) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=passes, law=law, update=0)
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, mean_field(batch, taus))
        expected = loop_log_probs(policy, batch, taus.tolist())
    torch.testing.assert_close(scores.logprob, expected, rtol=0, atol=1e-10)
    assert (scores.logprob[~batch.scored] == 0).all()
    assert scores.features is None


def test_scores_carry_the_gradient_of_the_loop(policy: Policy, batch: Batch) -> None:
    part = batch.select(torch.tensor([0, 1, 4, 5]))
    taus = draw_taus(part.seed, part.nfe, passes=3, law="distinct", update=0)
    coefficient = torch.randn(part.scored.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = list(policy.model.parameters())
    ours = torch.autograd.grad(
        (coefficient * surrogate_log_probs(policy, part, mean_field(part, taus)).logprob).sum(), weights
    )
    loops = torch.autograd.grad((coefficient * loop_log_probs(policy, part, taus.tolist())).sum(), weights)
    for one, other in zip(ours, loops, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # Llama's norms are float32 inside


EXACT = [
    ("entropy_bound", "sample", 1.0, None),
    ("entropy_bound", 1.0, 0.5, 4),
    ("entropy_bound", 4.0, 1.7, 2),
    ("entropy_bound", 0.0, 1.3, None),
    ("confidence", 0.3, 1.0, None),
    ("confidence", 0.2, 0.7, 4),
    ("top_k", 3.0, 1.7, None),
    ("top_k", 1.0, 0.6, 2),
]


@pytest.mark.parametrize(("rule", "threshold", "temperature", "block"), EXACT)
def test_with_enough_passes_the_surrogate_is_the_recorded_behaviour(
    policy: Policy, rule: str, threshold: float | str, temperature: float, block: int | None
) -> None:
    batch = generate_batch(
        policy, rule=rule, threshold=threshold, temperature=temperature, block=block, sizes=(3, 3, 2)
    )
    taus = draw_taus(batch.seed, batch.nfe, passes=LENGTH, law="distinct", update=0)
    with torch.no_grad():
        exact = surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob
        one_pass = surrogate_log_probs(policy, batch, mean_field(batch, taus[:, :0])).logprob
    drawn = batch.scored
    assert (batch.behaviour_logprob[drawn] < 0).all()
    torch.testing.assert_close(exact[drawn], batch.behaviour_logprob[drawn].double(), rtol=0, atol=1e-5)
    if int(batch.nfe.max()) > 1:  # the test says something only if one pass is not exact
        assert (one_pass - batch.behaviour_logprob)[drawn].abs().max() > 1e-2


def test_tokens_of_the_first_step_have_no_mismatch_with_one_pass(policy: Policy, batch: Batch) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=1, law="paper", update=0)
    with torch.no_grad():
        mismatch = (surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob - batch.behaviour_logprob).abs()
    first = batch.scored & (batch.reveal_step == 1)
    later = batch.scored & (batch.reveal_step > 1)
    assert mismatch[first].max() < 1e-6
    assert mismatch[later].max() > 1e-2


@pytest.mark.parametrize(("law", "passes"), [("paper", 1), ("paper", 2), ("distinct", 3), ("distinct", 99)])
def test_rows_are_one_per_group_and_one_per_latent_that_scores_a_token(
    policy: Policy, batch: Batch, law: str, passes: int
) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=passes, law=law, update=0)
    after = scored_after(batch.reveal_step, taus)
    latents = {
        (n, int(after[n, position])) for n, position in batch.scored.nonzero().tolist() if int(after[n, position]) > 0
    }
    forwarded = []
    forward = policy.hidden
    policy.hidden = lambda ids, attended: forwarded.append(len(ids)) or forward(ids, attended)  # type: ignore
    try:
        with torch.no_grad():
            scores = surrogate_log_probs(policy, batch, mean_field(batch, taus))
    finally:
        del policy.hidden
    assert scores.rows == len(PROMPTS) + len(latents)
    assert forwarded == [scores.rows]


@pytest.mark.parametrize(("law", "passes"), [("paper", 2), ("distinct", 4)])
def test_completions_of_one_forward_need_no_latent(policy: Policy, law: str, passes: int) -> None:
    batch = generate_batch(policy, threshold=1e9, sizes=(3, 2, 2))
    assert batch.nfe.tolist() == [1] * 7
    taus = draw_taus(batch.seed, batch.nfe, passes=passes, law=law, update=0)
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, mean_field(batch, taus))
    assert scores.rows == len(PROMPTS)
    drawn = batch.scored
    torch.testing.assert_close(scores.logprob[drawn], batch.behaviour_logprob[drawn].double(), rtol=0, atol=1e-5)


def test_features_are_those_of_a_separate_forward_on_the_empty_completion(policy: Policy, batch: Batch) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=3, law="distinct", update=0)
    features = surrogate_log_probs(policy, batch, mean_field(batch, taus), features=True).features
    assert features is not None
    assert not features.requires_grad
    firsts = [int((batch.group == group).nonzero()[0]) for group in range(len(PROMPTS))]
    for group, completion in enumerate(firsts):
        prompt = prompt_of(batch, completion)
        ids = torch.cat([prompt, torch.full((LENGTH,), policy.vocabulary.mask_id)]).unsqueeze(0)
        with torch.no_grad():
            states = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, : len(prompt)]
        torch.testing.assert_close(features[group], states.mean(0), rtol=0, atol=1e-10)


def test_gamma_log_prob_from_these_features_is_the_recorded_one(policy: Policy, batch: Batch) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=2, law="paper", update=0)
    with torch.no_grad():
        features = surrogate_log_probs(policy, batch, mean_field(batch, taus), features=True).features
        assert features is not None
        found = policy.head.log_prob(features[batch.group], batch.gamma)
    torch.testing.assert_close(found, batch.gamma_logprob.double(), rtol=0, atol=1e-5)
    assert len(set(found.tolist())) > 3


# --- coupled masks


def with_undrawn(batch: Batch) -> Batch:
    """The batch as if nothing behind a stop token had been drawn."""
    return replace(batch, token_version=batch.token_version.masked_fill(~batch.scored, -1))


def test_one_of_the_coupled_latents_masks_each_token_and_the_other_shows_it(batch: Batch) -> None:
    batch = with_undrawn(batch)
    latents = coupled_masks(batch, update=0)
    drawn = batch.token_version >= 0
    nothing, one, other = latents.shown.unbind(1)
    assert not nothing.any()
    assert (one ^ other == drawn).all()  # never drawn: MASK in both
    assert not (~drawn).logical_and(one | other).any()
    assert (~drawn).any()
    whole, scored_one, scored_other = latents.scores.unbind(1)
    assert (whole == batch.scored).all()
    assert (scored_one == ~one & batch.scored).all()
    assert (scored_other == ~other & batch.scored).all()
    assert latents.hidden_prompt is None


def many_completions(batch: Batch, count: int, length: int = 4) -> Batch:
    """Its second completion under many seeds, all of whose tokens are drawn and scored."""
    ones = torch.ones(count, length, dtype=torch.int64)
    return replace(
        batch.select(torch.full((count,), 1)),
        seed=seeds(count), completion_ids=ones, token_version=ones, reveal_step=ones, scored=ones.bool(),
    )  # fmt: skip


def test_a_mask_has_one_probability_per_completion_uniform_between_two_and_eight_tenths(batch: Batch) -> None:
    """Two tokens of a completion are masked together with probability E[t^2] = 1/4 + .6^2/12, and E[t] = 1/2."""
    draws = 20000
    masked = ~coupled_masks(many_completions(batch, draws), update=0).shown[:, 1]
    both = 0.25 + 0.36 / 12
    for found, expected in ((masked.double().mean(0), 0.5), ((masked[:, 0] & masked[:, 1]).double().mean(), both)):
        assert (found - expected).abs().max() < 5 * (expected * (1 - expected) / draws) ** 0.5
    shares = (~coupled_masks(many_completions(batch, 200, length=4000), update=0).shown[:, 1]).double().mean(-1)
    assert 0.17 < shares.min() < 0.23
    assert 0.77 < shares.max() < 0.83


def test_coupled_masks_depend_on_seed_and_update_only(policy: Policy, batch: Batch) -> None:
    together = coupled_masks(batch, update=1)
    torch.manual_seed(123)  # a global generator must not matter
    for n in range(len(batch.seed)):
        alone = coupled_masks(batch.select(torch.tensor([n])), update=1)
        assert (alone.shown[0] == together.shown[n]).all()
    assert (together.shown != coupled_masks(batch, update=2).shown).any()
    others = replace(batch, seed=batch.seed + 1)
    assert (together.shown != coupled_masks(others, update=1).shown).any()


@pytest.mark.parametrize("hide", [False, True])
def test_coupled_scores_equal_a_loop(policy: Policy, batch: Batch, hide: bool) -> None:
    batch = with_undrawn(batch) if hide else batch
    latents = coupled_masks(batch, update=0)
    hidden = draw_hidden_prompt(batch, 0.5, update=0) if hide else None
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, replace(latents, hidden_prompt=hidden))
        expected = loop_coupled(policy, batch, ~latents.shown[:, 1], hidden)
    torch.testing.assert_close(scores.logprob, expected, rtol=0, atol=1e-10)
    assert (scores.logprob[~batch.scored] == 0).all()


def test_coupled_scores_carry_the_gradient_of_the_loop(policy: Policy, batch: Batch) -> None:
    part = batch.select(torch.tensor([0, 1, 4, 5]))
    latents = coupled_masks(part, update=0)
    hidden = draw_hidden_prompt(part, 0.3, update=0)
    coefficient = torch.randn(part.scored.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = list(policy.model.parameters())
    scores = surrogate_log_probs(policy, part, replace(latents, hidden_prompt=hidden)).logprob
    ours = torch.autograd.grad((coefficient * scores).sum(), weights)
    loop = loop_coupled(policy, part, ~latents.shown[:, 1], hidden)
    loops = torch.autograd.grad((coefficient * loop).sum(), weights)
    for one, other in zip(ours, loops, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # Llama's norms are float32 inside


# --- options that all surrogates share

OPTIONS = [
    {"surrogate": "mean_field", "prompt_masking": 0.4},
    {"surrogate": "mean_field", "prompt_masking": 0.4, "surrogate_passes": 1},
    {"surrogate": "coupled_masks"},
    {"surrogate": "coupled_masks", "prompt_masking": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_of_the_scores_is_that_of_finite_differences(policy: Policy, batch: Batch, options: dict) -> None:
    """Along a direction of the output head, which stands behind Llama's float32 norms."""
    latents = draw_latents(batch, learner_config(**options), update=0)
    generator = torch.Generator().manual_seed(3)
    coefficient = torch.randn(batch.scored.shape, dtype=torch.float64, generator=generator)
    weight = policy.model.get_output_embeddings().weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)

    def value() -> Tensor:
        return (coefficient * surrogate_log_probs(policy, batch, latents).logprob).sum()

    slope = float((torch.autograd.grad(value(), [weight])[0] * direction).sum())
    ends, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            ends.append(float(value()))
        weight.add_(step * direction)
    assert abs(slope) > 0.1
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_prompt_tokens_are_hidden_with_the_given_probability_and_padding_never(
    batch: Batch,
) -> None:
    draws = 20000
    many = many_completions(batch, draws)
    assert many.attended.tolist() == [[False, False, True, True, True]]
    hidden = draw_hidden_prompt(many, 0.15, update=0)
    assert not hidden[:, :2].any()
    assert (hidden[:, 2:].double().mean(0) - 0.15).abs().max() < 5 * (0.15 * 0.85 / draws) ** 0.5
    both = (hidden[:, 2] & hidden[:, 3]).double().mean()
    assert abs(both - 0.15**2) < 5 * (0.15**2 / draws) ** 0.5
    assert not draw_hidden_prompt(many, 0.0, update=0).any()


def test_hidden_prompt_tokens_depend_on_seed_and_update_only(policy: Policy, batch: Batch) -> None:
    together = draw_hidden_prompt(batch, 0.4, update=1)
    wider = replace(
        batch,
        prompts=torch.nn.functional.pad(batch.prompts, (3, 0)),
        attended=torch.nn.functional.pad(batch.attended, (3, 0)),
    )
    assert (draw_hidden_prompt(wider, 0.4, update=1)[:, 3:] == together).all()
    for n in range(len(batch.seed)):
        alone = draw_hidden_prompt(batch.select(torch.tensor([n])), 0.4, update=1)
        assert (alone[0] == together[n]).all()
    assert (draw_hidden_prompt(batch, 0.4, update=2) != together).any()
    same_group = together[batch.group == 1]
    assert (same_group != same_group[0]).any()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_scores_under_hidden_prompts_equal_a_loop(policy: Policy, batch: Batch, passes: int) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=passes, law="distinct", update=0)
    hidden = draw_hidden_prompt(batch, 0.5, update=0)
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, replace(mean_field(batch, taus), hidden_prompt=hidden))
        expected = loop_log_probs(policy, batch, taus.tolist(), hidden)
        clean = surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob
    torch.testing.assert_close(scores.logprob, expected, rtol=0, atol=1e-10)
    assert (scores.logprob - clean).abs().max() > 1e-2


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_are_counted_and_clean_ones_are_there_for_features_only(
    policy: Policy, batch: Batch, options: dict, features: bool
) -> None:
    latents = draw_latents(batch, learner_config(**options), update=0)
    hides = latents.hidden_prompt is not None
    pairs = int(latents.scores.any(-1)[:, 0 if hides else 1 :].sum())
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, latents, features=features)
        clean = surrogate_log_probs(policy, batch, mean_field(batch, batch.reveal_step[:, :0]), features=True)
    assert scores.rows == pairs + (len(PROMPTS) if features or not hides else 0)
    if features:
        assert scores.features is not None
        torch.testing.assert_close(scores.features, clean.features, rtol=0, atol=1e-10)


@pytest.mark.parametrize("train", ["model", "threshold", "joint"])
@pytest.mark.parametrize("options", [{}, {"surrogate_passes": 1}, *OPTIONS], ids=str)
def test_no_group_takes_more_rows_than_it_is_said_to(policy: Policy, batch: Batch, options: dict, train: str) -> None:
    config = learner_config(train=train, **options)
    bound = most_rows(torch.bincount(batch.group), config).tolist()
    for group, most in enumerate(bound):
        part = batch.select((batch.group == group).nonzero().flatten())
        with torch.no_grad():
            rows = [
                surrogate_log_probs(
                    policy, part, draw_latents(part, config, update=update), features=train != "model"
                ).rows
                for update in range(8)
            ]
        assert max(rows) <= most
        assert max(rows) >= most - len(part.seed)  # a completion whose tokens are all on one side needs a row less


def test_training_the_threshold_alone_takes_one_clean_row_per_group(policy: Policy, batch: Batch) -> None:
    config = learner_config(train="threshold", surrogate="coupled_masks", prompt_masking=0.5)
    latents = draw_latents(batch, config, update=0)
    assert latents.hidden_prompt is None
    with torch.no_grad():
        assert surrogate_log_probs(policy, batch, latents, features=True).rows == len(PROMPTS)


def test_latents_are_the_same_whenever_they_are_asked_for(batch: Batch) -> None:
    for options in ({}, *OPTIONS):
        one, other = (draw_latents(batch, learner_config(**options), update=3) for _ in range(2))
        for field in Latents.__dataclass_fields__:
            left, right = getattr(one, field), getattr(other, field)
            assert (left is None and right is None) or (left == right).all()


# --- how far the mean field is from the truth


def test_the_gap_is_the_loops(policy: Policy, batch: Batch) -> None:
    part = batch.select(torch.tensor([0, 1, 4, 5, 10]))
    gaps = surrogate_gap(policy, part, (1, 2, 4))
    for passes, law in ((1, "distinct"), (2, "paper"), (4, "distinct")):
        taus = draw_taus(part.seed, part.nfe, passes=passes, law=law, update=0).tolist()
        expected = torch.zeros(part.scored.shape, dtype=torch.float64)
        for n, position in part.scored.nonzero().tolist():
            at = int(part.reveal_step[n, position])
            steps = (at - 1, max([0, *(tau for tau in taus[n] if tau < at)]))
            with torch.no_grad():
                exact, surrogate = (
                    loop_distribution(policy, part, n, position, [int(t) <= step for t in part.reveal_step[n]])
                    for step in steps
                )
            expected[n, position] = (exact.exp() * (exact - surrogate)).sum()
        torch.testing.assert_close(gaps[passes], expected, rtol=0, atol=1e-10)


def test_the_gap_closes_with_passes_and_is_nought_at_the_first_step(policy: Policy, batch: Batch) -> None:
    gaps = surrogate_gap(policy, batch, (1, 4, LENGTH))
    assert gaps[1][batch.reveal_step == 1].abs().max() < 1e-12
    assert gaps[1].mean() > gaps[4].mean() > 1e-3
    assert gaps[LENGTH].abs().max() < 1e-12
    assert not gaps[1].requires_grad


def test_the_gap_of_completions_of_one_forward_is_nought(policy: Policy) -> None:
    batch = generate_batch(policy, threshold=1e9, sizes=(3, 2, 2))
    for gap in surrogate_gap(policy, batch, (1, 2, 4)).values():
        assert gap.shape == batch.scored.shape
        assert gap.abs().max() < 1e-12
