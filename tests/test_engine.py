"""DenoisingEngine: equal to the textbook sampler, indifferent to batching, honest about what it records."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_fixtures import (
    LENGTH,
    PARAMETERS,
    WIDTH,
    alone,
    assert_recomputable,
    assert_same,
    make_engine,
    make_requests,
    one_group,
    run_to_end,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertForMaskedLM

from actors.reference_sampler import entropy_of, forward, reference_sample, softmax
from actors.request import Failure, Request
from common.errors import RunError, UserError
from common.keyed_random import GAMMA_STREAM, derive, uniform
from common.policy import Policy
from common.trajectory import NOT_DRAWN, Completion
from common.weights import to_flat


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
    requests = make_requests(28, rule)
    among = make_engine(policy, rule=rule, slots=28, fixed_padding=fixed_padding).generate(requests)
    order = random.Random(1).sample(range(28), 28)
    engine = make_engine(policy, rule=rule, slots=7, fixed_padding=fixed_padding)
    shuffled = engine.generate(requests[index] for index in order)
    for index, completion in zip(order, shuffled, strict=True):
        assert_same(completion, among[index], exactly=False)
    for index in range(0, 28, 7):
        single = alone(policy, requests[index], rule=rule, fixed_padding=fixed_padding)
        assert_same(single, among[index], exactly=False)


@pytest.mark.parametrize(("slots", "buckets"), [(64, range(8, 65, 8)), (20, range(3, 22, 3)), (3, range(1, 4))])
def test_compiled_passes_have_few_sizes_up_to_the_slots(
    policy: Policy, slots: int, buckets: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    engine = make_engine(policy, slots=slots, compiled=True)
    for request in make_requests(slots):
        engine.submit(request)
    forwarded = []
    while not engine.idle:
        before = engine.cost.row_forwards
        engine.step()
        forwarded.append(engine.cost.row_forwards - before)
    assert forwarded[0] == buckets[-1]
    assert set(forwarded) <= set(buckets)
    assert len(set(forwarded)) > 1


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
    assert (together.cost.calls, together.cost.row_forwards) == (1, 4)
    live = together.load
    finished.update(together.step())
    assert (together.cost.calls, together.cost.row_forwards) == (2, 4 + live)
    finished.update(run_to_end(together))
    assert sorted(finished) == list(range(1, 12))
    assert together.cost.row_forwards == sum(c.nfe for c in finished.values()) - 7
    for handle, request in enumerate(requests, start=1):
        assert_same(finished[handle], alone(policy, request), exactly=False)


def test_requests_that_differ_in_prompt_or_group_share_nothing(policy: Policy) -> None:
    first = one_group(1)[0]
    engine = make_engine(policy, slots=3)
    for request in (first, replace(first, group=1), replace(first, prompt_ids=(7, 5, 8))):
        engine.submit(request)
    engine.step()
    assert engine.cost.row_forwards == 3


@pytest.mark.parametrize(("slots", "threshold"), [(1, 1.5), (3, "sample"), (5, 1.5)])
def test_a_group_has_one_first_forward_however_few_the_slots(
    policy: Policy, slots: int, threshold: float | str
) -> None:
    """Groups of 8, 4 and 1, which follow each other into slots as these become free, the prompts of unlike lengths."""
    first = one_group(8, threshold=threshold)
    second = [replace(request, group=1, prompt_ids=(6,) * 9) for request in first[:4]]
    requests = [*first, *second, replace(first[0], group=2, prompt_ids=(8,))]
    engine = make_engine(policy, slots=slots, block_length=8)
    completions = engine.generate(requests)
    assert engine.cost.row_forwards == sum(c.nfe for c in completions) - 7 - 3
    for request, completion in zip(requests, completions, strict=True):
        assert_same(completion, alone(policy, request, block_length=8), exactly=False)


def test_rows_that_all_begin_with_the_kept_pass_need_no_forward(policy: Policy) -> None:
    """Twins at temperature 0 end together, so the next three have nobody to be forwarded with."""
    engine = make_engine(policy, slots=3)
    completions = engine.generate(one_group(9, threshold=1.0, temperature=0.0))
    assert engine.cost.row_forwards == 1 + 9 * (completions[0].nfe - 1)
    assert engine.cost.calls == 1 + 3 * (completions[0].nfe - 1)
    for completion in completions[1:]:
        np.testing.assert_array_equal(completion.completion_ids, completions[0].completion_ids)


def test_a_kept_first_pass_is_not_used_with_other_weights(make_policy: Callable[..., Policy]) -> None:
    old, new = make_policy(seed=0, double=False).double(), make_policy(seed=1, double=False).double()
    engine = make_engine(copy.deepcopy(old), slots=2)
    handles = [engine.submit(request) for request in one_group(6, threshold=1.0)]
    engine.step()
    engine.adopt(to_flat(new), 1)
    finished = run_to_end(engine)
    for handle in handles[:2]:
        assert set(finished[handle].token_version.tolist()) >= {0, 1}
    for handle in handles:
        assert_recomputable(finished[handle], {0: old, 1: new})
        assert handle <= 2 or 0 not in finished[handle].token_version
    # one first pass for two rows by the old weights, one for the other four by the new
    assert engine.cost.row_forwards == sum(c.nfe for c in finished.values()) - 1 - 3


def test_no_slot_stands_idle_while_requests_wait(policy: Policy) -> None:
    engine = make_engine(policy, slots=4, block_length=8)
    handles = [engine.submit(request) for request in [*one_group(7), *make_requests(6), *one_group(5)]]
    while not engine.idle:
        remaining = engine.load
        ended = engine.step()
        assert sum(engine.latent(handle) is not None for handle in handles) + len(ended) == min(4, remaining)


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
    finished.update(run_to_end(engine))
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
    assert engine.cost.row_forwards == sum(c.nfe for c in completions)
    assert engine.step() == []
    assert engine.cost.row_forwards == sum(c.nfe for c in completions)


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
        ({"seed": 1 << 63}, "seed=9223372036854775808; it must fit 64 bits"),
        ({"prompt_ids": (5, 999)}, "prompt with token id 999; the model's vocabulary has"),
        ({"prompt_ids": (-1, 5)}, "prompt with token id -1"),
        ({"completion_tokens": 4.0}, "completion of 4.0 tokens"),
        ({"threshold": 1e308}, "threshold=1e\\+308 under the rule entropy_bound; give a number from 0 to 1e\\+30"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_prompt_tokens": 49}, r"49 \+ completion of 16 tokens exceed the model's 64 positions; shorten"),
        ({"block_length": 5}, "block_length=5 does not divide completion_tokens=16; choose a divisor"),
        ({"block_length": 0}, "block_length=0 does not divide completion_tokens=16"),
        ({"block_length": 32}, "block_length=32 does not divide completion_tokens=16"),
        ({"completion_tokens": 0}, "block_length=0 does not divide completion_tokens=0.*a length of at least 1"),
        (
            {"rule": "best"},
            "rule='best' is unknown; give one of entropy_bound, confidence, top_k",
        ),
        ({"cache": "double"}, "cache='double' is unknown; give one of none, prefix, dual"),
        ({"cache": "dual", "compiled": True}, "cache=dual cannot be compiled; set rollout.compile=false"),
        (
            {"slots": 10**13},
            "slots=10000000000000 rows of 28 tokens do not fit the memory of cpu.*; lower rollout.slots",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_engine_that_cannot_be_is_refused(policy: Policy, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_engine(policy, **changes)


def test_an_engine_as_large_as_the_model_allows_is_made(policy: Policy) -> None:
    make_engine(policy, max_prompt_tokens=48)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_refused_with_an_encoder_that_hands_out_no_keys(policy: Policy, cache: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": 0 for name in ("bos", "eos", "cls", "sep", "pad")}
    config = ModernBertConfig(vocab_size=len(policy.tokenizer), max_position_embeddings=64, **sizes, **special)
    encoder = Policy(ModernBertForMaskedLM(config), policy.head, policy.tokenizer)
    make_engine(encoder)
    with pytest.raises(UserError, match=r"ModernBertForMaskedLM hands out no keys and values; set sampler\.cache=none"):
        make_engine(encoder, cache=cache)


# -- lengths of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PARAMETERS)
def test_requests_of_different_lengths_share_a_batch(policy: Policy, rule: str) -> None:
    lengths = (4, None, 12, 8, 16, 4)
    requests = [
        replace(request, completion_tokens=length)
        for request, length in zip(make_requests(6, rule), lengths, strict=True)
    ]
    completions = make_engine(policy, rule=rule, slots=4, block_length=4).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        length = request.completion_tokens or LENGTH
        expected = reference_sample(
            policy,
            request.prompt_ids,
            rule=rule,
            parameter=request.threshold,
            temperature=1.0,
            seed=request.seed,
            length=length,
            block=4,
        )
        for name in ("completion_ids", "reveal_step", "behaviour_logprob", "entropy", "token_version"):
            assert getattr(completion, name).shape == (length,)
        assert completion.completion_ids.tolist() == expected.tokens
        assert completion.reveal_step.tolist() == expected.reveal_step
        assert (completion.nfe, completion.finish_reason) == (expected.nfe, expected.finish_reason)
        np.testing.assert_allclose(completion.behaviour_logprob, expected.logprob, rtol=2e-7, atol=1e-9)


def test_a_group_shares_its_first_forward_among_equal_lengths_only(policy: Policy) -> None:
    requests = [
        replace(request, completion_tokens=length)
        for request, length in zip(one_group(6, threshold=1.0), (8, 8, 8, 4, 4, 8), strict=True)
    ]
    engine = make_engine(policy, slots=2, block_length=4)
    completions = engine.generate(requests)
    assert engine.cost.row_forwards == sum(c.nfe for c in completions) - 2 - 1
    for request, completion in zip(requests, completions, strict=True):
        assert_same(completion, alone(policy, request, block_length=4), exactly=False)


@pytest.mark.parametrize("length", [0, -4, 20, 6])
def test_a_length_that_cannot_be_is_refused(policy: Policy, length: int) -> None:
    engine = make_engine(policy, block_length=4)
    with pytest.raises(UserError, match=rf"completion of {length} tokens; give 1 to 16 .*, in blocks of 4"):
        engine.submit(replace(one_group(1)[0], completion_tokens=length))
    assert engine.idle


# -- the queue, and requests that break --------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_generate_feeds_it(policy: Policy) -> None:
    requests = make_requests(7)
    engine = make_engine(policy, slots=1, queue_limit=2)
    for request in requests[:2]:
        engine.submit(request)
    with pytest.raises(UserError, match=r"2 requests wait, queue_limit=2; step\(\) the engine before submitting more"):
        engine.submit(requests[2])
    engine.step()
    engine.submit(requests[2])
    assert engine.load == 3
    assert sorted(run_to_end(engine)) == [1, 2, 3]

    def watched() -> Iterator[Request]:
        for request in requests:
            assert engine.load <= 1 + 2
            yield request

    for completion, expected in zip(engine.generate(watched()), make_engine(policy).generate(requests), strict=True):
        assert_same(completion, expected, exactly=False)


@pytest.fixture
def broken_token(make_policy: Callable[..., Policy]) -> tuple[Policy, Policy, int]:
    """A policy, the same with NaN in the embedding of a token, and that token, which neither ever draws."""
    sound = make_policy(double=False).double()
    token = 21
    sound.model.lm_head.bias = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    with torch.no_grad():
        sound.model.lm_head.bias[token] = -1e6
    broken = copy.deepcopy(sound)
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[token] = torch.nan
    return sound, broken, token


def without(token: int, requests: list[Request]) -> list[Request]:
    return [replace(r, prompt_ids=tuple(5 if t == token else t for t in r.prompt_ids)) for r in requests]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_request_that_breaks_is_handed_back_and_the_others_go_on(
    broken_token: tuple[Policy, Policy, int], cache: str
) -> None:
    sound, broken, token = broken_token
    others = without(token, make_requests(6))
    # the longest prompt of all: what it leaves behind must not be seen by whoever has its slot after it
    requests = [Request(prompt_ids=(token,) * WIDTH, seed=1, group=99, threshold=0.0), *others]
    keys = {"block_length": 8, "cache": cache, "drift_every": 0}
    engine = make_engine(copy.deepcopy(sound), slots=3, **keys)
    engine.version = 12
    for request in requests:
        engine.submit(request)
    finished = dict(engine.step())
    engine.adopt(to_flat(broken), 12)
    ended = dict(engine.step())
    assert ended.pop(1) == Failure("logits or threshold are not finite: request 1, version 12, step 2")
    assert engine.latent(1) is None
    finished.update(ended)
    finished.update(run_to_end(engine))
    assert sorted(finished) == list(range(2, 8))
    if cache == "none":  # with a cache, adoption refreshes rows, which changes what they sample
        expected = make_engine(copy.deepcopy(sound), slots=1, **keys)
        expected.version = 12
        for handle, request in enumerate(others, start=2):
            assert_same(finished[handle], expected.generate([request])[0], exactly=False)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_generate_names_the_first_that_broke_and_the_engine_goes_on(
    broken_token: tuple[Policy, Policy, int], cache: str
) -> None:
    _, broken, token = broken_token
    keys = {"block_length": 8, "cache": cache, "drift_every": 0}
    bad = [Request(prompt_ids=(token,) * WIDTH, seed=seed, group=seed) for seed in (1, 2)]
    good = without(token, [*make_requests(6), Request(prompt_ids=(6,) * (WIDTH - 1), seed=3, group=3)])
    expected = make_engine(broken, slots=1, **keys).generate(good)
    engine = make_engine(broken, slots=2, **keys)
    words = "2 of 8 requests failed; the first: logits or threshold are not finite: request 3, version 0, step 1"
    with pytest.raises(RunError, match=words):
        engine.generate([*good[:2], *bad, *good[2:6]])
    assert engine.idle
    for completion, other in zip(engine.generate(good), expected, strict=True):
        assert_same(completion, other, exactly=False)


# -- properties of every step ------------------------------------------------------------------------------------------


@st.composite
def workloads(draw: st.DrawFn) -> tuple[dict[str, object], list[Request]]:
    """Settings of an engine, and requests in groups of several sizes."""
    rule = draw(st.sampled_from(list(PARAMETERS)))
    parameters = {
        "entropy_bound": st.one_of(st.sampled_from([0.0, "mean", "sample", "initial"]), st.floats(0, 30)),
        "sampled_entropy_bound": st.one_of(st.sampled_from([0.0, "mean", "sample", "initial"]), st.floats(0, 30)),
        "confidence": st.floats(0, 1.1),
        "top_k": st.integers(1, 20).map(float),
    }[rule]
    block = draw(st.sampled_from([1, 2, 4, 8, 16]))
    requests = []
    for group in range(draw(st.integers(1, 3))):
        prompt = tuple(draw(st.lists(st.integers(4, 21), min_size=1, max_size=WIDTH)))
        length = draw(st.one_of(st.none(), st.integers(1, LENGTH // block).map(lambda blocks: blocks * block)))
        for _ in range(draw(st.integers(1, 4))):
            requests.append(
                Request(
                    prompt_ids=prompt,
                    group=group,
                    completion_tokens=length,
                    seed=draw(st.integers(0, 2**62)),
                    threshold=draw(parameters),
                    temperature=draw(st.one_of(st.just(0.0), st.floats(0.05, 5))),
                )
            )
    cache = draw(st.sampled_from(["none", "prefix", "dual"]))
    return {"rule": rule, "block_length": block, "slots": draw(st.integers(1, 5)), "cache": cache}, requests


@settings(max_examples=30)
@given(workload=workloads())
def test_every_step_reveals_in_every_row_and_nothing_is_taken_back(
    policy: Policy, workload: tuple[dict[str, object], list[Request]]
) -> None:
    keys, requests = workload
    engine = make_engine(policy, drift_every=2, **keys)
    handles = {engine.submit(request): request for request in requests}
    mask_id = policy.vocabulary.mask_id
    latents: dict[int, np.ndarray] = {}
    finished: dict[int, Completion] = {}
    for _ in range(sum(request.completion_tokens or LENGTH for request in requests)):  # as many steps are enough
        finished.update(engine.step())
        for handle, request in handles.items():
            length = request.completion_tokens or LENGTH
            before = latents.get(handle, np.full(length, mask_id))
            now = finished[handle].completion_ids if handle in finished else engine.latent(handle)
            if now is None or len(before) == 0:
                continue
            now, revealed = now[:length], before != mask_id
            assert (now[revealed] == before[revealed]).all()
            assert (now != mask_id).sum() > revealed.sum()
            latents[handle] = np.empty(0) if handle in finished else now
    assert engine.idle
    assert sorted(finished) == sorted(handles)
    for handle, request in handles.items():
        assert_sound(finished[handle], policy)
        assert len(finished[handle].completion_ids) == (request.completion_tokens or LENGTH)


@settings(max_examples=20)
@given(workload=workloads())
def test_the_entropy_bound_takes_the_longest_admissible_prefix(
    policy: Policy, workload: tuple[dict[str, object], list[Request]]
) -> None:
    """Checked from the completion alone: in every step the lowest entropies, and the next one would not have fitted."""
    keys, requests = workload
    block = keys["block_length"]
    requests = [replace(r, threshold=r.threshold if "entropy_bound" in keys["rule"] else 2.0) for r in requests]
    completions = make_engine(policy, **(keys | {"rule": "entropy_bound", "cache": "none"})).generate(requests)
    for completion in completions[:3]:
        prompt, mask_id = completion.prompt_ids.tolist(), policy.vocabulary.mask_id
        for step in range(1, completion.nfe + 1):
            latent = np.where(completion.reveal_step < step, completion.completion_ids, mask_id)
            logits = forward(policy, [*prompt, *latent.tolist()])[len(prompt) :].tolist()
            start = latent.tolist().index(mask_id) // block * block
            masked = [at for at in range(start, start + block) if latent[at] == mask_id]
            entropies = {at: entropy_of(softmax(logits[at], mask_id, 1.0)) for at in masked}
            chosen = np.flatnonzero(completion.reveal_step == step).tolist()
            left = [at for at in masked if at not in chosen]
            assert set(chosen) <= set(masked)
            np.testing.assert_allclose(completion.entropy[chosen], [entropies[at] for at in chosen], rtol=2e-7)
            values = sorted(entropies[at] for at in chosen)
            assert sum(values[:-1]) <= completion.gamma + 1e-9
            if left:
                following = min(entropies[at] for at in left)
                assert following >= values[-1] - 1e-9
                assert sum(values) > completion.gamma - 1e-9


def test_a_request_that_is_refused_midway_leaves_the_engine_idle(policy: Policy) -> None:
    engine = make_engine(policy, queue_limit=2)
    good = make_requests(6)
    with pytest.raises(UserError, match="temperature=-1"):
        engine.generate([*good, replace(good[0], temperature=-1.0)])
    assert engine.idle
    for one, other in zip(engine.generate(good), make_engine(policy).generate(good), strict=True):
        assert_same(one, other, exactly=False)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_forward_that_does_not_fit_the_memory_drops_its_requests(
    make_policy: Callable[..., Policy], cache: str
) -> None:
    policy = make_policy()
    engine = make_engine(policy, slots=2, cache=cache, block_length=4)
    for request in one_group(5):
        engine.submit(request)
    engine.step()
    block = policy.model.model.layers[0].mlp
    hook = block.register_forward_pre_hook(lambda *_: torch.empty(1 << 58))
    with pytest.raises(RunError, match=r"a step of 2 rows does not fit the memory; lower rollout.slots"):
        engine.step()
    hook.remove()
    assert engine.idle
    requests = one_group(5)
    fresh = make_engine(policy, slots=2, cache=cache, block_length=4)
    for one, other in zip(engine.generate(requests), fresh.generate(requests), strict=True):
        assert_same(one, other, exactly=False)
