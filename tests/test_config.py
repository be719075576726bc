"""Config: what is shipped loads and survives a dump, and every mistake is one line with key, value and way out."""

import json
import re
from pathlib import Path

import pytest

from common.config import IN_RAY_JOB, Config
from common.config_file import dump_config, load_config, parse_config
from common.errors import UserError
from common.spelling import IN_WORDS
from common.tasks import TASK_CONFIGS

CONFIGS = sorted((Path(__file__).parents[1] / "deploy/configs").glob("*.yaml"))
TASKS = sorted(set(TASK_CONFIGS) - {"custom"})
KNOWN = ", ".join(sorted(TASK_CONFIGS))
SECTIONS = ("task", "model", "warm_start", "sampler", "rollout", "replay", "learner", "evaluation", "metrics", "run")


def refusal(*overrides: str, task: str = "sudoku") -> str:
    """The one line that refuses these overrides."""
    with pytest.raises(UserError) as caught:
        load_config(None, [f"task.name={task}", *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


def round_trip(config: Config, folder: Path) -> Config:
    path = folder / "dumped.yaml"
    path.write_text(dump_config(config))
    return load_config(path)


def test_there_are_shipped_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_survive_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert round_trip(config, tmp_path) == config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learner.learning_rate=1e-5", "learner.weight_decay=3e-12"],
        ["run.name=2024-01-01", "run.deterministic=true", "model.path='a folder/with: colon'"],
        ["sampler.threshold.gamma_grid=[0.1,0.2]", "evaluation.nfe_range=[1,64]", "sampler.block_length=4"],
    ],
    ids=str,
)
@pytest.mark.parametrize("task", TASKS)
def test_a_dump_shows_every_key_and_loads_to_the_same(task: str, overrides: list[str], tmp_path: Path) -> None:
    config = load_config(None, [f"task.name={task}", *overrides])
    assert round_trip(config, tmp_path) == config
    text = dump_config(config)
    for section in SECTIONS:
        assert f"\n{section}:" in f"\n{text}"
        for key in type(getattr(config, section)).model_fields:
            assert f"\n  {key}:" in text


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("task: {name: sudoku, seed: 3}\nlearner: {steps: 7, group_size: 4}\n")
    config = load_config(path, ["learner.steps=8", "learner.steps=9", "task.seed=5"])
    assert (config.learner.steps, config.learner.group_size, config.task.seed) == (9, 4, 5)


def test_a_config_cannot_be_changed_in_place() -> None:
    config = load_config(None, ["task.name=sudoku"])
    with pytest.raises(ValueError, match="frozen"):
        config.learner.steps = 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], False), (["replay.max_staleness=0"], True), (["replay.max_staleness=0", "run.deterministic=false"], False),
     (["run.deterministic=true"], True)],
)  # fmt: skip
def test_deterministic_follows_staleness_unless_it_is_set(overrides: list[str], expected: bool) -> None:
    assert load_config(None, ["task.name=sudoku", *overrides]).deterministic is expected


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("lerner.steps=1", "lerner", "learner"),
        ("learner.stpes=1", "learner.stpes", "steps"),
        ("learner.learnig_rate=1", "learner.learnig_rate", "learning_rate"),
        ("sampler.threshold.gama_init=1", "sampler.threshold.gama_init", "gamma_init"),
        ("sampler.treshold.gamma_init=1", "sampler.treshold", "threshold"),
        ("task.blank_min=3", "task.blank_min", "blanks_min"),
        ("evaluation.prompt=3", "evaluation.prompt", "prompts"),
        ("replay.max_stalenes=3", "replay.max_stalenes", "max_staleness"),
        ("warm_start.step=3", "warm_start.step", "steps"),
        ("rollout.slot=3", "rollout.slot", "slots"),
        ("model.layer=3", "model.layer", "layers"),
        ("metrics.prt=3", "metrics.prt", "port"),
        ("run.nam=x", "run.nam", "name"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(override: str, key: str, nearest: str) -> None:
    section = key.rpartition(".")[0]
    assert refusal(override) == f"unknown key {key}; did you mean {section}{'.' if section else ''}{nearest}?"


def test_a_key_without_its_section_names_the_sections_that_have_it() -> None:
    assert refusal("steps=3") == "unknown key steps; did you mean warm_start.steps or learner.steps?"


@pytest.mark.parametrize(("override", "some"), [("zzz=1", SECTIONS), ("run.qqqq=1", ("name", "root", "seed"))])
def test_an_unknown_key_without_a_neighbour_lists_the_valid_ones(override: str, some: tuple[str, ...]) -> None:
    message = refusal(override)
    assert "valid keys: " in message
    assert set(some) <= set(message.split("valid keys: ")[1].split(", "))


BAD = [
    # what is given, and what the line must contain: the key, then the value or the limit
    ("learner.group_size=1", ["learner.group_size", "2", "given 1"]),
    ("learner.steps=0", ["learner.steps", "given 0"]),
    ("learner.steps=1.5", ["learner.steps", "given 1.5"]),
    ("learner.steps=many", ["learner.steps", "given 'many'"]),
    ("learner.steps=", ["learner.steps", "given None"]),
    ("learner.steps.x=1", ["learner.steps", "given {'x': 1}"]),
    ("learner.clip_low=1", ["learner.clip_low", "less than 1"]),
    ("learner.clip_high=0", ["learner.clip_high", "greater than 0"]),
    ("learner.speed_weight=1.1", ["learner.speed_weight", "given 1.1"]),
    ("learner.speed_weight=.nan", ["learner.speed_weight", "given nan"]),
    ("learner.weight_cap=0", ["learner.weight_cap", "given 0"]),
    ("learner.learning_rate=-1", ["learner.learning_rate", "given -1"]),
    ("learner.learning_rate=.nan", ["learner.learning_rate", "given nan"]),
    ("learner.beta1=1", ["learner.beta1", "given 1"]),
    ("learner.kl_beta=-0.1", ["learner.kl_beta", "given -0.1"]),
    ("learner.inner_updates=0", ["learner.inner_updates", "given 0"]),
    ("learner.train=both", ["learner.train", "'both' is unknown; known: 'model', 'threshold' or 'joint'"]),
    ("learner.tau_law=any", ["learner.tau_law", "'any' is unknown; known: "]),
    ("learner.cost=null", ["learner.cost", "None is unknown; known: "]),
    ("learner.surrogate_passes=3", ["surrogate_passes=3", "tau_law=paper", "set tau_law=distinct"]),
    ("learner=5", ["learner", "given 5"]),
    ("sampler.block_length=5", ["block_length=5", "max_completion_tokens=16", "divisor"]),
    ("sampler.block_length=0", ["block_length=0"]),
    ("sampler.temperature=0", ["sampler.temperature", "given 0"]),
    ("sampler.rule=best", ["sampler.rule", "'best' is unknown; known: "]),
    ("sampler.rule=confidence", ["learner.train=joint", "confidence", "set learner.train=model"]),
    ("sampler.rule=top_k", ["learner.train=joint", "top_k", "set learner.train=model"]),
    ("sampler.confidence_threshold=1.5", ["sampler.confidence_threshold", "given 1.5"]),
    ("sampler.threshold.gamma_grid=[1,1]", ["gamma_grid", "[1.0, 1.0]", "strictly increasing"]),
    ("sampler.threshold.gamma_grid=[2,1]", ["gamma_grid", "[2.0, 1.0]", "sort it"]),
    ("sampler.threshold.gamma_grid=[0,1]", ["gamma_grid", "[0.0, 1.0]", "from 1e-09 or above"]),
    ("sampler.threshold.gamma_grid=[]", ["gamma_grid", "at least 1"]),
    ("sampler.threshold.gamma_init=0", ["sampler.threshold.gamma_init", "given 0"]),
    ("sampler.max_prompt_tokens=500", ["516", "model.max_positions=512", "raise"]),
    ("rollout.slots=4", ["rollout.slots=4", "learner.group_size=8"]),
    ("rollout.actors=0", ["rollout.actors", "given 0"]),
    ("rollout.actors=501", ["rollout.actors", "500", "given 501"]),
    ("rollout.reward_memory_bytes=67108863", ["rollout.reward_memory_bytes: 67108863", "67108864 (64 MiB)", "or more"]),
    ("rollout.reward_memory_bytes=10000000000000000000", ["rollout.reward_memory_bytes", "(1 EiB)", "or less"]),
    ("rollout.reward_timeout=1e9", ["rollout.reward_timeout", "604800"]),
    ("replay.max_staleness=-1", ["replay.max_staleness", "given -1"]),
    ("evaluation.nfe_range=[4,2]", ["nfe_range=[4.0, 2.0]", "low < high"]),
    ("evaluation.nfe_range=[2]", ["evaluation.nfe_range", "given [2]"]),
    ("evaluation.gammas=[1,0.5]", ["gammas=[1.0, 0.5]", "strictly increasing"]),
    ("evaluation.gammas=[-1,0.5]", ["gammas=[-1.0, 0.5]", ">= 0"]),
    ("evaluation.split=train", ["evaluation.split", "'train' is unknown; known: "]),
    ("metrics.port=70000", ["metrics.port", "65535", "given 70000"]),
    ("run.name=a/b", ["run.name: 'a/b' is refused; it takes at most 63 letters, digits"]),
    ("rollout.labels={zone: ' a'}", ["rollout.labels.zone: ' a' is refused; it takes at most 252 letters, digits"]),
    ("metrics.wandb_project=a/b", ["metrics.wandb_project: 'a/b' is refused; it takes no '/'"]),
    ("run.name=", ["run.name", "given None"]),
    ("run.seed=-1", ["run.seed", "given -1"]),
    ("run.stall_timeout=0", ["run.stall_timeout", "given 0"]),
    ("run.root=${nowhere}", ["run.root", "nowhere"]),
    ("run.root=s3:/bucket/runs", ["run.root: 's3:/bucket/runs'", "s3://bucket/runs"]),
    ("run.root=s3://", ["run.root: 's3://'", "s3://bucket/runs"]),
    ("run.root=''", ["run.root: ''", "a folder"]),
    ("run.checkpoints=gs://?region=x", ["run.checkpoints: 'gs://?region=x'"]),
    ("model.heads=3", ["heads=3", "hidden_size=128", "divisor"]),
    ("model={hidden_size: 132, heads: 4}", ["hidden_size=132", "heads=4", "33 wide", "an even width"]),
    ("model.attention=flash", ["model.attention", "'flash' is unknown; known: "]),
    ("task=countdown", ["task", "given 'countdown'"]),
    ("task.name=chess", ["unknown task 'chess'", KNOWN]),
    ("task.seed=-1", ["task.seed", "given -1"]),
    ("task.reward_weights={cellz: 1}", ["task", "'cellz'", "cells, exact"]),
    ("task.careful_fraction=1.01", ["task.careful_fraction", "given 1.01"]),
    ("learner.steps", ["'learner.steps'", "key.sub=value"]),
    ("=3", ["'=3'", "key.sub=value"]),
    ("--steps=3", ["'--steps=3'", "key.sub=value"]),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[override for override, _ in BAD])
def test_a_bad_value_is_refused_in_one_line(override: str, expected: list[str]) -> None:
    message = refusal(override)
    for part in expected:
        assert part in message


def test_every_pattern_is_told_in_words() -> None:
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', json.dumps(Config.model_json_schema()))
    assert {json.loads(pattern) for pattern in patterns} == set(IN_WORDS)


@pytest.mark.parametrize("key", ["run.root", "run.checkpoints", "model.path"])
def test_a_tilde_is_the_home_directory(key: str) -> None:
    section, name = key.split(".")
    config = load_config(None, ["task.name=sudoku", f"{key}=~/there"])
    assert getattr(getattr(config, section), name) == str(Path.home() / "there")


def test_checkpoints_are_at_one_place_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def where(given: str) -> str | None:
        return load_config(None, ["task.name=sudoku", f"run.checkpoints={given}"]).run.checkpoints

    monkeypatch.chdir(tmp_path)
    assert where("kept") == str(tmp_path / "kept")
    assert where("s3://bucket/kept") == "s3://bucket/kept"
    monkeypatch.setenv(IN_RAY_JOB, "{}")  # Ray deletes the folder that a job works in
    assert (where("kept"), where("/kept")) == (str(Path.home() / "kept"), "/kept")


@pytest.mark.parametrize("key", ["run.root", "model.path"])
def test_an_adapter_needs_a_base_that_all_nodes_have(key: str) -> None:
    message = refusal("model.lora={}", f"{key}=s3://bucket/x")
    assert f"model.lora with {key}=s3://bucket/x" in message
    assert "give it in model.path" in message


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal("learner.steps=0", "run.seed=-1", "rollout.slotz=3")
    assert all(key in message for key in ("learner.steps", "run.seed", "rollout.slotz"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "task is missing; give --config FILE or task.name=NAME (countdown, custom,"),
        ("learner: {steps: 3}", "task is missing"),
        ("task: {}", f"task.name is missing; one of: {KNOWN}"),
        ("task: {name: 5}", "unknown task '5'"),
        ("task: null", "task: "),
        ("task: {name: sudoku}\nlearner: null", "learner: "),
        ("task: {name: sudoku}\n1: 2", "1: Keys should be strings"),
        ("task: {name: sudoku", "line 1"),
        ("task: {name: sudoku}\n\tlearner: 3", "line 2"),
        ("task: {name: sudoku}\ntask: {name: countdown}", "duplicate key task"),
        ("task: {name: sudoku}\nrun: {name: '${oc.env:NO_SUCH_NAME}'}", "NO_SUCH_NAME"),
        ("!!python/object/apply:os.getcwd []", "python/object"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert expected != f"line {expected[-1]}" or str(path) in message


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(UserError, match=r"missing\.yaml: no such file; in that folder: there\.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="no YAML files"):
        load_config(tmp_path / "nowhere/missing.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match=r"some\.yaml"):
        load_config(path)


def test_a_plain_mapping_is_validated_alike() -> None:
    assert parse_config({"task": {"name": "sudoku"}}) == load_config(None, ["task.name=sudoku"])
    with pytest.raises(UserError, match=r"unknown key learner\.stepz; did you mean learner\.steps\?"):
        parse_config({"task": {"name": "sudoku"}, "learner": {"stepz": 1}})


@pytest.mark.parametrize("text", ["[1, 2]", "3"])
def test_a_file_whose_top_level_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="must be a mapping"):
        load_config(path)


UNCHECKED = [
    ("evaluation.tokens_per_step=[0]", "the top_k sweep then never ends"),
    ("evaluation.tokens_per_step=[-1]", "the top_k sweep then never ends"),
    ("evaluation.gammas=[]", "the area under an empty frontier fails after the training"),
    ("evaluation.gammas=[.nan]", "comparisons with NaN are all false"),
    ("sampler.threshold.gamma_grid=[.nan,1]", "comparisons with NaN are all false"),
    ("sampler.threshold.gamma_grid=[1,.inf]", "the head's mean is infinite"),
    ("sampler.threshold.gamma_init=.inf", "the head's bias is NaN"),
    ("learner.learning_rate=.inf", "the first update is NaN"),
    ("evaluation.nfe_range=[1,.inf]", "the area is NaN"),
    ("evaluation.confidences=[1.5]", "sampler.confidence_threshold refuses it"),
    ("rollout.cpus=0", "every task of the evaluation would start at once"),
]


@pytest.mark.parametrize("override", [item for item, _ in UNCHECKED])
def test_values_that_cannot_work_are_refused(override: str) -> None:
    assert override.partition("=")[0].rpartition(".")[2] in refusal(override)


def test_off_is_a_word_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    assert load_config(None, ["task.name=sudoku", "learner.cost=off"]).learner.cost == "off"
    path = tmp_path / "off.yaml"
    path.write_text("task: {name: sudoku}\nlearner: {cost: off}\n")
    assert load_config(path).learner.cost == "off"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.drift_remedy=hold_nfe"], ["drift_remedy=hold_nfe", "train=joint", "set train=model"]),
        (
            ["learner.drift_remedy=hold_nfe", "learner.train=model", "sampler.rule=top_k"],
            ["drift_remedy=hold_nfe needs sampler.rule=entropy_bound, got top_k"],
        ),
        (["sampler.rule=sampled_entropy_bound", "learner.surrogate_passes=1"], ["needs", "surrogate_passes=2"]),
        (["sampler.rule=sampled_entropy_bound", "learner.surrogate=coupled_masks"], ["surrogate=mean_field"]),
        (["sampler.rule=sampled_entropy_bound", "learner.train=threshold"], ["a model that learns"]),
        (["sampler.rule=sampled_entropy_bound", "learner.prompt_masking=0.1"], ["0.1", "set learner.prompt_masking=0"]),
        (["sampler.threshold.standardise=true", "learner.groups_per_step=1"], ["raise learner.groups_per_step"]),
        (["run.seed=99999999999999999999999"], ["run.seed", "less than 9223372036854775808"]),
        (["sampler.threshold.init_width=60"], ["init_width", "less than or equal to 10"]),
        (["sampler.threshold.gamma_grid=[1e-300,1]"], ["gamma_grid", "from 1e-09 or above"]),
        (["sampler.rule=confidence"], ["learner.train=joint needs sampler.rule=entropy_bound, got confidence"]),
    ],
)
def test_remedies_that_cannot_work_are_refused(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    for word in words:
        assert word in message


def test_an_override_of_one_entry_of_a_list_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"gammas\[0\]=2"):
        load_config(Path(__file__).parents[1] / "deploy/configs/sudoku.yaml", ["evaluation.gammas[0]=2"])


def test_the_law_of_tau_is_free_where_no_tau_is_drawn() -> None:
    for other in ("learner.surrogate=coupled_masks", "learner.train=threshold"):
        assert load_config(None, ["task.name=sudoku", "learner.surrogate_passes=4", other]).learner.tau_law == "paper"


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ([], "auto"),
        (["learner.train=model"], "hold_nfe"),
        (["learner.train=model", "learner.drift_remedy=none"], "none"),
        (["learner.train=model", "sampler.rule=top_k"], "auto"),
    ],
)
def test_drift_remedy_is_chosen_where_only_the_model_learns(overrides: list[str], remedy: str) -> None:
    assert load_config(None, ["task.name=sudoku", *overrides]).learner.drift_remedy == remedy
