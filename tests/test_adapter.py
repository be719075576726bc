"""Adapters: they begin as nothing, are all that learns and travels, and add up to a plain model."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from family_fixtures import all_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixtures import ALPHABET, MODEL, generate_batch, learner_config, parameters, tiny_policy
from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from actors.evaluation import Point, Setting
from common.adapter import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    Base,
    adapt,
    adapted,
    frozen_parameters,
    learned_parameters,
    read_base,
)
from common.config import LoraConfig, ModelConfig, RolloutConfig, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError, UserError
from common.policy import Policy
from common.policy_loading import build_policy, load_policy, open_rollout_policy
from common.tasks import build_task
from common.trajectory import decode_group
from common.weight_store import digest
from common.weights import adopt_base, base_arrays, load_flat, not_finite, to_flat
from learner.cli import app
from learner.evaluation_fleet import Shard, measure_here
from learner.export import export
from learner.group_replay import replay_group
from learner.learner import Learner
from learner.policy_trainer import LEARNER_STATE, PolicyTrainer
from learner.preflight import preflight
from learner.ray_connection import LOCAL, connect
from learner.study.single_run import SingleRun
from learner.synchronous_rollout import SynchronousRollout
from learner.warm_start import supervised

LORA = LoraConfig(rank=2, alpha=4.0)
IDS = torch.tensor([[4, 5, 6, 7, 3, 3]])
NARROW = RolloutConfig(precision="bfloat16")


def logits(policy: Policy) -> Tensor:
    return all_logits(policy, IDS)


def disturb(policy: Policy, seed: int = 3) -> Policy:
    """As if it had learned: nothing that is published is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in learned_parameters(policy):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def with_adapter(policy: Policy, **changes: object) -> Policy:
    adapt(policy.model, LORA.model_copy(update=changes), None, seed=1)
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model."""
    found = tmp_path_factory.mktemp("models") / "base"
    build_policy(MODEL, ThresholdConfig(), alphabet=ALPHABET, seed=0).save(found)
    return found


def opened(folder: Path, **changes: object) -> Policy:
    lora = LORA.model_copy(update=changes)
    return load_policy(folder, MODEL.model_copy(update={"lora": lora}), ThresholdConfig())


def test_it_begins_as_its_base(folder: Path) -> None:
    plain = load_policy(folder, MODEL, ThresholdConfig())
    policy = opened(folder)
    assert (adapted(plain), adapted(policy)) == (False, True)
    assert torch.equal(logits(policy), logits(plain))
    assert not torch.equal(logits(disturb(policy)), logits(plain))


def test_without_an_adapter_everything_learns() -> None:
    policy = tiny_policy()
    assert [name for name, _ in learned_parameters(policy)] == [name for name, _ in policy.named_parameters()]
    assert frozen_parameters(policy) == []


def test_auto_is_every_linear_layer_but_the_output_head() -> None:
    policy = with_adapter(tiny_policy())
    names = [name for name, _ in learned_parameters(policy.model)]
    assert len(names) == 2 * 7 * 2  # layers, matrices, A and B
    assert not any("lm_head" in name or "embed" in name for name in names)
    few = with_adapter(tiny_policy(), targets=("q_proj", "layers.1.mlp.up_proj"))
    kept = {name.partition(".lora_")[0] for name, _ in learned_parameters(few.model)}
    q_proj = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert kept == q_proj | {"model.layers.1.mlp.up_proj"}


def test_its_dropout_is_silent_until_something_trains() -> None:
    policy = disturb(with_adapter(build_policy(MODEL, ThresholdConfig(), alphabet="01", seed=0), dropout=0.5))
    assert not any(module.training for module in policy.modules())
    assert torch.equal(logits(policy), logits(policy))
    policy.train()
    assert not torch.equal(logits(policy), logits(policy))


@pytest.mark.parametrize("train", ["model", "joint", "threshold"])
def test_training_moves_adapters_alone(train: str) -> None:
    policy = with_adapter(tiny_policy())
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    batch = generate_batch(policy)
    learner = Learner(policy, learner_config(train=train, learning_rate=0.01, drift_remedy="none"))
    for version in range(2):  # B is 0 at first, so A moves in the second
        learner.step(batch, version=version)
    moved = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    adapter = {name for name in before if ".lora_" in name}
    head = {name for name in before if name.startswith("head.")}
    assert moved == {"model": adapter, "joint": adapter | head, "threshold": head}[train]
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(moved)


def test_the_reference_is_the_base() -> None:
    """KL is 0 at the start; later it is that to a copy that was frozen then."""
    policy = with_adapter(tiny_policy())
    batch = generate_batch(policy)
    config = learner_config(train="model", learning_rate=0.01, kl_beta=0.1, drift_remedy="none")
    other = copy.deepcopy(policy)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    mine, theirs = Learner(policy, config), Learner(other, config)
    assert mine.reference is policy
    theirs.reference = frozen
    first, *later = [(mine.step(batch, version=n), theirs.step(batch, version=n)) for n in range(3)]
    assert first[0]["learner_kl"] == 0
    for one, two in [first, *later]:
        assert one == two
    assert later[-1][0]["learner_kl"] > 1e-6
    assert (parameters(policy) == parameters(other)).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 50), narrow=st.booleans())
def test_what_learned_travels(seed: int, narrow: bool) -> None:
    """An actor that has the base needs nothing else; in its own precision, half the bytes."""
    source = disturb(with_adapter(tiny_policy(double=False)), seed)
    target = with_adapter(tiny_policy(double=False))
    own = sum(parameter.numel() for _, parameter in learned_parameters(source.model))
    rest = sum(parameter.numel() for part in (source.head, source.calibration) for parameter in part.parameters())
    flat = to_flat(source, narrow=narrow)
    assert flat.nbytes == own * (2 if narrow else 4) + rest * 4
    flat.setflags(write=False)
    if narrow:
        source, target = source.for_rollout(NARROW), target.for_rollout(NARROW)
    load_flat(target, flat)
    assert (parameters(target) == parameters(source)).all()
    assert torch.equal(logits(target), logits(source))
    assert np.array_equal(to_flat(target, narrow=narrow), flat)


def test_a_whole_policy_travels_in_the_precision_of_rollout(folder: Path) -> None:
    """The head stays float32, and so do rotary frequencies, which are no weights."""
    source, target = (
        disturb(load_policy(folder, MODEL, ThresholdConfig())),
        load_policy(folder, MODEL, ThresholdConfig()),
    )
    flat = to_flat(source, narrow=True)
    load_flat(target.for_rollout(NARROW), flat)
    assert target.model.dtype == torch.bfloat16
    assert torch.equal(target.head.linear.weight, source.head.linear.weight)
    assert {buffer.dtype for buffer in target.model.buffers()} == {torch.float32}
    assert torch.equal(logits(target), logits(source.for_rollout(NARROW)))
    with pytest.raises(RunError, match="do not fit a policy"):
        load_flat(target, flat[:-4])


@pytest.mark.parametrize("narrow", [False, True])
def test_numbers_that_are_not_finite_are_counted(narrow: bool) -> None:
    policy = tiny_policy(double=False)
    assert not_finite(policy, narrow=narrow) == 0
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[0, :2] = torch.tensor([torch.nan, torch.inf])  # type: ignore
        policy.head.linear.bias[0] = -torch.inf
    assert not_finite(policy, narrow=narrow) == 3


@pytest.mark.parametrize("narrow", [False, True])
def test_actors_of_a_node_share_the_base(folder: Path, narrow: bool) -> None:
    """No copy is made of read-only arrays, as Ray hands them out."""
    source = disturb(opened(folder))
    arrays = base_arrays(source, narrow=narrow)
    for array in arrays:
        array.setflags(write=False)
    model = MODEL.model_copy(update={"path": str(folder), "lora": LORA})
    config = load_config(None, ["task.name=sudoku"])
    config = config.model_copy(update={"model": model, "rollout": NARROW if narrow else RolloutConfig()})
    actor = open_rollout_policy(config, build_task(config.task))
    adopt_base(actor, arrays)
    for array, (_, parameter) in zip(arrays, frozen_parameters(actor), strict=True):
        assert parameter.data_ptr() == array.ctypes.data
    load_flat(actor, to_flat(source, narrow=narrow))
    assert torch.equal(logits(actor), logits(source.for_rollout(config.rollout)))
    with pytest.raises(RunError, match=f"a base of {len(arrays) - 1} arrays does not fit a model of {len(arrays)}"):
        adopt_base(actor, arrays[1:])


@pytest.mark.parametrize("narrow", [False, True])
def test_a_rollout_actor_reads_no_weights(folder: Path, narrow: bool, tmp_path: Path) -> None:
    """All of them are published."""
    source = disturb(load_policy(folder, MODEL, ThresholdConfig()))
    source.save(tmp_path)
    for file in tmp_path.glob("model*.safetensors"):
        file.unlink()
    config = load_config(None, ["task.name=sudoku"])
    model = MODEL.model_copy(update={"path": str(tmp_path)})
    config = config.model_copy(update={"model": model, "rollout": NARROW if narrow else RolloutConfig()})
    actor = open_rollout_policy(config, build_task(config.task))
    load_flat(actor, to_flat(source, narrow=narrow))
    assert torch.equal(logits(actor), logits(source.for_rollout(config.rollout)))


def test_a_base_has_one_digest() -> None:
    arrays = [np.arange(3.0), np.arange(4.0)]
    assert digest(*arrays) == digest(np.concatenate(arrays))
    assert digest(*arrays) != digest(*arrays[::-1])


def test_a_checkpoint_is_the_adapter_alone_and_loads_bit_equal(folder: Path, tmp_path: Path) -> None:
    policy = disturb(opened(folder))
    policy.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*"))
    loaded = opened(tmp_path / "saved")
    assert (parameters(loaded) == parameters(policy)).all()
    assert torch.equal(logits(loaded), logits(policy))
    plain = load_policy(tmp_path / "saved", MODEL, ThresholdConfig())  # without model.lora: merged
    assert not adapted(plain)
    assert all(parameter.requires_grad for parameter in plain.model.parameters())
    torch.testing.assert_close(logits(plain), logits(policy), atol=1e-5, rtol=0)


def test_a_merged_export_is_a_plain_model(folder: Path, tmp_path: Path) -> None:
    policy = disturb(opened(folder))
    policy.save(tmp_path / "saved")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "saved"), str(tmp_path / "merged"), "--merge"])
    assert done.exit_code == 0, done.output
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert not (tmp_path / "merged" / ADAPTER_CONFIG).exists()
    ours = load_policy(tmp_path / "merged", MODEL, ThresholdConfig())
    torch.testing.assert_close(logits(ours), logits(policy), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS, use_cache=False).logits, logits(policy), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="exists, and an export overwrites nothing"):
        export(tmp_path / "saved", tmp_path / "merged", merge=True)
    export(folder, tmp_path / "half", merge=False, precision="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_exported_adapter_is_read_by_peft(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = disturb(opened(folder))
    policy.save(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "alone", merge=False)
    base = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "alone"))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS, use_cache=False).logits, logits(policy))
    assert torch.equal(
        logits(opened(tmp_path / "alone")), logits(policy)
    )  # and read back, its base named by peft's file


@pytest.mark.parametrize(
    ("target", "nearest"), [("q_porj", "q_proj"), ("lm_head", "v_proj"), ("mlp.up", "up_proj"), ("proj", "o_proj")]
)
def test_a_target_that_is_no_layer_names_the_nearest(folder: Path, target: str, nearest: str) -> None:
    config = load_config(None, ["task.name=sudoku", f"model.lora.targets=[{target}]", "sampler.max_prompt_tokens=16"])
    for model in (config.model, config.model.model_copy(update={"path": str(folder)})):
        with pytest.raises(
            UserError, match=rf"model.lora.targets: '{target}' is no linear layer .*nearest: .*{nearest}"
        ):
            open_rollout_policy(config.model_copy(update={"model": model}), build_task(config.task))
    with pytest.raises(UserError, match="nearest"):
        preflight(config)


def test_a_single_name_is_a_list_of_one_and_unknown_keys_name_the_nearest() -> None:
    assert load_config(None, ["task.name=sudoku", "model.lora.targets=q_proj"]).model.lora == LoraConfig(
        targets=("q_proj",)
    )
    with pytest.raises(UserError, match=r"unknown key model.lora.rnak; did you mean model.lora.rank"):
        load_config(None, ["task.name=sudoku", "model.lora.rnak=3"])


def lose(base: Path, saved: Path) -> None:
    (base / "config.json").unlink()


def train_on(base: Path, saved: Path) -> None:
    disturb(load_policy(base, MODEL, ThresholdConfig())).save(base)


def cut(base: Path, saved: Path) -> None:
    (saved / ADAPTER_BASE).write_text("{")


def take_anothers_weights(base: Path, saved: Path) -> None:
    other = opened(base, targets=("q_proj",))
    other.save(saved.parent / "other")
    (saved.parent / "other" / "adapter_model.safetensors").replace(saved / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose, "its base model .* is not there; put it back, or give a merged export"),
        (train_on, "its base model .* is another one than it was trained on"),
        (cut, "cannot be read"),
        (take_anothers_weights, "its weights are not those of its model"),
    ],
)
def test_a_base_that_does_not_fit_is_named(
    folder: Path, tmp_path: Path, damage: Callable[[Path, Path], None], said: str
) -> None:
    load_policy(folder, MODEL, ThresholdConfig()).save(tmp_path / "base")
    opened(tmp_path / "base").save(tmp_path / "saved")
    opened(tmp_path / "saved")
    damage(tmp_path / "base", tmp_path / "saved")
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "saved")


@pytest.mark.parametrize("changes", [{"rank": 3}, {"alpha": 9.0}, {"targets": ("q_proj",)}])
def test_an_adapter_of_another_shape_is_refused(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    opened(folder).save(tmp_path)
    with pytest.raises(UserError, match="merged export"):
        opened(tmp_path, **changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron_config", {"tensor_model_parallel_size": 1}),  # imports megatron_core
        ("init_lora_weights", "pissa"),  # takes weights out of the base
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2], [1, 2]]),
    ],
)
def test_settings_of_an_adapter_that_do_more_than_a_plain_one_are_refused(
    folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    opened(folder).save(tmp_path)
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**settings, "unknown_to_this_peft": 1}))
    opened(tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(UserError, match=f"has {key}=.*not supported; give a plain LoRA"):
        opened(tmp_path)


def test_a_run_that_moved_finds_its_base(tmp_path: Path) -> None:
    """Its own warm start, beside its checkpoints."""
    build_policy(MODEL, ThresholdConfig(), alphabet=ALPHABET, seed=0).save(tmp_path / "run" / "warm_start")
    policy = disturb(opened(tmp_path / "run" / "warm_start"))
    policy.save(tmp_path / "run" / "checkpoints" / "step-000001")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert torch.equal(logits(opened(tmp_path / "moved" / "checkpoints" / "step-000001")), logits(policy))


# -- a whole run's parts ---------------------------------------------------------------------------------------------

TINY = [
    *("task.name=sudoku", "model.hidden_size=16", "model.layers=2", "model.heads=2", "model.intermediate_size=32"),
    *("warm_start.steps=2", "warm_start.batch_size=4", "warm_start.threads=1", "learner.threads=1"),
    *("learner.group_size=4", "rollout.slots=4", "sampler.max_prompt_tokens=16", "sampler.max_completion_tokens=16"),
    *("learner.kl_beta=0.1", "learner.autocast=false", "learner.learning_rate=0.01", "evaluation.drift_every=0"),
    *("learner.groups_per_step=1", "learner.inner_updates=2", "model.lora.rank=2", "run.deterministic=false"),
]


@pytest.fixture(scope="module")
def sudoku_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(None, [*TINY, "model.lora=null"])
    folder = tmp_path_factory.mktemp("sudoku") / "base"
    build_policy(
        config.model, config.sampler.threshold, alphabet=build_task(config.task).alphabet, seed=5
    ).save(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
def test_three_steps_a_checkpoint_and_on(sudoku_model: Path, tmp_path: Path, given: bool, precision: str) -> None:
    """Rollout adopts base and adapter; a trainer that is restored goes on bit-equal."""
    path = [f"model.path={sudoku_model}"] if given else []
    config = load_config(None, [*TINY, *path, f"rollout.precision={precision}"])
    trainer = PolicyTrainer(config, tmp_path / "warm_start")
    trainer.warm_start(lambda kind, values: None)
    assert (tmp_path / "warm_start" / ADAPTER_CONFIG).is_file() == given  # a model of one's own is not copied
    task = build_task(config.task)
    rollout = SynchronousRollout(config, task, open_rollout_policy(config, task))
    adopt_base(rollout.policy, trainer.base())
    batches = []
    for step in range(4):
        if step == 3:
            trainer.saved()(tmp_path / "saved")
        rollout.adopt(trainer.weights(), step)
        batches.append([next(g.payload for _ in range(50) for g in rollout._groups(1) if g.spread)])
        metrics = trainer.train(batches[-1], step)
        assert (metrics["learner_kl"] > 0) == (step > 0 or config.learner.inner_updates > 1)
    assert torch.load(tmp_path / "saved" / LEARNER_STATE, weights_only=True)["steps_done"] == 3
    other = PolicyTrainer(config, tmp_path / "warm_start")
    other.warm_start(lambda kind, values: pytest.fail("it learns anew"))
    other.restore(tmp_path / "saved")
    assert other.train(batches[-1], 3) == metrics
    assert np.array_equal(other.weights(), trainer.weights())
    assert digest(*other.base()) == digest(*trainer.base())
    saved = load_policy(tmp_path / "saved", config.model, config.sampler.threshold)
    before = load_policy(tmp_path / "warm_start", config.model, config.sampler.threshold)
    assert not torch.equal(logits(saved), logits(before))
    tolerance = 1e-4 if precision == "float32" else 0.05
    table = decode_group(batches[-1][0])  # drawn with the weights that were saved
    replayed = replay_group(saved, config, task, table, version=3, tolerance=tolerance)
    assert replayed.agrees
    assert all(token.comparable for token in replayed.tokens)


def test_demonstrations_teach_adapters_and_training_goes_on_with_them(sudoku_model: Path, tmp_path: Path) -> None:
    """`diffpo sft` of a given model, then `diffpo train` from what it wrote."""
    config = load_config(None, [*TINY, f"model.path={sudoku_model}", "model.lora.dropout=0.1"])
    taught = supervised(config, build_task(config.task), tmp_path / "taught")
    plain = load_policy(sudoku_model, config.model.model_copy(update={"lora": None}), config.sampler.threshold)
    assert digest(*base_arrays(taught)) == digest(*[p.detach().numpy() for p in plain.model.parameters()])
    later = load_config(None, [*TINY, f"model.path={tmp_path / 'taught'}"])
    trainer = PolicyTrainer(later, tmp_path / "run" / "warm_start")
    trainer.warm_start(lambda kind, values: None)
    load_flat(plain := load_policy(sudoku_model, config.model, config.sampler.threshold), trainer.weights())
    assert torch.equal(logits(plain), logits(taught))
    assert read_base(tmp_path / "run" / "warm_start") == Base.of(sudoku_model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's list of mapped memory")
def test_the_base_stays_in_rays_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters lie in the object store's own mapping, which every process of the node has."""
    wide = ModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=64)
    policy = build_policy(wide, ThresholdConfig(), alphabet=ALPHABET, seed=0)
    for name in ("RAY_AUTH_MODE", ENABLE_RAY_CLUSTERS_ENV_VAR):  # restored, whatever connecting makes of them
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    connect(LOCAL, way_out="")
    try:
        private = base_arrays(with_adapter(policy))
        arrays: Any = ray.get(ray.put(private))
        adopt_base(policy, arrays)
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [line[0].split("-") for line in lines if any("plasma" in part for part in line)]

        def in_store(address: int) -> bool:
            return any(int(low, 16) <= address < int(high, 16) for low, high in ends)

        assert all(in_store(parameter.data_ptr()) for _, parameter in frozen_parameters(policy))
        assert not any(in_store(array.ctypes.data) for array in private)
    finally:
        ray.shutdown()


def test_a_checkpoint_is_evaluated_and_generates(sudoku_model: Path, tmp_path: Path) -> None:
    config = load_config(None, [*TINY, f"model.path={sudoku_model}", "evaluation.prompts=4", "evaluation.gammas=[3]"])
    policy = load_policy(sudoku_model, config.model, config.sampler.threshold)
    disturb(policy).save(tmp_path)
    found: dict[int, Point] = {}
    shard = Shard("one", tmp_path, Setting("one", "entropy_bound", 3.0), range(4))
    measure_here(config, {0: shard}, found.__setitem__)
    assert 1 <= found[0].mean_nfe <= 16
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "1004040003104001", "--no-steps"])
    assert done.exit_code == 0, done.output
    assert "NFE" in done.output


def test_another_runs_adapter_does_not_fit(sudoku_model: Path, tmp_path: Path) -> None:
    config = load_config(None, [*TINY, f"model.path={sudoku_model}"])
    trainer = PolicyTrainer(config, tmp_path / "one")
    trainer.warm_start(lambda kind, values: None)
    other = PolicyTrainer(load_config(None, TINY), tmp_path / "two")
    other.warm_start(lambda kind, values: None)
    other.saved()(tmp_path / "saved")
    with pytest.raises(RunError, match=r"does not fit this run: .*another base"):
        trainer.restore(tmp_path / "saved")


def test_a_study_trains_adapters_too() -> None:
    config = load_config(None, [*TINY, "replay.drop_no_spread=false"])
    plain = build_policy(config.model, ThresholdConfig(), alphabet=build_task(config.task).alphabet, seed=0)
    run = SingleRun(config, to_flat(plain.model))
    run.learner.step(run._rollout.batch(), version=0)
    assert adapted(run.learner.policy)
    run._versions.append((1, to_flat(run.learner.policy)))
    run._adopt_oldest()
    assert (parameters(run._rollout.policy) == parameters(run.learner.policy)).all()


def test_the_digest_of_a_base_tells_trainings_apart(folder: Path, tmp_path: Path) -> None:
    load_policy(folder, ModelConfig(), ThresholdConfig()).save(tmp_path / "one")
    policy = load_policy(tmp_path / "one", ModelConfig(), ThresholdConfig())
    policy.save(tmp_path / "same")
    disturb(policy).save(tmp_path / "trained")
    one, same, trained = (Base.of(tmp_path / name).digest for name in ("one", "same", "trained"))
    assert one == same != trained


def test_what_is_no_file_is_passed_over(folder: Path, tmp_path: Path) -> None:
    load_policy(folder, ModelConfig(), ThresholdConfig()).save(tmp_path / "one")
    expected = Base.of(tmp_path / "one").digest
    os.mkfifo(tmp_path / "one" / "more.safetensors")  # would never be read to its end
    assert Base.of(tmp_path / "one").digest == expected
