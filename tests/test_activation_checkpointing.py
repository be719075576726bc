"""Activation checkpointing: the same gradients from less kept, in training's forward passes alone."""

import copy
from typing import Any

import pytest
import torch
from learner_fixtures import generate_batch, learner_config, tiny_policy
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.autocast import autocast
from common.errors import UserError
from learner.activation_checkpointing import activation_checkpointing, checkpointing_layers
from learner.benchmarks.learner import SavedTensors
from learner.learner import Learner
from learner.surrogate import Scores, surrogate_log_probs

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    return [
        LlamaForCausalLM(LlamaConfig(**SIZES, is_causal=False)),
        Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, is_causal=False)),
        ModernBertForMaskedLM(
            ModernBertConfig(**SIZES, **SPECIAL, cls_token_id=1, sep_token_id=1, global_attn_every_n_layers=2)
        ),
    ]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_gradients_are_equal_in_every_family(number: int, bfloat16: bool) -> None:
    model = models()[number].eval()
    model = model if bfloat16 else model.double()
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with autocast(torch.device("cpu"), enabled=bfloat16), activation_checkpointing(model, enabled=enabled):
            states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = model.get_output_embeddings()(states)  # the hidden states are used by themselves too
        (logits.float().square().sum() + states.float().sin().sum()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert not any(module.training for module in model.modules())
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)
    assert len(found[0]) > 10


@pytest.mark.parametrize("inner_updates", [1, 2])
def test_a_step_has_the_same_gradient_and_keeps_less(inner_updates: int) -> None:
    policy = tiny_policy()
    batch = generate_batch(policy)
    found, peaks = [], []
    for enabled in (False, True):
        config = learner_config(
            train="joint", activation_checkpointing=enabled, inner_updates=inner_updates, diagnostics_every=1
        )
        learner = Learner(copy.deepcopy(policy), config)
        saved = SavedTensors(learner.policy)
        with saved:
            learner.step(batch, version=0)
        found.append([p.detach() for p in learner.policy.parameters()])
        peaks.append(saved.peak)
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)
    assert peaks[1] < 0.6 * peaks[0]


class WeightCopies(TorchDispatchMode):
    """Bytes of the copies of weights in another type that are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {weight.data_ptr() for weight in model.parameters()}
        self._copies: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._weights:
            storage = found.untyped_storage()
            self._copies.append((StorageWeakRef(storage), storage.nbytes()))
        return found

    def alive(self) -> int:
        return sum(size for copy, size in self._copies if not copy.expired())


@pytest.mark.parametrize("enabled", [False, True])
def test_no_bfloat16_model_stands_beside_the_weights(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.autocast.has_bfloat16", lambda kind: True)
    policy = tiny_policy(double=False)
    config = learner_config(train="model", activation_checkpointing=enabled, inner_updates=2, autocast=True)
    learner, batch = Learner(policy, config), generate_batch(policy)
    alive: list[int] = []

    def scored(*arguments: Any, **named: Any) -> Scores:
        with WeightCopies(policy.model) as copies:
            found = surrogate_log_probs(*arguments, **named)
            alive.append(copies.alive())
        return found

    monkeypatch.setattr("learner.learner.surrogate_log_probs", scored)
    learner.step(batch, version=0)
    layers = sum(weight.numel() for weight in policy.model.model.layers.parameters() if weight.dim() == 2)
    head = policy.model.get_output_embeddings().weight.numel()
    assert len(alive) == 3  # the second update's proximal pass too
    assert max(alive) == 2 * (head + (0 if enabled else layers))


def test_only_forward_passes_inside_are_checkpointed() -> None:
    model = models()[0].eval()
    layers = checkpointing_layers(model)
    assert len(layers) == 4
    with activation_checkpointing(model, enabled=True):
        assert all(layer.gradient_checkpointing and layer.training for layer in layers)
        assert not layers[0].mlp.training  # dropout stays off
    assert not any(layer.gradient_checkpointing or layer.training for layer in layers)
    output = model(input_ids=torch.arange(4)[None], use_cache=True)  # rollout's caches still work
    assert output.past_key_values.get_seq_length() == 4


def test_a_model_without_such_layers_is_refused() -> None:
    policy = tiny_policy()
    policy.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="activation_checkpointing"):
        Learner(policy, learner_config(activation_checkpointing=True))
