"""DenoisingEngine: equal to the textbook sampler, indifferent to batching, honest about what it records."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference_sampler import reference_sample

from actors.engine import DenoisingEngine, Request
from common.behaviour import behaviour_log_probs
from common.errors import RunError, UserError
from common.keyed_random import GAMMA_STREAM, derive, uniform
from common.policy import Policy
from common.trajectory import NOT_DRAWN, Completion
from common.weights import to_flat

LENGTH, WIDTH = 16, 12
ARRAYS = ("prompt_ids", "completion_ids", "reveal_step", "behaviour_logprob", "entropy", "token_version")
SCALARS = ("gamma", "gamma_logprob", "nfe", "seed", "temperature")
PARAMETERS = {"entropy_bound": (0.0, 1.5, 4.0, 9.0), "confidence": (0.2, 0.35, 0.6, 1.0), "top_k": (1.0, 2.0, 3.0, 7.0)}


def make_engine(policy: Policy, **keys: object) -> DenoisingEngine:
    given = {"slots": 3, "rule": "entropy_bound", "max_prompt_tokens": WIDTH, "completion_tokens": LENGTH}
    return DenoisingEngine(policy, **(given | keys))


def make_requests(count: int, rule: str = "entropy_bound", temperature: float = 1.0) -> list[Request]:
    """Prompts of many lengths, each a group of its own, with every parameter of the rule."""
    rng = random.Random(count)
    return [
        Request(
            prompt_ids=tuple(rng.choices(range(4, 22), k=1 + 5 * index % WIDTH)),
            seed=derive(0, index),
            group=index,
            temperature=temperature,
            threshold=PARAMETERS[rule][index % 4],
        )
        for index in range(count)
    ]


def one_group(size: int, **keys: object) -> list[Request]:
    return [Request(prompt_ids=(7, 5, 9), seed=derive(1, index), group=0, **keys) for index in range(size)]


def assert_same(one: Completion, other: Completion, *, exactly: bool = True) -> None:
    for name in ARRAYS:
        mine, theirs = getattr(one, name), getattr(other, name)
        if exactly or mine.dtype != np.float32:
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6, err_msg=name)
    for name in SCALARS:
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0 if exactly else 1e-9), name
    assert one.finish_reason == other.finish_reason


def assert_recomputable(completion: Completion, policies: dict[int, Policy]) -> None:
    """Every log-probability is that of the token given the latent before its step, by the weights of its version."""
    prompt, tokens = completion.prompt_ids.tolist(), torch.from_numpy(completion.completion_ids).long()
    steps = torch.from_numpy(completion.reveal_step)
    mask = next(iter(policies.values())).vocabulary.mask_id
    temperature = torch.tensor(completion.temperature, dtype=torch.float64)
    expected = torch.zeros(len(tokens), dtype=torch.float64)
    for step in range(1, completion.nfe + 1):
        latent = torch.where(steps < step, tokens, mask)
        for version, policy in policies.items():
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([prompt + latent.tolist()])).logits[0, len(prompt) :]
            scores = behaviour_log_probs(logits, temperature.expand(len(tokens)), mask)
            mine = (steps == step) & (torch.from_numpy(completion.token_version) == version)
            expected[mine] = scores.gather(-1, tokens[:, None])[:, 0][mine]
    # recorded in float32: equal to within half a unit in the last place, and 1e-9
    recorded = completion.behaviour_logprob
    assert recorded.dtype == np.float32
    np.testing.assert_array_less(np.abs(recorded - expected.numpy()), 0.5 * np.spacing(np.abs(recorded)) + 1e-9)


def assert_sound(completion: Completion, policy: Policy) -> None:
    """What holds of every completion whatever the rule: no MASK, steps without gaps, filled positions stand outside."""
    ids, steps, nfe = completion.completion_ids, completion.reveal_step, completion.nfe
    stop_ids = policy.vocabulary.stop_ids
    assert policy.vocabulary.mask_id not in ids
    assert 1 <= nfe <= len(ids)
    drawn = steps <= nfe
    assert set(steps[drawn].tolist()) == set(range(1, nfe + 1))
    assert (steps[~drawn] == nfe + 1).all()
    assert (ids[~drawn] == policy.vocabulary.eos_id).all()
    assert (completion.behaviour_logprob[~drawn] == 0).all()
    assert (completion.entropy[~drawn] == 0).all()
    assert ((completion.token_version == NOT_DRAWN) == ~drawn).all()
    stops = np.flatnonzero(drawn & np.isin(ids, stop_ids))
    assert completion.finish_reason == ("stop" if len(stops) else "length")
    first = stops[0] if len(stops) else len(ids)
    assert drawn[:first].all()
    # the last forward was needed: before it, something left of what was then the first stop was still masked
    before = np.flatnonzero((steps < nfe) & np.isin(ids, stop_ids))
    assert (steps[: before[0] if len(before) else len(ids)] == nfe).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("block", [16, 8, 4])
@pytest.mark.parametrize("rule", PARAMETERS)
def test_engine_is_the_textbook_sampler(policy: Policy, rule: str, block: int, temperature: float) -> None:
    requests = make_requests(8, rule, temperature)
    completions = make_engine(policy, rule=rule, block_length=block).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = reference_sample(
            policy,
            request.prompt_ids,
            rule=rule,
            parameter=request.threshold,
            temperature=temperature,
            seed=request.seed,
            length=LENGTH,
            block=block,
        )
        assert completion.completion_ids.tolist() == expected.tokens
        assert completion.reveal_step.tolist() == expected.reveal_step
        assert completion.nfe == expected.nfe
        assert completion.finish_reason == expected.finish_reason
        np.testing.assert_allclose(completion.behaviour_logprob, expected.logprob, rtol=2e-7, atol=1e-9)
        np.testing.assert_allclose(completion.entropy, expected.entropy, rtol=2e-7, atol=1e-9)
        assert tuple(completion.prompt_ids) == request.prompt_ids
        assert (completion.gamma, completion.gamma_logprob) == (request.threshold, 0.0)
        assert (completion.seed, completion.temperature) == (request.seed, temperature)
        assert_sound(completion, policy)


def test_the_cases_above_are_not_all_alike(policy: Policy) -> None:
    """The comparison says something only if rows end early and late, by stop and by length, with ties in between."""
    completions = make_engine(policy, block_length=4).generate(make_requests(32))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert len({c.nfe for c in completions}) > 4
    assert any((c.reveal_step == c.nfe + 1).sum() > 4 for c in completions)


@pytest.mark.parametrize("fixed_padding", [True, False])
@pytest.mark.parametrize("rule", PARAMETERS)
def test_a_completion_does_not_depend_on_its_company(policy: Policy, rule: str, fixed_padding: bool) -> None:
    requests = make_requests(64, rule)
    among = make_engine(policy, rule=rule, slots=64, fixed_padding=fixed_padding).generate(requests)
    order = random.Random(1).sample(range(64), 64)
    engine = make_engine(policy, rule=rule, slots=7, fixed_padding=fixed_padding)
    shuffled = engine.generate(requests[index] for index in order)
    for index, completion in zip(order, shuffled, strict=True):
        assert_same(completion, among[index], exactly=False)
    for index in range(0, 64, 8):
        [alone] = make_engine(policy, rule=rule, slots=1, fixed_padding=fixed_padding).generate([requests[index]])
        assert_same(alone, among[index], exactly=False)


def test_fixed_padding_repeats_bit_by_bit_in_float32(make_policy: Callable[..., Policy]) -> None:
    single = make_policy(double=False)
    requests = make_requests(24)
    first = make_engine(single, slots=24, fixed_padding=True).generate(requests)
    again = make_engine(single, slots=24, fixed_padding=True).generate(requests)
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("rule", PARAMETERS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_follow_from_the_trajectory_alone(policy: Policy, rule: str, temperature: float) -> None:
    for completion in make_engine(policy, rule=rule, block_length=8).generate(make_requests(6, rule, temperature)):
        assert_recomputable(completion, {0: policy})


def test_rows_with_temperatures_of_their_own(policy: Policy) -> None:
    requests = [
        replace(request, temperature=temperature)
        for request, temperature in zip(make_requests(6), [0.0, 0.5, 1.0, 1.5, 0.0, 2.0], strict=True)
    ]
    for request, completion in zip(requests, make_engine(policy, slots=6).generate(requests), strict=True):
        assert completion.temperature == request.temperature
        if request.temperature == 0:
            assert not completion.behaviour_logprob.any()
        else:
            assert_recomputable(completion, {0: policy})


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [2.0, "sample", "mean"])
def test_a_group_shares_its_first_forward_and_nothing_else(policy: Policy, threshold: float | str) -> None:
    requests = one_group(8, threshold=threshold) + make_requests(3)
    together = make_engine(policy, slots=11)
    for request in requests:
        together.submit(request)
    finished = dict(together.step())
    assert (together.forwards, together.row_forwards) == (1, 4)
    live = together.load
    finished.update(together.step())
    assert (together.forwards, together.row_forwards) == (2, 4 + live)
    while not together.idle:
        finished.update(together.step())
    assert sorted(finished) == list(range(1, 12))
    assert together.row_forwards == sum(c.nfe for c in finished.values()) - 7
    for handle, request in enumerate(requests, start=1):
        [alone] = make_engine(policy).generate([request])
        assert_same(finished[handle], alone, exactly=False)


def test_requests_that_differ_in_prompt_or_group_share_nothing(policy: Policy) -> None:
    first = one_group(1)[0]
    engine = make_engine(policy, slots=3)
    for request in (first, replace(first, group=1), replace(first, prompt_ids=(7, 5, 8))):
        engine.submit(request)
    engine.step()
    assert engine.row_forwards == 3


def test_a_group_larger_than_the_engine_is_generated_whole(policy: Policy) -> None:
    requests = [*one_group(8, threshold="sample"), *make_requests(2)]
    small = make_engine(policy, slots=3).generate(requests)
    large = make_engine(policy, slots=16).generate(requests)
    for one, other in zip(small, large, strict=True):
        assert_same(one, other, exactly=False)


@pytest.mark.parametrize("head", ["categorical", "log_normal"])
@pytest.mark.parametrize("mode", ["sample", "mean"])
def test_thresholds_come_from_the_head_on_a_clean_first_forward(
    make_policy: Callable[..., Policy], head: str, mode: str
) -> None:
    policy = make_policy(head=head)
    groups = [
        [replace(request, seed=derive(4, request.group, index), threshold=mode) for index in range(3)]
        for request in make_requests(4)
    ]
    completions = make_engine(policy, slots=12).generate(request for group in groups for request in group)
    for index, completion in enumerate(completions):
        prompt = list(groups[index // 3][0].prompt_ids)
        ids = torch.tensor([prompt + [policy.vocabulary.mask_id] * LENGTH])
        with torch.no_grad():
            hidden = policy.model.base_model(input_ids=ids).last_hidden_state
            features = hidden[:, : len(prompt)].mean(1)
            seed = torch.tensor([completion.seed])
            drawn = policy.head.sample(features, uniform(seed, 0, GAMMA_STREAM))
            gamma = drawn if mode == "sample" else policy.head.mean(features)
            logprob = policy.head.log_prob(features, gamma).item() if mode == "sample" else 0.0
        assert completion.gamma == pytest.approx(gamma.item(), rel=1e-9)
        assert completion.gamma_logprob == pytest.approx(logprob, abs=1e-9)
        # and the rule used it: the same completion comes out when that gamma is given
        given = replace(groups[index // 3][index % 3], threshold=completion.gamma)
        [fixed] = make_engine(policy).generate([given])
        np.testing.assert_array_equal(fixed.reveal_step, completion.reveal_step)
        np.testing.assert_array_equal(fixed.completion_ids, completion.completion_ids)
    distinct = [len({round(c.gamma, 9) for c in completions[at : at + 3]}) for at in range(0, 12, 3)]
    assert distinct == [1] * 4 if mode == "mean" else max(distinct) > 1
    assert len({round(c.gamma, 9) for c in completions}) > 1


# -- weights arriving between steps ----------------------------------------------------------------------------------


def test_live_rows_go_on_with_new_weights(make_policy: Callable[..., Policy]) -> None:
    # through float32, as published, so that the recomputation below has the very same numbers
    old, new = make_policy(seed=0, double=False).double(), make_policy(seed=1, double=False).double()
    acting = copy.deepcopy(old)
    engine = make_engine(acting, slots=4, block_length=8)
    engine.version = 3
    handles = [engine.submit(replace(request, threshold=0.5)) for request in make_requests(10)]
    finished = dict(engine.step())
    finished.update(engine.step())
    engine.adopt(to_flat(new), 7)
    assert engine.load == 10 - len(finished)
    while not engine.idle:
        for handle, completion in engine.step():
            assert handle not in finished
            finished[handle] = completion
    assert sorted(finished) == handles
    mixed = 0
    for handle in handles:
        completion = finished[handle]
        drawn = completion.reveal_step <= completion.nfe
        by_old = completion.token_version == 3
        if handle <= 4:
            assert (by_old == (drawn & (completion.reveal_step <= 2))).all()
        assert set(completion.token_version[drawn].tolist()) <= {3, 7}
        mixed += len(set(completion.token_version[drawn].tolist())) == 2
        assert completion.oldest_version == (3 if by_old.any() else 7)
        assert_sound(completion, acting)
        assert_recomputable(completion, {3: old, 7: new})
    assert mixed >= 2


def test_adopting_the_same_weights_changes_nothing(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(double=False).double()
    requests = make_requests(6)
    expected = make_engine(policy).generate(requests)
    engine = make_engine(copy.deepcopy(policy))
    for request in requests:
        engine.submit(request)
    finished = {}
    while not engine.idle:
        finished.update(engine.step())
        engine.adopt(to_flat(policy), 0)
    for index, completion in enumerate(expected, start=1):
        assert_same(finished[index], completion)


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PARAMETERS)
def test_every_completion_is_sound_and_no_forward_is_wasted(policy: Policy, rule: str) -> None:
    engine = make_engine(policy, rule=rule, slots=9, block_length=4)
    completions = engine.generate(make_requests(40, rule, 1.3))
    for completion in completions:
        assert_sound(completion, policy)
        blocks = completion.reveal_step.reshape(-1, 4)
        assert (np.diff([block.min() for block in blocks]) >= 0).all()
    assert engine.row_forwards == sum(c.nfe for c in completions)
    assert engine.step() == []
    assert engine.row_forwards == sum(c.nfe for c in completions)


def test_mask_is_never_revealed_where_the_model_wants_it_most(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[policy.vocabulary.mask_id] *= 100
    for temperature in (0.0, 1.0):
        for completion in make_engine(policy, slots=16).generate(make_requests(16, temperature=temperature)):
            assert_sound(completion, policy)


def test_a_stop_token_at_the_front_ends_the_row_at_once(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    with torch.no_grad():  # every position prefers EOS: logits are 0 elsewhere, positive there
        features = policy.model.lm_head.weight
        features.zero_()
        policy.model.model.norm.weight.zero_()
    policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    with torch.no_grad():
        policy.model.lm_head.bias[policy.vocabulary.eos_id] = 30.0
    [completion] = make_engine(policy, rule="top_k").generate(one_group(1, threshold=1.0))
    assert (completion.nfe, completion.finish_reason) == (1, "stop")
    assert completion.reveal_step.tolist() == [1] + [2] * (LENGTH - 1)
    assert (completion.completion_ids == policy.vocabulary.eos_id).all()
    assert completion.token_version.tolist() == [0] + [NOT_DRAWN] * (LENGTH - 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, "prompt of 0 tokens; it must have 1 to 12"),
        ({"prompt_ids": (5,) * 13}, "prompt of 13 tokens; it must have 1 to 12"),
        ({"temperature": -0.5}, "temperature=-0.5; use 0 for argmax"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(policy: Policy, changes: dict[str, object], words: str) -> None:
    engine = make_engine(policy)
    with pytest.raises(UserError, match=words):
        engine.submit(replace(one_group(1)[0], **changes))
    assert engine.idle


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("entropy_bound", {"threshold": -0.1}),
        ("entropy_bound", {"threshold": float("nan")}),
        ("entropy_bound", {"threshold": "sampled"}),
        ("top_k", {"threshold": 0.0}),
        ("entropy_bound", {"temperature": float("nan")}),
    ],
    ids=["negative gamma", "gamma is not a number", "unknown mode", "zero per step", "temperature is not a number"],
)
def test_a_parameter_that_means_nothing_is_refused(policy: Policy, rule: str, changes: dict[str, object]) -> None:
    """Otherwise nothing is ever revealed and the row never ends, or a mistyped mode reads as gamma 0."""
    engine = make_engine(policy, rule=rule)
    with pytest.raises(UserError):
        engine.submit(replace(one_group(1)[0], **changes))


def test_a_model_too_short_is_refused(policy: Policy) -> None:
    make_engine(policy, max_prompt_tokens=48)
    with pytest.raises(UserError, match=r"49 \+ completion of 16 tokens exceed the model's 64 positions; shorten"):
        make_engine(policy, max_prompt_tokens=49)


def test_weights_that_are_not_numbers_end_the_run_with_version_and_step(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    engine = make_engine(policy)
    engine.submit(one_group(1, threshold=0.0)[0])
    engine.step()
    engine.adopt(np.full_like(to_flat(policy), np.nan), 12)
    with pytest.raises(RunError, match="not finite: request 1, weights version 12, step 2"):
        engine.step()
