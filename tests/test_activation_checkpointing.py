"""Activation checkpointing: the same gradients from less kept, in training's forward passes alone."""

import copy

import pytest
import torch
from learner_fixtures import generate_batch, learner_config, tiny_policy
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
