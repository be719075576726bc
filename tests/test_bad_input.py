"""Whatever is wrong with what a person gives: one line with the cause, an exit code, nothing started, nothing lost."""

import asyncio
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import pyarrow as pa
import pytest
import ray
import torch
from filelock import FileLock
from pydantic import BaseModel
from ray.exceptions import ActorAlreadyExistsError
from test_help import COMMANDS as KNOWN

import learner.warm_start
from common.checkpoint_manifest import MANIFEST
from common.checkpoint_store import CheckpointDamaged, CheckpointStore
from common.config import Config, ThresholdConfig
from common.config_file import dump_config, load_config
from common.errors import RunError, UserError
from common.journal import encode_journal
from common.lease import FinishedGroup
from common.policy_loading import build_policy
from common.recovery import JOURNAL_FILE, recover
from common.segment_folder import SegmentFolder
from common.segment_store import SegmentStore
from common.tasks import TASK_CONFIGS, CountdownConfig, Gsm8kConfig, Math500Config, SudokuConfig, build_task
from learner import driver, ray_connection
from learner.checkpoint_writer import CheckpointWriter
from learner.cli import main
from learner.learner_actor import LearnerActor
from learner.parts import POLICY
from learner.preflight import preflight
from learner.run_directory import RunDirectory
from learner.synchronous_rollout import SynchronousRollout

TINY = [
    *("task.name=sudoku", "model.hidden_size=16", "model.layers=1", "model.heads=2", "model.intermediate_size=32"),
    *("model.max_positions=64", "learner.group_size=4", "rollout.slots=4", "learner.steps=9"),
    *("sampler.max_prompt_tokens=16", "evaluation.prompts=4", "warm_start.steps=2", "run.name=new"),
]
GOOD = "task: {name: sudoku}\n"
STUDY = "title: t\nquestion: q\nconfig: good.yaml\narms: {one: {about: a}}\n"
NUMBER = 7
ALLOWED = "lock"  # the one file that a refusal may leave behind


@dataclass(frozen=True)
class Case:
    """A command, what is done to the folder before it, and what its one line says."""

    name: str
    arguments: list[str]
    parts: list[str]
    before: Callable[[], Any] = lambda: None
    code: int = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run that has a group in its segments, and a good configuration."""
    folder = tmp_path_factory.mktemp("made")
    config = load_config(None, [*TINY, "run.name=done", "sampler.threshold.gamma_init=1.5"])
    task = build_task(config.task)
    policy = build_policy(config.model, ThresholdConfig(), alphabet=task.alphabet, seed=0)
    policy.save(folder / "model")
    run = folder / "runs/done"
    policy.save(run / "warm_start")
    (run / "config.yaml").write_text(dump_config(config))
    [group] = SynchronousRollout(config, task, policy)._groups(1)
    SegmentFolder(run / "segments").write([FinishedGroup(NUMBER, 1, group.payload, 0.0, 0, 4)])
    (folder / "good.yaml").write_text(dump_config(config).replace("name: done", "name: new"))
    (folder / "study.yaml").write_text(STUDY)
    (folder / "pairs.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to work in, where nothing can start Ray or train."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "1" if name.startswith("HF") else "error"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as `diffpo scale` does, and undone
    started: list[str] = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: started.append("ray"))
    monkeypatch.setattr(learner.warm_start, "supervised", lambda *_, **__: started.append("warm start"))
    yield tmp_path / "place"
    assert not started
    torch.set_num_threads(1)


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file; of a link, where it leads."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and path.name != ALLOWED
    }


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["diffpo", *arguments])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, capsys.readouterr().err


def write(name: str, content: str | bytes) -> Callable[[], Any]:
    def do() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[], Any]:
    return lambda: Path(name).write_bytes(change(Path(name).read_bytes()))


def described(name: str, **changes: Any) -> Callable[[], Any]:
    """Changes keys of a JSON file; those that are None go."""

    def do() -> None:
        found = json.loads(Path(name).read_text()) | changes
        Path(name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return do


def both(*steps: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [step() for step in steps]


def remove(name: str) -> Callable[[], Any]:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


# -- configurations ----------------------------------------------------------------------------------------------------

COMMANDS = [["train"], ["sft"], ["eval", "model"], ["bench", "main"]]
BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["task is missing"]),
    "a list": ("[1, 2]", ["the top level must be a mapping"]),
    "a scalar": ("3", ["the top level must be a mapping"]),
    "not UTF-8": (b"task: {name: sudoku}\n# \xff\xfe", ["bad.yaml", "utf-8"]),
    "zeros": (b"\0" * 100, ["bad.yaml", "special characters"]),
    "broken": ("task: {name: sudoku", ["bad.yaml", "line 1"]),
    "a tab": (GOOD + "\tlearner: 3", ["line 2"]),
    "python tag": (GOOD + "run: {root: !!python/object/apply:os.getcwd []}", ["python/object"]),
    "unknown tag": (GOOD + "run: !mine {}", ["!mine"]),
    "alias bomb": (GOOD + BOMB, ["44 aliases", "exceed 30"]),
    "interpolation bomb": (GOOD + "a: '" + "${b}" * 31 + "'", ["31 aliases", "exceed 30"]),
    "endless alias": (GOOD + "run: &r [*r]", ["bad.yaml"]),
    "endless interpolation": (GOOD + "run: {name: '${run.name}'}", ["bad.yaml"]),
    "deep": (GOOD + "run: " + "[" * 400 + "]" * 400, ["bad.yaml"]),
    "endless number": (GOOD + f"run: {{seed: {'9' * 6000}}}", ["bad.yaml"]),
    "duplicate key": (GOOD + GOOD, ["duplicate key task"]),
    "unknown section": (GOOD + "lerner: {}", ["unknown key lerner; did you mean learner?"]),
    "unknown key": (GOOD + "learner: {stpes: 3}", ["learner.stpes; did you mean learner.steps?"]),
    "key on two lines": (GOOD + '"le\\nrner": 3', ["unknown key le rner"]),
    "key that is a number": (GOOD + "1: 2", ["1: Keys should be strings"]),
    "section that is text": (GOOD + "learner: fast", ["learner", "'fast'"]),
    "section that is null": (GOOD + "learner: null", ["learner"]),
    "task that is unknown": (
        "task: {name: chess}",
        ["unknown task 'chess'", ", ".join(sorted(TASK_CONFIGS))],
    ),
    "missing variable": (GOOD + "run: {root: '${oc.env:NO_SUCH_NAME}'}", ["NO_SUCH_NAME"]),
    "mandatory value": (GOOD + "run: {root: '???'}", ["run.root"]),
    "half a character": (GOOD + 'model: {path: "\\ud800"}', ["bad.yaml", "escape"]),
    "NUL in a path": (GOOD + 'warm_start: {file: "a\\0b"}', ["warm_start.file", "NUL"]),
    "credentials": (
        GOOD + "run: {checkpoints: 's3://KEY:OPEN-SESAME@b/x'}",
        ["run.checkpoints", "AWS_SECRET_ACCESS_KEY"],
    ),
}
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "no value": (["learner.steps"], ["'learner.steps' is not of the form key.sub=value"]),
    "no key": (["=3"], ["key.sub=value"]),
    "a dot too many": (["learner..steps=3"], ["key.sub=value"]),
    "an option": (["learner.steps=3", "--", "--steps=3"], ["key.sub=value"]),
    "unknown": (["learner.stpes=3"], ["did you mean learner.steps?"]),
    "without section": (["steps=3"], ["did you mean warm_start.steps or learner.steps?"]),
    "broken YAML": (["learner.steps=3", "run.name=[1"], ["override 'run.name=[1' of the config is no YAML"]),
    "python tag": (["run.name=!!python/object/apply:os.getcwd []"], ["python/object"]),
    "deep": (["run.name=" + "[" * 400], ["config"]),
    "of a list's entry": (["evaluation.gammas[0]=1"], ["evaluation.gammas"]),
    "below a value": (["learner.steps.x=1"], ["learner.steps"]),
    "credentials": (["run.checkpoints=s3://KEY:OPEN-SESAME@bucket/x"], ["run.checkpoints", "s3://***@bucket/x"]),
    "credentials in a query": (["run.checkpoints=abfs://a@b/c?client_secret=OPEN-SESAME"], ["client_secret=***"]),
    "not UTF-8": (["run.root=\udcff"], ["run.root", "surrogates"]),
    "credentials, malformed": (["s3://KEY:OPEN-SESAME@bucket"], ["s3://***@bucket"]),
    "credentials, unknown key": (["run.chekpoints=s3://KEY:OPEN-SESAME@b"], ["***"]),
    "credentials, no YAML": (["run.chekpoints=[s3://KEY:OPEN-SESAME@b"], ["***"]),
}
CONTRADICTIONS: dict[str, tuple[list[str], str]] = {
    "heads": (["model.heads=3"], "heads=3 does not divide"),
    "blocks": (["sampler.block_length=5"], "block_length=5 does not divide"),
    "rule and threshold": (["sampler.rule=top_k"], "set learner.train=model"),
    "remedy and train": (["learner.drift_remedy=hold_nfe"], "drift_remedy=hold_nfe with train=joint"),
    "passes and law": (["learner.surrogate_passes=3"], "set tau_law=distinct"),
    "sets and surrogate": (["sampler.rule=sampled_entropy_bound", "learner.surrogate=coupled_masks"], "it needs"),
    "sets and masking": (["sampler.rule=sampled_entropy_bound", "learner.prompt_masking=0.1"], "prompt_masking=0.1"),
    "spread of one": (["sampler.threshold.standardise=true", "learner.groups_per_step=1"], "groups_per_step=1"),
    "compile and cache": (["rollout.compile=true", "sampler.cache=dual"], "rollout.compile=false"),
    "slots and group": (["rollout.slots=2"], "rollout.slots=2 is below learner.group_size=4"),
    "positions": (["sampler.max_prompt_tokens=60"], "76 exceeds model.max_positions=64"),
    "KL of no model": (["learner.kl_beta=0.1", "learner.train=threshold"], "kl_beta=0.1 with train=threshold"),
    "blanks": (["task.blanks_min=9", "task.blanks_max=8"], "blanks_min 9 is above blanks_max 8"),
    "NFE range": (["evaluation.nfe_range=[4,2]"], "low < high"),
    "order": (["evaluation.gammas=[2,1]"], "strictly increasing"),
}


def leaves(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and field of every key below a section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{path}{name}.")
        elif path or name != "task":
            yield f"{path}{name}", field


def beyond(field: Any) -> list[str]:
    """YAML of values that this key cannot have."""
    kinds = {field.annotation, *get_args(field.annotation)}
    if not kinds & {int, float}:
        return ["{x: 1}"] if get_origin(field.annotation) is not Literal else ["nonsense"]
    found = ["{x: 1}", *([".nan", ".inf"] if float in kinds else ["1.5"])]
    for limit in field.metadata:
        for sign, name in ((-1, "ge"), (0, "gt"), (1, "le"), (0, "lt")):
            if hasattr(limit, name):
                found.append(str(getattr(limit, name) + sign))
    return list(dict.fromkeys(found if len(found) > 3 else [*found, "-1"]))


def limits() -> Iterator[tuple[str, list[Case]]]:
    """For every key of every section, values of the wrong type and beyond each of its limits."""
    turn = count()
    for task in (SudokuConfig, CountdownConfig, Gsm8kConfig, Math500Config):
        fields = [("task." + key, field) for key, field in leaves(task) if key != "name"]
        fields += leaves(Config) if task is SudokuConfig else []
        for key, field in fields:
            values = beyond(field) if get_origin(field.annotation) is not tuple else ["[-1]", "[.nan]", "[[1]]"]
            given = [*COMMANDS[next(turn) % 3], *TINY, f"task.name={task.model_fields['name'].default}"]
            said = "task" if key == "task.reward_weights" else key.rpartition(".")[2]
            named = f"{given[0]}: {task.__name__}: {key}"
            yield named, [Case(f"{named}={value}", [*given, f"{key}={value}"], [said]) for value in values]


def configurations() -> Iterator[Case]:
    for index, (name, (content, parts)) in enumerate(FILES.items()):
        command = COMMANDS[index % len(COMMANDS)]
        yield Case(f"file: {name}", [*command, "-c", "bad.yaml"], parts, write("bad.yaml", content))
    for index, (name, (given, parts)) in enumerate(OVERRIDES.items()):
        yield Case(f"override: {name}", [*COMMANDS[index % len(COMMANDS)], "-c", "good.yaml", *given], parts)
    for index, (name, (given, part)) in enumerate(CONTRADICTIONS.items()):
        yield Case(f"contradiction: {name}", [*COMMANDS[index % 3], *TINY, *given], [part])
    for command in COMMANDS:
        yield Case(f"{command[0]}: no file", [*command, "-c", "no.yaml"], ["no.yaml: no such file", "good.yaml"])
        yield Case(f"{command[0]}: a folder", [*command, "-c", "model"], ["model: no such file"])
    yield Case("sft: not there", ["sft", "-c", "no/such.yaml"], ["no YAML files"])
    yield Case("train: nothing given", ["train"], ["task is missing; give --config FILE"])


# -- everything else ---------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (remove("model"), "no config.json"),
    "a file": (both(remove("model"), write("model", "x")), "no config.json"),
    "empty": (both(remove("model"), lambda: Path("model").mkdir()), "no config.json"),
    "broken config.json": (write("model/config.json", "{"), "config.json is damaged"),
    "a list as config.json": (write("model/config.json", "[]"), "names no model_type"),
    "unknown architecture": (described("model/config.json", model_type="mine"), "are not known"),
    "code of its own": (
        described("model/config.json", model_type="mine", auto_map={"AutoConfig": "evil.Evil"}),
        "are not known",
    ),
    "truncated weights": (edit("model/model.safetensors", lambda data: data[:-9]), "is damaged"),
    "headless weights": (edit("model/model.safetensors", lambda data: b"\xff" * 8 + data[8:]), "is damaged"),
    "empty weights": (write("model/model.safetensors", b""), "is damaged"),
    "no tokenizer": (
        both(remove("model/tokenizer.json"), remove("model/tokenizer_config.json")),
        "there is no tokenizer.json",
    ),
    "broken tokenizer": (write("model/tokenizer.json", "{"), "tokenizer.json is damaged"),
    "no MASK": (described("model/tokenizer_config.json", mask_token=None), "no MASK token"),
    "other vocabulary": (described("model/config.json", vocab_size=2), "outside the model's vocabulary"),
    "broken threshold": (write("model/threshold.json", "{"), "cannot be loaded"),
    "odd threshold": (write("model/threshold.json", '{"gamma_init": -1}'), "cannot be loaded"),
    "threshold of another head": (edit("model/threshold.safetensors", lambda data: data[:20]), "cannot be loaded"),
}
WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {  # what shows only when the weights are read
    "pickles": (
        both(remove("model/model.safetensors"), lambda: torch.save({}, "model/pytorch_model.bin")),
        "is a pickle",
    ),
    "other sizes": (described("model/config.json", intermediate_size=48), "cannot be loaded"),
    "more layers": (described("model/config.json", num_hidden_layers=2), "parameters are not in its weights"),
    "head of another size": (write("model/threshold.json", '{"gamma_grid": [1, 2]}'), "cannot be loaded"),
}
PAIRS: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["holds no demonstrations"]),
    "blank": ("\n \n", ["holds no demonstrations"]),
    "bad JSON": ('{"prompt": "1", "completion": "2"}\n\n{"prompt"\n', ["line 3"]),
    "no completion": ('{"prompt": "1"}\n', ["line 1", "completion"]),
    "a list": ("[1, 2]\n", ["line 1"]),
    "a number": ('{"prompt": "1", "completion": 2}\n', ["line 1", "no text"]),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "2"}\n', ["pairs.jsonl cannot be read"]),
    "deep": ("[" * 100_000 + "\n", ["line 1"]),
    "endless number": ('{"prompt": ' + "9" * 6000 + "}\n", ["line 1"]),
    "half a character": ('{"prompt": "\\ud800", "completion": "2"}\n', ["line 1"]),
    "unknown characters": ('{"prompt": "abc", "completion": "2"}\n', ["line 1", "does not know"]),
    "no answer": ('{"messages": [{"role": "assistant", "content": "2"}]}\n', ["line 1", "no assistant's message"]),
    "messages": ('{"messages": {"role": "user"}}\n', ["line 1", "messages"]),
    "too long": ('{"prompt": "1", "completion": "' + "2" * 17 + '"}\n', ["17 tokens", "max_completion_tokens=16"]),
}
STUDIES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "title"),
    "a list": ("[1]", "study"),
    "a scalar": ("3", "study mine.yaml"),
    "not UTF-8": (b"title: \xff", "mine.yaml"),
    "broken": ("title: {", "mine.yaml"),
    "bomb": (STUDY + BOMB, "exceed 30"),
    "tag": (STUDY + "findings: !!python/name:os.system", "python/name"),
    "unknown key": (STUDY + "sedes: 3", "did you mean seeds?"),
    "no arms": (STUDY.replace("{one: {about: a}}", "{}"), "arms"),
    "arm's name": (STUDY.replace("one", "'../one'"), "use small letters"),
    "arm's override": (STUDY.replace("{about: a}", "{about: a, overrides: ['learner.stpes=1']}"), "arm one: unknown"),
    "arm's seed": (STUDY.replace("{about: a}", "{about: a, overrides: ['run.seed=1']}"), "a study sets it"),
    "credentials": (
        STUDY.replace("{about: a}", "{about: a, overrides: ['run.checkpoints=s3://K:OPEN-SESAME@b']}"),
        "s3://***@b",
    ),
    "seeds": (STUDY + "seeds: 0", "seeds"),
    "comparison": (STUDY + "comparisons: [{claim: c, arm: two, measure: test.after.area}]", "no arm 'two'"),
    "measure": (STUDY + "comparisons: [{claim: c, arm: one, measure: luck}]", "luck"),
    "no configuration": (STUDY.replace("good.yaml", "no.yaml"), "no.yaml: no such file"),
    "model": (STUDY + "overrides: [model.path=nowhere]", "nowhere: no config.json"),
}


def damaged_group(rows_kept: int | None = None, **changes: Any) -> Callable[[], Any]:
    """A sound segment whose group says something that cannot be."""

    def do() -> None:
        folder = SegmentFolder("runs/done/segments")
        [group] = folder.read(0)
        table = pa.ipc.open_stream(group.payload).read_all()
        rows = [{**row, **changes} if index == 0 else row for index, row in enumerate(table.to_pylist())][:rows_kept]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
        folder.delete(0)
        folder.write([FinishedGroup(NUMBER, 1, sink.getvalue().to_pybytes(), 0.0, 0, 4)])

    return do


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


SEGMENT = "runs/done/segments/segment-00000000.arrow"


def inputs() -> Iterator[Case]:
    for index, (name, (before, part)) in enumerate(MODELS.items()):
        given = [["train", *TINY, "model.path=model"], ["eval", "model", *TINY], ["generate", "model", "1"]]
        given += [["sft", *TINY, "model.path=model"]]
        for arguments in (given[index % 4], given[(index + 1) % 4]):
            yield Case(f"{arguments[0]}: model: {name}", arguments, [part], before)
    for name, (before, part) in WEIGHTS.items():
        yield Case(f"generate: model: {name}", ["generate", "model", "1"], [part], before)
        yield Case(f"eval: model: {name}", ["eval", "model", *TINY], [part], before)
    for index, (name, (content, parts)) in enumerate(PAIRS.items()):
        command = ("sft", "train")[index % 2]
        given = [command, *TINY, "warm_start.file=pairs.jsonl"]
        yield Case(f"{command}: demonstrations: {name}", given, parts, write("pairs.jsonl", content))
    for name, (content, part) in STUDIES.items():
        yield Case(f"study: {name}", ["study", "mine.yaml", "--out", "o"], [part], write("mine.yaml", content))

    yield Case("sft: no demonstrations", ["sft", *TINY, "warm_start.file=no.jsonl"], ["no.jsonl cannot be read"])
    yield Case("sft: no Parquet", ["sft", *TINY, "warm_start.file=p.parquet"], ["p.parquet cannot be read"], write(
        "p.parquet", "x"))  # fmt: skip
    yield Case(
        "sft: all held out", ["sft", *TINY, "warm_start.file=pairs.jsonl", "warm_start.held_out=1"], ["leaves nothing"]
    )
    yield Case(
        "sft: positions", ["sft", *TINY, "warm_start.max_tokens=9999"], ["warm_start.max_tokens=9999", "positions"]
    )
    yield Case("sft: resume nothing", ["sft", "--resume", ""], ["--resume is empty"])
    yield Case("sft: resume no run", ["sft", "--resume", "nowhere"], ["run 'nowhere'"])
    yield Case("sft: resume a finished one", ["sft", "--resume", "done"], ["has finished", "model.path="])
    yield Case(
        "eval: the file of --file is not there", ["eval", "model", *TINY, "--file", "no.csv"], ["no.csv cannot be read"]
    )
    yield Case("eval: no workers", ["eval", "model", *TINY, "--actors", "0"], ["equal to 1"])
    yield Case("sft: a folder of them", ["sft", *TINY, "warm_start.file=model"], ["model cannot be read"])
    yield Case("train: benchmark", ["train", *TINY, "task.file=pairs.jsonl"], ["pairs.jsonl, row 1"])
    yield Case("eval: no benchmark", ["eval", "model", *TINY, "task.file=no.csv"], ["no.csv cannot be read"])
    yield Case("train: device", ["train", *TINY, "model.device=quantum"], ["model.device='quantum'"])
    for device in ("xpu", "hpu"):  # what torch raises for these is no RuntimeError
        yield Case(f"train: device {device}", ["train", *TINY, f"model.device={device}"], [f"model.device='{device}'"])
    yield Case("train: host", ["train", *TINY, "metrics.host=no.such.host.invalid"], ["metrics.host"])
    yield Case("train: odd host", ["train", *TINY, f"metrics.host={'a' * 80}.b"], ["metrics.host"])
    yield Case("train: another's host", ["train", *TINY, "metrics.host=192.0.2.77"], ["192.0.2.77"])
    used = write("kept/new/step-000120/manifest.json", "{}")
    given = ["train", *TINY, "run.name=new", "run.checkpoints=kept"]
    yield Case("train: another's checkpoints", given, ["kept/new holds checkpoints of another run", "run.name"], used)
    yield Case("train: store", ["train", *TINY, "run.checkpoints=nonsense://b/x"], ["nonsense://b/x"])
    for command in ("train", "sft"):
        yield Case(f"{command}: run exists", [command, *TINY, "run.name=done"], ["runs/done exists", "done-2 is free"])
    yield Case("sft: root is a file", ["sft", *TINY, "run.root=good.yaml"], ["good.yaml", "choose another run.root"])
    yield Case("sft: root unwritable", ["sft", *TINY, "run.root=/proc/nowhere"], ["cannot be made", "run.root"])

    resume = ["train", "--resume"]
    yield Case("resume: nothing", [*resume, ""], ["--resume is empty"])
    yield Case("resume: no run", [*resume, "nowhere"], ["run 'nowhere'", "runs: done"])
    yield Case("resume: a file", [*resume, "good.yaml"], ["run 'good.yaml'"])
    yield Case("resume: no config", [*resume, "model"], ["is no run directory", "config.yaml"])
    bad = write("runs/done/config.yaml", "task: [")
    yield Case("resume: broken config", [*resume, "done"], ["runs/done/config.yaml"], bad)
    other = [*resume, "done", "learner.learning_rate=0.5", "task.seed=9"]
    yield Case("resume: another", other, ["learner.learning_rate: 0.0001 -> 0.5", "task.seed: 0 -> 9", "leave these"])
    yield Case("resume: file differs", [*resume, "done", "-c", "other.yaml"], ["model.layers: 1 -> "], write(
        "other.yaml", GOOD))  # fmt: skip
    yield Case("resume: unknown key", [*resume, "done", "learner.stpes=1"], ["did you mean learner.steps?"])
    finished = write("runs/done/evaluation.json", '{"steps": 9}')
    yield Case("resume: finished", [*resume, "done"], ["has finished its 9 steps", "learner.steps=N"], finished)
    lock_folder = lambda: Path("runs/done/lock/x").mkdir(parents=True)  # noqa: E731
    yield Case("resume: no lock", [*resume, "done"], ["cannot be locked"], lock_folder)

    yield Case("replay: no run", ["replay", "nowhere", "7"], ["run 'nowhere'"])
    yield Case("replay: no config", ["replay", "model", "7"], ["is no run directory", "config.yaml"])
    yield Case("replay: broken config", ["replay", "done", "7"], ["config.yaml"], bad)
    yield Case("replay: no number", ["replay", "done", "seven"], ["Invalid value"])
    yield Case("replay: no such group", ["replay", "done", "8"], ["group 8 is not in the files", "segments: 7"])
    yield Case("replay: no groups", ["replay", "done", "7"], ["groups that are: none"], remove("runs/done/segments"))
    for name, change in {
        "cut": lambda data: data[:-30],
        "flipped": flip,
        "empty": lambda data: b"",
        "text": lambda data: b"hello",
    }.items():
        yield Case(f"replay: segment {name}", ["replay", "done", "7"], ["not readable"], edit(SEGMENT, change))
    for name, changes in {
        "no rows": {"rows_kept": 0},
        "no prompt": {"prompt_ids": []},
        "long prompt": {"prompt_ids": [4] * 500},
        "short": {"entropy": [0.0]},
        "token": {"completion_ids": [99] * 16},
        "steps": {"reveal_step": [99] * 16},
        "versions": {"token_version": [-1] * 16},
    }.items():
        yield Case(f"replay: group: {name}", ["replay", "done", "7"], ["run failed"], damaged_group(**changes), 1)
    weights = ["replay", "done", "7", "--weights"]
    yield Case("replay: no weights", ["replay", "done", "7"], ["--weights FOLDER"], remove("runs/done/warm_start"))
    yield Case("replay: weights missing", [*weights, "nowhere"], ["nowhere: no config.json"])
    yield Case("replay: weights broken", [*weights, "model"], ["is damaged"], edit(
        "model/model.safetensors", lambda data: data[:-9]))  # fmt: skip
    yield Case("replay: tolerance", ["replay", "done", "7", "--tolerance", "-1"], ["tolerance"])

    generate = ["generate", "model"]
    for name, given, part in [
        ("no prompt", [""], "prompt is empty"),
        ("unknown characters", ["hello"], "does not know"),
        ("no tokens", ["1", "--tokens", "0"], "0"),
        ("too many tokens", ["1", "--tokens", "1000"], "1000"),
        ("block", ["1", "--block", "5"], "5"),
        ("rule", ["1", "--rule", "luck"], "rule='luck' is unknown"),
        ("cache", ["1", "--cache", "all"], "cache='all' is unknown"),
        ("threshold", ["1", "--threshold", "nan"], "threshold=nan"),
        ("temperature", ["1", "--temperature", "-1"], "temperature=-1"),
        ("seed", ["1", "--seed", str(1 << 64)], "64 bits"),
        ("device", ["1", "--device", "quantum"], "quantum"),
    ]:
        yield Case(f"generate: {name}", [*generate, *given], [part])

    yield Case("eval: out is a file", ["eval", "model", *TINY, "--out", "good.yaml"], ["--out good.yaml"])
    yield Case("eval: out unwritable", ["eval", "model", *TINY, "--out", "/proc/nowhere/x"], ["--out /proc"])
    yield Case("eval: against nothing", ["eval", "model", *TINY, "--against", "nowhere"], ["nowhere: no config.json"])

    controller = "runs/done/controller.json"
    yield Case("scale: no run", ["scale", "nowhere", "--actors", "2"], ["run 'nowhere'"])
    yield Case("scale: not started", ["scale", "done", "--actors", "2"], ["controller.json"])
    yield Case("scale: no number", ["scale", "done", "--actors", "many"], ["Invalid value"])
    for name, content in {
        "broken": "{",
        "a list": "[]",
        "no address": '{"namespace": "x"}',
        "a local Ray": '{"ray_address": "local", "namespace": "x"}',
        "a number": '{"ray_address": 5, "namespace": "x"}',
        "not UTF-8": "\udcff",
    }.items():
        data = content.encode(errors="surrogateescape")
        yield Case(f"scale: {name}", ["scale", "done", "--actors", "2"], ["controller.json"], write(controller, data))
    gone = write(controller, '{"ray_address": "127.0.0.1:1", "namespace": "x"}')
    yield Case("scale: gone", ["scale", "done", "--actors", "2"], ["not going any more"], gone)

    for name in ("status", "stop", "report", "view"):
        yield Case(f"{name}: no run", [name, "nowhere"], ["run 'nowhere'"])
    yield Case("stop: gone", ["stop", "done"], ["not going any more"], gone)
    yield Case("view: no group", ["view", "done", "--group", "7"], ["done", "group"])
    yield Case("view: no number", ["view", "done", "--group", "best"], ["Invalid value"])
    yield Case("score: no file", ["score", "--task", "sudoku", "nowhere.jsonl"], ["nowhere.jsonl is no file or folder"])
    yield Case("score: no task", ["score", "--task", "chess", "nowhere.jsonl"], ["chess"])
    yield Case("score: no field", ["score", "--task", "sudoku", "a.jsonl"], ["row 1", "completion"], write(
        "a.jsonl", '{"question": "x"}'))  # fmt: skip
    yield Case("convert: no folder", ["convert", "nowhere", "out"], ["nowhere: no config.json there"])
    yield Case("export: no folder", ["export", "nowhere", "out"], ["nowhere: no config.json there"])
    yield Case("plan: no file", ["plan", "nowhere.yaml"], ["config nowhere.yaml: no such file"])
    yield Case("doctor: argument", ["doctor", "x"], ["unexpected extra argument"])
    yield Case("study: unknown", ["study", "luck"], ["known studies"])
    yield Case("study: path", ["study", "../../etc/passwd"], ["no file"])
    yield Case("study: out is a file", ["study", "study.yaml", "--out", "good.yaml"], ["another --out"])
    yield Case("study: --seeds", ["study", "study.yaml", "--seeds", "0"], ["seeds"])
    yield Case("study: result", ["study", "study.yaml", "--out", "o", "--report"], ["one-seed0.json"], write(
        "o/study/one-seed0.json", "{"))  # fmt: skip
    yield Case("bench: unknown", ["bench", "luck"], ["benchmark 'luck' is unknown; known: all, async"])
    yield Case("bench: path", ["bench", "../main"], ["is unknown"])
    yield Case("bench: async configured", ["bench", "async", "learner.steps=3"], ["takes no configuration"])
    yield Case("bench: engine configured", ["bench", "engine", "-c", "good.yaml"], ["takes no configuration"])
    yield Case("bench: seeds", ["bench", "main", "--seeds", "0"], ["seeds"])
    yield Case("metrics: argument", ["metrics", "x"], ["unexpected extra argument"])
    yield Case("config: argument", ["config", "x"], ["unexpected extra argument"])
    yield Case("no such command", ["trian"], ["trian"])
    yield Case("no such option", ["train", "--confg", "x"], ["--confg"])


CASES = [*configurations(), *inputs()]
LIMITS = dict(limits())


def test_there_are_enough_and_each_once() -> None:
    names = [case.name for case in [*CASES, *chain(*LIMITS.values())]]
    assert len(names) > 500
    assert sorted(set(names)) == sorted(names)
    covered = {case.arguments[0] for case in CASES}
    assert covered >= set(KNOWN)


def check(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = ended(case.arguments, monkeypatch, capsys)
    assert code == case.code, error
    usage = error.startswith("Usage:")  # the command line's own errors take some lines
    assert usage or error.startswith(("error: ", "run failed: "))
    assert usage or error.count("\n") == 1
    assert "Traceback" not in error
    assert "SESAME" not in error
    for part in case.parts:
        assert part in error


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_what_is_wrong_is_named_and_nothing_is_lost(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.before()
    before = snapshot(place)
    check(case, monkeypatch, capsys)
    assert snapshot(place) == before


@pytest.mark.parametrize("key", LIMITS)
def test_every_key_refuses_what_is_beyond_it(
    key: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(place)
    for case in LIMITS[key]:
        check(case, monkeypatch, capsys)
    assert snapshot(place) == before


def test_a_run_that_is_going_is_left_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys that may change on resume are not written under another driver's hands."""
    before = snapshot(place)
    with FileLock(place / "runs/done/lock"):
        code, error = ended(["train", "--resume", "done", "learner.steps=99"], monkeypatch, capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "is going on in another process" in error
    assert snapshot(place) == before


def test_a_dry_run_of_a_resumption_changes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(place)
    monkeypatch.setattr(sys, "argv", ["diffpo", "train", "--resume", "done", "--dry-run", "learner.steps=99"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "steps: 99" in capsys.readouterr().out
    assert snapshot(place) == before


def test_a_full_disk_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(learner.warm_start, "supervised", full)
    assert ended(["sft", *TINY], monkeypatch, capsys) == (
        1,
        "run failed: [Errno 28] No space left on device: 'model.safetensors'\n",
    )


def test_demonstrations_are_asked_of_those_who_learn_from_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [*TINY, "warm_start.file=lost.jsonl", "sampler.threshold.gamma_init=1.5"]
    assert ended(["eval", "model", *lost], monkeypatch, capsys) == (0, "")
    preflight(load_config(None, [*lost, "model.path=model"]))
    for arguments in (["train", *lost], ["sft", *lost], ["sft", *lost, "model.path=model"]):
        code, told = ended(arguments, monkeypatch, capsys)
        assert (code, "warm_start.file=lost.jsonl cannot be read" in told) == (2, True)


# -- what a run finds when it goes on ----------------------------------------------------------------------------------


class Remote:
    """Calls of a Ray actor, as a list."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(lambda *arguments: self.calls.append((name, arguments)))

        return Method


class Link:
    """A replay buffer that takes everything."""

    def rewind(self, index: int, step: int) -> int:
        return 1000 + step

    def publish(self, *_: Any) -> None:
        pass


class Trained:
    """A trainer that knows only the step of its checkpoint."""

    steps = 0

    def restore(self, folder: Path) -> None:
        self.steps = int((folder / "state").read_text())

    def weights(self) -> None:
        return None

    def base(self) -> list:
        return []

    def gauges(self) -> dict[str, float]:
        return {}


def learner_actor(root: Path) -> tuple[LearnerActor, Remote, CheckpointStore]:
    config = load_config(None, [*TINY, f"run.root={root}"])
    controller = Remote()
    actor = LearnerActor(
        config=config, directory=config.run_directory, controller=controller, make=lambda *_: Trained()  # type: ignore
    )  # fmt: skip
    store = actor._checkpoints
    for step in (3, 6):
        draft = store.begin(step)
        (draft.path / "state").write_text(str(step))
        draft.commit(version=step, journal_index=step)
    return actor, controller, store


@pytest.mark.parametrize("file", ["state", MANIFEST])
@pytest.mark.parametrize("change", [flip, lambda data: data[:-1], lambda data: b""], ids=["flip", "cut", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    tmp_path: Path, file: str, change: Callable[[bytes], bytes]
) -> None:
    actor, controller, store = learner_actor(tmp_path)
    path = Path(store.name, "step-000006", file)
    path.write_bytes(change(path.read_bytes()))
    before = snapshot(tmp_path)
    assert actor._begin(Link(), CheckpointWriter(store, keep=2)) == 1003  # type: ignore[arg-type]
    [(_, (warning,))] = [call for call in controller.calls if call[0] == "warn"]
    assert "step-000006" in warning
    assert "step-000003 is used in its place" in warning
    assert snapshot(tmp_path) == before


def test_damaged_checkpoints_alone_end_the_run_and_stay(tmp_path: Path) -> None:
    actor, _, store = learner_actor(tmp_path)
    for step in (3, 6):
        Path(store.name, f"step-00000{step}", "state").write_text("?")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointDamaged, match=r"no sound checkpoint: .*step-000006.*step-000003.*restore one") as it:
        actor._begin(Link(), CheckpointWriter(store, keep=2))  # type: ignore[arg-type]
    assert "\n" not in str(it.value)
    assert snapshot(tmp_path) == before


def recovering(folder: Path) -> None:
    async def run() -> None:
        recover(SegmentStore(folder / "segments", memory_bytes=0), CheckpointStore(folder / "checkpoints"))

    asyncio.run(run())


def test_a_gap_in_the_journal_is_named(tmp_path: Path) -> None:
    notes = {"start": 5, "end": 9, "entries": [], "life": 0, "counters": {}, "drained": [], "discarded": []}
    SegmentFolder(tmp_path / "segments").write([], notes)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"breaks off: entries 0 to 5 are in no file; restore the missing segment"):
        recovering(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", [flip, lambda data: b"ARROW1" + data[6:-40] + b"ARROW1"], ids=["flip", "inner"])
def test_a_damaged_segment_is_named_and_stays(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    folder = SegmentFolder(tmp_path / "segments")
    notes = {"start": 0, "entries": [], "life": 0, "counters": {}, "drained": [], "discarded": []}
    folder.write([FinishedGroup(1, 1, b"x" * 5000, 0.0, 0, 4)], notes)
    path = tmp_path / "segments/segment-00000000.arrow"
    path.write_bytes(change(path.read_bytes()))
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"segment-00000000\.arrow is missing or damaged: .*; restore it from a copy"):
        recovering(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_damaged_journal_gives_way_to_an_older_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        draft = store.begin(step)
        (draft.path / JOURNAL_FILE).write_bytes(encode_journal([]))
        draft.commit(version=step, journal_index=0, facts={"life": 0, "counters": {}, "drained": []})
    (tmp_path / "checkpoints/step-000002" / JOURNAL_FILE).write_bytes(b"?")
    before = snapshot(tmp_path)
    with caplog.at_level(logging.WARNING):
        recovering(tmp_path)
    assert "an older journal is used" in caplog.text
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_manifest_that_leads_outside_is_damaged(tmp_path: Path, name: str) -> None:
    from common.checkpoint_manifest import digest, encode

    _, _, store = learner_actor(tmp_path)
    path = Path(store.name, "step-000006", MANIFEST)
    manifest = json.loads(path.read_text())
    described = {key: value for key, value in manifest.items() if key != "digest"}
    described["files"] = {name: {"bytes": 0, "sha256": ""}}
    path.write_bytes(encode({**described, "digest": digest(described)}))
    assert [one.step for one in store.checkpoints()] == [3]
    [fault] = store.damaged()
    assert "outside its folder" in fault


def test_checkpoints_refuse_what_is_no_uri() -> None:
    with pytest.raises(UserError, match="give a local folder"):
        CheckpointStore("nonsense://bucket/x")


def test_a_name_that_another_run_takes_in_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken:
        def options(self, **_: object) -> Self:
            return self

        def remote(self, **_: object) -> None:
            raise ActorAlreadyExistsError("controller")

    monkeypatch.setattr(driver.ray, "remote", lambda _: Taken())
    monkeypatch.setattr(driver, "on_this_node", lambda: None)  # there is no Ray here
    with pytest.raises(UserError, match=r"a run of the name new is going .*; choose another run\.name"):
        driver._follow(load_config(None, TINY), RunDirectory(tmp_path), lambda *_: None, POLICY)


def test_a_local_ray_without_its_vital_parts_ends_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        def dead_processes(self) -> list[tuple[str, object]]:
            return [(kind, object()) for kind in dead]

    class Waits:
        """A handle whose calls are never answered."""

        def __getattr__(self, name: str) -> Self:
            return self

        def __call__(self, *_: object, **__: object) -> Self:
            return self

    def wait(*_: object, **__: object) -> tuple[list, list]:
        if len(dead) > 1:
            dead.append("raylet")
        dead.append("log_monitor")
        return [], []

    dead: list[str] = []
    monkeypatch.setattr(ray_connection.ray_worker, "_global_node", Node())
    monkeypatch.setattr(driver.ray, "remote", lambda _: Waits())
    monkeypatch.setattr(driver, "on_this_node", lambda: None)
    monkeypatch.setattr(driver.ray, "wait", wait)
    with pytest.raises(RunError, match=r"the local Ray is gone \(raylet\): killed"):
        driver._follow(load_config(None, TINY), RunDirectory(tmp_path), lambda *_: None, POLICY)
    assert dead.count("log_monitor") == 3, "it can do without that one"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["rollout.actors=4"], r"rollout\.actors=4 x 1 CPUs \+ learner 1 exceed this machine's 4 CPUs; lower"),
        (
            ["rollout.actors=2", "rollout.reward_cpus=1"],
            r"actors=2 x \(1 \+ rollout\.reward_cpus=1\) CPUs \+ learner 1 ",
        ),
        (
            ["rollout.reward_cpus=1", "rollout.reward_labels={gpu: none}"],
            r"labelled \{'gpu': 'none'\}, and a local Ray has",
        ),
    ],
)
def test_a_local_ray_is_not_asked_for_what_it_cannot_give(given: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        driver._check_room(load_config(None, ["task.name=sudoku", *given]), {"CPU": 4.0})
