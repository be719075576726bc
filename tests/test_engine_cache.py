"""The engine with keys and values kept within a block: equal to the cached textbook sampler, and says how far off."""

import copy
from collections.abc import Callable
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
from torch import Tensor

from actors.engine import DenoisingEngine
from actors.reference_sampler import forward, kept_columns, reference_sample
from actors.request import Request
from common.policy import Policy
from common.trajectory import Completion
from common.weights import to_flat

CACHES = ("prefix", "dual")


def cached_engine(policy: Policy, cache: str, **keys: object) -> DenoisingEngine:
    return make_engine(policy, **({"cache": cache, "block_length": 8, "drift_every": 0} | keys))


def assert_textbook(completion: Completion, policy: Policy, request: Request, **keys: object) -> None:
    expected = reference_sample(
        policy,
        request.prompt_ids,
        parameter=request.threshold,
        temperature=request.temperature,
        seed=request.seed,
        length=request.completion_tokens or LENGTH,
        **keys,
    )
    assert completion.completion_ids.tolist() == expected.tokens
    assert completion.reveal_step.tolist() == expected.reveal_step
    assert (completion.nfe, completion.finish_reason) == (expected.nfe, expected.finish_reason)
    np.testing.assert_allclose(completion.behaviour_logprob, expected.logprob, rtol=2e-7, atol=1e-9)
    np.testing.assert_allclose(completion.entropy, expected.entropy, rtol=2e-7, atol=1e-9)


# -- the textbook ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block", [16, 8, 4])
@pytest.mark.parametrize("rule", PARAMETERS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cached_engine_is_the_textbook_sampler(
    policy: Policy, cache: str, rule: str, block: int, temperature: float
) -> None:
    """Six rows in three slots: prompts of unlike lengths, some shorter completions, rows in different blocks."""
    requests = [
        replace(request, completion_tokens=block if index in (1, 4) else None)
        for index, request in enumerate(make_requests(6, rule, temperature))
    ]
    completions = cached_engine(policy, cache, rule=rule, block_length=block).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_textbook(completion, policy, request, rule=rule, block=block, cache=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_both_attentions_take_the_kept_keys(make_policy: Callable[..., Policy], cache: str, attention: str) -> None:
    policy = make_policy(seed=3)
    policy.model.set_attn_implementation(attention)
    requests = make_requests(8)
    completions = cached_engine(policy, cache).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_textbook(completion, policy, request, rule="entropy_bound", block=8, cache=cache)


def test_the_comparison_tells_the_caches_apart(policy: Policy) -> None:
    """With blocks of 8 the three differ, so that none can pass for another; with blocks of 1 nothing kept is used."""
    requests = make_requests(8)
    for block, differ in ((8, True), (1, False)):
        ids = [
            [c.completion_ids.tolist() for c in cached_engine(policy, cache, block_length=block).generate(requests)]
            for cache in ("none", *CACHES)
        ]
        assert (ids[0] != ids[1]) == (ids[0] != ids[2]) == (ids[1] != ids[2]) == differ


def test_a_single_block_keeps_the_prompt_or_with_dual_does_too(policy: Policy) -> None:
    """One block of all L positions: what lies outside it and what lies before it is the prompt, in both."""
    requests = make_requests(6)
    prefix, dual = (cached_engine(policy, cache, block_length=LENGTH).generate(requests) for cache in CACHES)
    for one, other in zip(prefix, dual, strict=True):
        assert_same(one, other, exactly=False)


# -- batches and groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_padding", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_a_completion_does_not_depend_on_its_company(policy: Policy, cache: str, fixed_padding: bool) -> None:
    requests = make_requests(15)
    large = cached_engine(policy, cache, slots=15, fixed_padding=fixed_padding).generate(requests)
    small = cached_engine(policy, cache, slots=3, fixed_padding=fixed_padding).generate(requests[::-1])
    for one, other in zip(large, small[::-1], strict=True):
        assert_same(one, other, exactly=False)
    for request, completion in zip(requests[::5], large[::5], strict=True):
        assert_same(completion, alone(policy, request, cache=cache, block_length=8), exactly=False)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("cache", CACHES)
def test_a_group_holds_one_page_until_its_rows_part(policy: Policy, cache: str, slots: int) -> None:
    """A page for each group with rows (or a kept pass) in the first block, and one for each row beyond it."""
    first = one_group(7, threshold=1.0)
    second = [replace(request, group=1, prompt_ids=(6,) * 9) for request in first[:4]]
    requests = [*first, *second, replace(first[0], group=2, prompt_ids=(8,))]
    engine = cached_engine(policy, cache, slots=slots, block_length=4)
    mask_id, finished = policy.vocabulary.mask_id, {}
    handles = {engine.submit(request): request for request in requests}
    shared = 0
    while not engine.idle:
        block = {}  # of every row as this step finds it
        for handle in handles:
            latent = engine.latent(handle)
            block[handle] = 0 if latent is None else int((latent == mask_id).argmax()) // 4
        finished.update(engine.step())
        live = [handle for handle in handles if engine.latent(handle) is not None]
        waiting = [handle for handle in handles if handle not in finished and handle not in live]
        pages = {("row", handle) if block[handle] else ("group", handles[handle].group) for handle in live}
        begun = {handles[handle].group for handle in handles if handle in finished or handle in live}
        if waiting and handles[waiting[0]].group in begun:
            pages.add(("group", handles[waiting[0]].group))
        assert engine._forward._pages.held == len(pages)
        shared += len(pages) < len(live)
    assert shared or slots == 1
    assert engine._forward._pages.held == 0
    assert engine.cost.row_forwards == sum(c.nfe for c in finished.values()) - 6 - 3
    for handle, request in handles.items():
        assert_textbook(finished[handle], policy, request, rule="entropy_bound", block=4, cache=cache)


@pytest.mark.parametrize("cache", CACHES)
def test_fewer_columns_are_forwarded(policy: Policy, cache: str) -> None:
    """One token per step, fixed padding: a block's first step takes all columns, the other seven what is not kept."""
    engine = cached_engine(policy, cache, rule="top_k", fixed_padding=True)
    [request] = one_group(1, threshold=1.0)
    counted = [0]
    engine.submit(request)
    while not engine.idle:
        engine.step()
        counted.append(engine.cost.token_forwards)
    full, first, second = WIDTH + LENGTH, {"prefix": 16, "dual": 8}[cache], 8
    expected = [full, *[first] * 7, full, *[second] * 7]
    assert np.diff(counted).tolist() == expected[: len(counted) - 1]
    assert len(counted) > 10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_what_a_broken_row_left_in_a_page_reaches_nobody(
    make_policy: Callable[..., Policy], cache: str, attention: str
) -> None:
    """Its page goes to a row with a short prompt, which a long prompt then makes look at the columns left of its own.

    These are not attended to, but a weight of 0 does not make a NaN go away.
    """
    policy = make_policy()
    policy.model.set_attn_implementation(attention)
    policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    with torch.no_grad():
        policy.model.lm_head.bias[21] = -1e6  # nobody draws it
        policy.model.model.embed_tokens.weight[21] = torch.nan
    [broken] = one_group(1, threshold=1.0)
    short = replace(broken, prompt_ids=(5, 6), group=1, threshold=0.0)
    long = replace(short, prompt_ids=(7,) * WIDTH, group=2)
    engine = cached_engine(policy, cache, slots=2)
    engine.submit(replace(broken, prompt_ids=(21,) * WIDTH))
    engine.step()
    assert engine.idle
    handles = {engine.submit(short): short}
    engine.step()
    handles[engine.submit(long)] = long
    finished = run_to_end(engine)
    for handle, request in handles.items():
        assert_same(finished[handle], alone(policy, request, cache=cache, block_length=8), exactly=False)


# -- weights arriving within a block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1], ids=["the same weights", "other weights"])
@pytest.mark.parametrize("cache", CACHES)
def test_new_weights_make_the_next_step_exact(make_policy: Callable[..., Policy], cache: str, other: int) -> None:
    # through float32, as published, so that the reference has the very same numbers
    old, new = (make_policy(seed=seed, double=False).double() for seed in (0, other))
    # a group, which parts where the weights arrive, and rows of their own; all are still within their first block
    requests = [replace(r, threshold=0.3) for r in (*one_group(3), *make_requests(4))]
    engine = cached_engine(copy.deepcopy(old), cache, slots=7, fixed_padding=True)
    handles = {engine.submit(request): request for request in requests}
    finished = dict(engine.step() + engine.step())
    assert not finished
    engine.adopt(to_flat(new), 1)
    before = engine.cost.token_forwards
    finished.update(engine.step())
    assert engine.cost.token_forwards - before == 7 * (WIDTH + LENGTH)
    finished.update(run_to_end(engine))
    keys = {"rule": "entropy_bound", "block": 8, "cache": cache}
    for handle, request in handles.items():
        assert_textbook(finished[handle], old, request, adopted={3: new}, **keys)
    assert any((finished[handle].token_version == 1).sum() > 8 for handle in handles)


@pytest.mark.parametrize("cache", CACHES)
def test_the_step_after_adoption_scores_by_the_new_weights_alone(
    make_policy: Callable[..., Policy], cache: str
) -> None:
    """Weights before every step: no cached pass is left, so each log-probability is the exact one of its version."""
    policies = {n: make_policy(seed=n, double=False).double() for n in range(3)}
    engine = cached_engine(copy.deepcopy(policies[0]), cache, slots=3)
    requests = [*one_group(4, threshold=1.0), *make_requests(3)]
    handles = [engine.submit(request) for request in requests]
    finished, steps = dict(engine.step()), 1
    while not engine.idle:
        engine.adopt(to_flat(policies[steps % 3]), steps % 3)
        finished.update(engine.step())
        steps += 1
    for handle in handles:
        assert_recomputable(finished[handle], policies)
    assert engine._forward._pages.held == 0


@pytest.mark.parametrize("cache", CACHES)
def test_a_kept_first_pass_and_its_page_go_with_the_old_weights(make_policy: Callable[..., Policy], cache: str) -> None:
    old, new = (make_policy(seed=seed, double=False).double() for seed in (0, 1))
    engine = cached_engine(copy.deepcopy(old), cache, slots=2)
    handles = {engine.submit(request): request for request in one_group(5, threshold=1.0)}
    engine.step()
    engine.adopt(to_flat(new), 1)
    finished = run_to_end(engine)
    for handle, request in handles.items():
        weights = {"policy": old, "adopted": {2: new}} if handle <= 2 else {"policy": new}
        assert_textbook(finished[handle], request=request, rule="entropy_bound", block=8, cache=cache, **weights)
    assert engine._forward._pages.held == 0


# -- how far from exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_drift_is_the_divergence_of_the_cached_pass_from_the_exact(policy: Policy, cache: str) -> None:
    """Second step of one row, the first token of a block of 8 revealed: both forwards by hand."""
    [request] = one_group(1, threshold=1.0)
    engine = cached_engine(policy, cache, rule="top_k", drift_every=2)
    handle = engine.submit(request)
    engine.step()
    latent = engine.latent(handle)
    assert latent is not None
    assert (engine.cost.probed_positions, engine.cost.probed_kl, engine.cost.row_forwards) == (0, 0.0, 1)
    engine.step()
    assert engine.cost.row_forwards == 3  # the exact pass beside the cached one is paid for

    mask_id, prompt, memory = policy.vocabulary.mask_id, list(request.prompt_ids), {}
    forward(policy, prompt + [mask_id] * LENGTH, memory)
    now = prompt + latent.tolist()
    cached = forward(policy, now, memory, kept_columns(cache, len(prompt), LENGTH, 0, 8))
    masked = [len(prompt) + at for at in range(8) if latent[at] == mask_id]
    assert len(masked) == 7

    def allowed(logits: Tensor) -> Tensor:
        return logits[masked][:, [token for token in range(32) if token != mask_id]].softmax(-1)

    p, q = allowed(forward(policy, now)), allowed(cached)
    assert engine.cost.probed_positions == 7
    assert engine.cost.probed_kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-9)
    assert engine.cost.probed_kl > 0
    assert engine.cost.probed_flips == int((p.argmax(-1) != q.argmax(-1)).sum())


@pytest.mark.parametrize("cache", CACHES)
def test_drift_is_looked_for_as_often_as_asked_and_where_something_is_kept(policy: Policy, cache: str) -> None:
    requests = make_requests(8)
    costs = {}
    for block, every in ((8, 1), (8, 3), (8, 0), (1, 1)):
        engine = cached_engine(policy, cache, block_length=block, drift_every=every)
        costs[block, every] = (engine.generate(requests), engine.cost)
    for completions, cost in costs.values():
        assert (cost.probed_positions > 0) == (cost.probed_kl > 0)
        assert cost.probed_flips <= cost.probed_positions
        if not cost.probed_positions:
            assert cost.row_forwards == sum(c.nfe for c in completions)
    assert costs[8, 1][1].probed_positions > costs[8, 3][1].probed_positions > 0
    assert costs[8, 0][1].probed_positions == costs[1, 1][1].probed_positions == 0
    for one, other in zip(costs[8, 1][0], costs[8, 0][0], strict=True):  # looking changes nothing
        assert_same(one, other, exactly=False)


def test_nothing_is_counted_as_drift_without_one(make_policy: Callable[..., Policy]) -> None:
    """A model whose attention adds nothing has the same logits whatever is kept."""
    policy = make_policy()
    with torch.no_grad():
        for layer in policy.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    engine = cached_engine(policy, "dual", drift_every=1)
    engine.generate(make_requests(4))
    assert engine.cost.probed_positions > 0
    assert engine.cost.probed_kl == pytest.approx(0.0, abs=1e-12)
    assert engine.cost.probed_flips == 0
