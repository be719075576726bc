"""m-times mean field: the law of tau, the latent each token is scored on, and the scores against a loop."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixtures import LENGTH, PROMPTS, generate_batch, loop_log_probs, prompt_of, tiny_policy
from torch import Tensor

from common.keyed_random import derive
from common.policy import Policy
from learner.batch import Batch
from learner.surrogate import draw_taus, latent, scored_after, surrogate_log_probs

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


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 8), max_size=4),
)
def test_each_token_is_scored_after_the_latest_tau_before_it(reveal: list[list[int]], taus: list[int]) -> None:
    drawn = torch.tensor([sorted(taus)] * len(reveal), dtype=torch.int64).reshape(len(reveal), -1)
    expected = [[max([0, *(tau for tau in taus if tau < at)]) for at in row] for row in reveal]
    assert scored_after(torch.tensor(reveal), drawn).tolist() == expected


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_a_latent_holds_what_was_revealed_up_to_its_step(reveal: list[list[int]], step: int) -> None:
    ids = [[100 + 4 * n + position for position in range(4)] for n in range(len(reveal))]
    expected = [[i if at <= step else 2 for i, at in zip(*pair, strict=True)] for pair in zip(ids, reveal, strict=True)]
    found = latent(torch.tensor(ids), torch.tensor(reveal), torch.full((len(reveal),), step), 2)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("law", "passes"), [("paper", 1), ("paper", 2), ("distinct", 2), ("distinct", 3), ("distinct", 99)]
)
def test_scores_equal_a_loop_over_completions_and_latents(policy: Policy, batch: Batch, law: str, passes: int) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=passes, law=law, update=0)
    with torch.no_grad():
        scores = surrogate_log_probs(policy, batch, taus)
        expected = loop_log_probs(policy, batch, taus.tolist())
    torch.testing.assert_close(scores.logprob, expected, rtol=0, atol=1e-10)
    assert (scores.logprob[~batch.scored] == 0).all()
    assert scores.features is None


def test_scores_carry_the_gradient_of_the_loop(policy: Policy, batch: Batch) -> None:
    part = batch.select(torch.tensor([0, 1, 4, 5]))
    taus = draw_taus(part.seed, part.nfe, passes=3, law="distinct", update=0)
    coefficient = torch.randn(part.scored.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = list(policy.model.parameters())
    ours = torch.autograd.grad((coefficient * surrogate_log_probs(policy, part, taus).logprob).sum(), weights)
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
        exact = surrogate_log_probs(policy, batch, taus).logprob
        mean_field = surrogate_log_probs(policy, batch, taus[:, :0]).logprob
    drawn = batch.scored
    assert (batch.behaviour_logprob[drawn] < 0).all()
    torch.testing.assert_close(exact[drawn], batch.behaviour_logprob[drawn].double(), rtol=0, atol=1e-5)
    if int(batch.nfe.max()) > 1:  # the test says something only if one pass is not exact
        assert (mean_field - batch.behaviour_logprob)[drawn].abs().max() > 1e-2


def test_tokens_of_the_first_step_have_no_mismatch_with_one_pass(policy: Policy, batch: Batch) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=1, law="paper", update=0)
    with torch.no_grad():
        mismatch = (surrogate_log_probs(policy, batch, taus).logprob - batch.behaviour_logprob).abs()
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
            scores = surrogate_log_probs(policy, batch, taus)
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
        scores = surrogate_log_probs(policy, batch, taus)
    assert scores.rows == len(PROMPTS)
    drawn = batch.scored
    torch.testing.assert_close(scores.logprob[drawn], batch.behaviour_logprob[drawn].double(), rtol=0, atol=1e-5)


def test_features_are_those_of_a_separate_forward_on_the_empty_completion(policy: Policy, batch: Batch) -> None:
    taus = draw_taus(batch.seed, batch.nfe, passes=3, law="distinct", update=0)
    features = surrogate_log_probs(policy, batch, taus, features=True).features
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
        features = surrogate_log_probs(policy, batch, taus, features=True).features
        assert features is not None
        found = policy.head.log_prob(features[batch.group], batch.gamma)
    torch.testing.assert_close(found, batch.gamma_logprob.double(), rtol=0, atol=1e-5)
    assert len(set(found.tolist())) > 3
