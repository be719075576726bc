"""Memory plan: what it says of a small model is what a step keeps; its arithmetic follows modes and ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config_file import load_config
from common.errors import UserError
from common.policy_loading import open_policy
from common.tasks import build_task
from learner.benchmarks.learner import generate, groups_to_fill, peak_bytes, without_diagnostics
from learner.cli import app
from learner.learner import Learner
from learner.memory_plan import (
    ADAM,
    FULL,
    learner_gpus,
    learner_memory,
    measure,
    node_memory,
    rollout_gpus,
    rollout_memory,
    settings_of,
)

CONFIG = Path(__file__).parents[1] / "deploy/configs/sudoku.yaml"
SMALL = ["learner.micro_batch_tokens=2048", "learner.groups_per_step=8", "learner.autocast=false"]
TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def test_the_estimated_activations_are_what_a_step_keeps() -> None:
    config = load_config(CONFIG, SMALL)
    _, estimate = measure(config)
    policy = open_policy(config, build_task(config.task))
    batch = generate(policy, config, groups_to_fill(2048, generate(policy, config, 2)) + 2)
    learner = Learner(policy, without_diagnostics(config.learner))
    peak = peak_bytes(learner, batch)
    assert peak == pytest.approx(estimate.kept, rel=0.25)
    again = config.learner.model_copy(update={"activation_checkpointing": True, "diagnostics_every": 0})
    held = peak_bytes(Learner(policy, again), batch)
    assert held < 0.4 * peak
    assert held + peak / 4 == pytest.approx(estimate.recomputed, rel=0.25)  # four layers, one computed again


def test_a_folder_with_config_json_alone_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    model, activations = measure(load_config(CONFIG, [*SMALL, f"model.path={tmp_path}"]))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert model.parameters == 2 * 1000 * 64 + 3 * layer + 64
    assert model.embeddings == 2 * model.head == 2 * 1000 * 64
    assert model.cache_per_token == 2 * 3 * 2 * 16
    assert model.adapters == 16 * 3 * (2 * 128 + 2 * (64 + 32) + 3 * (64 + 128))
    assert 0 < activations.recomputed < activations.kept


@pytest.mark.parametrize("text", [None, "{}", "[", '{"model_type": "nonesuch"}'])
def test_a_folder_that_cannot_be_planned_is_refused_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        measure(load_config(CONFIG, [f"model.path={tmp_path}"]))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_share_weights_and_not_activations() -> None:
    config = load_config(CONFIG, SMALL)
    model, activations = measure(config)
    settings = settings_of(config, model)

    def rank(**how: Any) -> dict[str, float]:
        return learner_memory(model, activations, settings, **{"lora": False, "checkpointing": False, "ranks": 1} | how)

    one, four, lora = rank(), rank(ranks=4), rank(lora=True)
    assert one["weights"] == FULL * model.parameters
    assert one["optimizer"] == ADAM * model.parameters
    whole = model.head / model.parameters  # the share of every rank that ranks do not share
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == pytest.approx(one[name] * (whole + (1 - whole) / 4))
    assert all(four[name] == one[name] for name in ("activations", "logits", "head's gradient"))
    layer = (model.parameters - model.embeddings) / model.layers
    assert four["whole layers"] == FULL * (2 * layer + model.head)  # an embedding of the head's size beside them
    assert four["their gradients"] == FULL * (2 * layer + 2 * model.head)
    assert rank(ranks=4, lora=True)["whole layers"] == four["whole layers"]
    assert "their gradients" not in rank(ranks=4, lora=True)
    assert four["drift gauge (rank 0)"] == FULL * model.parameters
    assert "drift gauge (rank 0)" not in one
    assert lora["gradients"] == FULL * model.adapters < one["gradients"]
    assert lora["weights"] == FULL * (model.parameters + model.adapters)
    assert rank(checkpointing=True)["activations"] == activations.recomputed < one["activations"]
    assert node_memory(model, settings, lora=False)["broadcasts"] == 3 * FULL * model.parameters
    assert sum(node_memory(model, settings, lora=True).values()) < sum(
        node_memory(model, settings, lora=False).values()
    )


def test_a_base_and_the_drift_gauge_take_memory_of_the_host() -> None:
    config = load_config(CONFIG, [*SMALL, "rollout.precision=bfloat16", "learner.ranks=2"])
    model, _ = measure(config)

    def host(*changes: str) -> tuple[dict[str, float], dict[str, float]]:
        changed = settings_of(load_config(CONFIG, [*SMALL, "rollout.precision=bfloat16", *changes]), model)
        return node_memory(model, changed, lora=True), node_memory(model, changed, lora=False)

    lora, full = host("learner.ranks=2")
    assert lora["base"] == 2 * model.parameters
    assert "base" not in full
    assert lora["drift gauge"] == 2 * (model.parameters + model.adapters)
    assert full["drift gauge"] == 2 * model.parameters
    for other in (host(), host("learner.ranks=2", "evaluation.drift_every=0")):
        assert not any("drift gauge" in parts for parts in other)
        assert other[0]["base"] == lora["base"]


def test_gpus_are_the_fewest_that_fit() -> None:
    config = load_config(CONFIG, [*SMALL, "model.hidden_size=256", "model.intermediate_size=1024", "rollout.actors=5"])
    model, activations = measure(config)
    settings = settings_of(config, model)
    how: dict[str, Any] = {"lora": False, "checkpointing": True}

    def needed(ranks: int) -> float:
        return sum(learner_memory(model, activations, settings, **how, ranks=ranks).values()) / 0.9

    gpu = needed(3) + 1
    assert needed(2) > gpu
    assert learner_gpus(model, activations, settings, **how, gpu=gpu) == 3
    assert learner_gpus(model, activations, settings, **how, gpu=1e12) == 1
    assert learner_gpus(model, activations, settings, **how, gpu=activations.recomputed) is None
    actor = sum(rollout_memory(model, activations, settings, lora=False).values()) / 0.9
    assert rollout_gpus(model, activations, settings, lora=False, gpu=actor * 2.5) == 3
    assert rollout_gpus(model, activations, settings, lora=False, gpu=actor / 2) is None


def test_the_command_prints_every_role() -> None:
    done = CliRunner().invoke(app, ["plan", str(CONFIG), *SMALL, "--gpu-memory", "24"])
    assert done.exit_code == 0, done.output
    for word in ("learner rank", "rollout actor", "broadcasts", "replay", "optimizer", "LoRA", "GPUs of 24 GB"):
        assert word in done.output


def test_pieces_of_logits_are_counted() -> None:
    config = load_config(CONFIG, SMALL)
    model, _ = measure(config)
    assert settings_of(config, model).logits == 2048 * 4 * model.vocabulary


LLADA_8B = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "weight_tying": False,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
"""As LLaDA-8B-Instruct has them."""


@pytest.mark.parametrize(("name", "gpus"), [("llada_8b", 8), ("llada_8b_two_nodes", 16)])
def test_the_configurations_for_llada_fit_their_gpus(name: str, gpus: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    config = load_config(CONFIG.with_name(f"{name}.yaml"), [f"model.path={tmp_path}"])
    assert config.learner.ranks * config.learner.gpus + config.rollout.actors * config.rollout.gpus == gpus
    model, activations = measure(config)
    settings = settings_of(config, model)
    assert model.parameters == 8_015_581_184
    least = learner_gpus(model, activations, settings, lora=False, checkpointing=True, gpu=80e9)
    assert least is not None
    assert least <= config.learner.ranks
    assert rollout_gpus(model, activations, settings, lora=False, gpu=80e9) == config.rollout.actors
