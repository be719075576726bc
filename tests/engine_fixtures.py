"""Engines, requests and comparisons that the tests of the engine share."""

import random

import numpy as np
import pytest
import torch

from actors.engine import DenoisingEngine
from actors.request import Request
from common.behaviour import behaviour_log_probs
from common.keyed_random import derive
from common.policy import Policy
from common.trajectory import Completion

LENGTH, WIDTH = 16, 12
ARRAYS = ("prompt_ids", "completion_ids", "reveal_step", "behaviour_logprob", "reveal_logprob", "entropy")
ARRAYS += ("token_version",)
SCALARS = ("first_entropy", "gamma", "gamma_logprob", "nfe", "seed", "temperature")
PARAMETERS = {
    "entropy_bound": (0.0, 1.5, 4.0, 9.0),
    "sampled_entropy_bound": (0.0, 1.5, 4.0, 9.0),
    "confidence": (0.2, 0.35, 0.6, 1.0),
    "top_k": (1.0, 2.0, 3.0, 7.0),
}


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


def run_to_end(engine: DenoisingEngine) -> dict[int, Completion]:
    """Steps the engine until it is idle; completions by handle."""
    finished: dict[int, Completion] = {}
    while not engine.idle:
        for handle, outcome in engine.step():
            assert isinstance(outcome, Completion), outcome
            assert handle not in finished
            finished[handle] = outcome
    return finished


def alone(policy: Policy, request: Request, **keys: object) -> Completion:
    """The completion of one request in an engine of its own."""
    [completion] = make_engine(policy, slots=1, **keys).generate([request])
    return completion


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
