"""Fixtures that several test files share."""

import asyncio
import inspect
from collections.abc import Callable

import hypothesis
import pytest
import torch

from common.config import ModelConfig, ThresholdConfig
from common.policy import Policy
from common.policy_loading import build_policy

torch.set_num_threads(1)
hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("busy")

ALPHABET = "0123456789+-*/=() "


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine, on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(
        pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters})
    )
    return True


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Policy]:
    """Builds a tiny policy whose distributions are neither flat nor peaked and whose threshold depends on the prompt.

    Random initialisation is nearly flat, so rules and temperatures would hardly matter; hence larger weights.
    """

    def make(*, seed: int = 0, head: str = "categorical", double: bool = True) -> Policy:
        model = ModelConfig(hidden_size=16, layers=2, heads=2, intermediate_size=32, max_positions=64)
        policy = build_policy(model, ThresholdConfig(head=head), alphabet=ALPHABET, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_((1.0 if "embed" in name else 0.5) * noise)
            weight = policy.head.linear.weight
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        return policy.double() if double else policy

    return make


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """The tiny policy in float64; shared, so never write to it."""
    return make_policy()
