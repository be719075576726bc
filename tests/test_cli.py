"""Command line: exit codes, one-line errors, what is refused before anything starts, and sft followed by eval.

`main()` runs in this process (importing torch anew costs seconds); only what is loaded is asked of a fresh one.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from learner_fixtures import MODEL

import learner.warm_start
from common.config import ThresholdConfig
from common.config_file import load_config
from common.errors import UserError
from common.metrics import CATALOGUE, PREFIX
from common.policy_loading import build_policy
from learner.cli import main
from learner.preflight import preflight
from learner.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "deploy/configs/sudoku.yaml")
TINY = [
    *("task.name=sudoku", "model.hidden_size=16", "model.layers=1", "model.heads=2", "model.intermediate_size=32"),
    *("warm_start.steps=3", "warm_start.batch_size=4", "warm_start.threads=1", "run.name=tiny"),
    *("sampler.max_prompt_tokens=16", "evaluation.prompts=16", "evaluation.gammas=[0,3]"),
    *("evaluation.confidences=[0.9]", "evaluation.tokens_per_step=[4]"),
]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Diffpo = Callable[..., Ended]


@pytest.fixture
def diffpo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Ended]]:
    """Runs `diffpo` with some arguments inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "1" if name.startswith("HF") else "error"))

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["diffpo", *arguments])
        capsys.readouterr()  # what the test itself wrote
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(1)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def check_refused(ended: Ended, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr, no run directory, no Ray."""
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    for part in parts:
        assert part in ended.err
    assert not Path("runs").exists()
    assert not ray.is_initialized()


def test_help_and_dry_run_load_nothing_heavy() -> None:
    code = f"""
import sys
from learner.cli import main
from learner.run_directory import RunDirectory
for arguments in (["--help"], ["train", "--help"], ["train", "--dry-run", "-c", {CONFIG!r}]):
    sys.argv = ["diffpo", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
print("loaded:", *(name for name in ("torch", "ray", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    for command in ("train", "sft", "eval", "metrics"):
        assert f" {command} " in done.stdout
    assert "task:" in done.stdout


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_dry_run_prints_what_loads_to_the_same_configuration(diffpo: Diffpo, command: str, tmp_path: Path) -> None:
    ended = diffpo(command, "--dry-run", "--config", CONFIG, "learner.steps=7", "learner.learning_rate=3e-6")
    assert (ended.code, ended.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(ended.out)
    expected = load_config(CONFIG, ["learner.steps=7", "learner.learning_rate=3e-6"])
    assert load_config(tmp_path / "printed.yaml") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


@pytest.mark.parametrize("command", [["train"], ["sft"], ["eval", "folder"]])
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-c", CONFIG, "learner.stpes=3"], "did you mean learner.steps?"),
        (["-c", CONFIG, "learner.steps=0"], "learner.steps"),
        (["-c", CONFIG, "learner.steps"], "key.sub=value"),
        (["-c", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([], "task is missing"),
    ],
)
def test_a_bad_configuration_ends_with_two_and_one_line(
    diffpo: Diffpo, command: list[str], arguments: list[str], part: str
) -> None:
    check_refused(diffpo(*command, *arguments), part)


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--confg", "x"], ["bench", "main", "--seeds", "0"]])
def test_a_bad_command_line_ends_with_two(diffpo: Diffpo, arguments: list[str]) -> None:
    assert diffpo(*arguments).code == 2


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sampler.max_prompt_tokens=8"], ["train example 0: prompt of 16 tokens", "sampler.max_prompt_tokens=8"]),
        (["sampler.max_completion_tokens=8"], ["completion of 16 tokens", "sampler.max_completion_tokens=8"]),
        (["model.path=nowhere"], ["model nowhere: no config.json there"]),
        (["warm_start.file=nowhere.jsonl"], ["warm_start.file=nowhere.jsonl cannot be read"]),
        (["task.file=nowhere.csv"], ["nowhere.csv"]),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    diffpo: Diffpo, command: str, overrides: list[str], parts: list[str]
) -> None:
    check_refused(diffpo(command, *TINY, *overrides), *parts)


LONG = "of 40 tokens exceeds sampler.max_prompt_tokens=32"


@pytest.mark.parametrize(
    ("long", "overrides", "parts"),
    [
        ("data", [], ["train example", LONG]),
        ("test_data", ["evaluation.prompts=99"], ["test example 98", LONG]),
        ("test_data", [], []),
        (None, ["warm_start.held_out=9"], ["warm_start.held_out=9 exceeds the 1 rows of the validation split"]),
        (None, [], []),
    ],
)
def test_the_questions_of_data_that_will_be_asked_are_looked_at(
    tmp_path: Path, long: str | None, overrides: list[str], parts: list[str]
) -> None:
    """The long one is the last of many: training, or the final evaluation, would meet it after hours."""
    questions = {"data": range(98), "validation_data": range(98, 99), "test_data": range(99, 197)}
    for name, numbers in questions.items():
        texts = [f"{number:030}" for number in numbers] + ["9" * 40] * (name == long)
        lines = [json.dumps({"question": text, "answer": "#### 1"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = [f"task.{name}={tmp_path / name}.jsonl" for name in questions]
    settings = ["sampler.max_prompt_tokens=32", "evaluation.prompts=98", "evaluation.drift_prompts=1"]
    config = load_config(None, ["task.name=gsm8k", "task.prompt_style=compact", *given, *settings, *overrides])
    if not parts:
        preflight(config)
        return
    with pytest.raises(UserError) as caught:
        preflight(config)
    assert all(part in str(caught.value) for part in parts)


def test_a_metrics_port_in_use_is_refused_before_anything_starts(diffpo: Diffpo, taken_port: int) -> None:
    ended = diffpo("train", *TINY, f"metrics.port={taken_port}")
    check_refused(ended, f"metrics.port={taken_port} on 127.0.0.1", "set metrics.port=0")


@pytest.mark.parametrize("command", [["sft"], ["eval", "nowhere"]])
def test_a_port_held_by_a_training_run_does_not_stop_other_commands(
    diffpo: Diffpo, taken_port: int, command: list[str]
) -> None:
    assert "metrics.port" not in diffpo(*command, *TINY, f"metrics.port={taken_port}").err


def saved_model(folder: Path, **special: str | None) -> str:
    """A tiny model whose tokenizer configuration is changed; returns the folder."""
    build_policy(MODEL, ThresholdConfig(), alphabet="01234", seed=0).save(folder)
    for name, changes in (("tokenizer_config.json", special), ("config.json", {"eos_token_id": None})):
        path = folder / name
        described = json.loads(path.read_text()) | changes
        if name == "tokenizer_config.json":
            described = {key: value for key, value in described.items() if value is not None}
        path.write_text(json.dumps(described))
    return str(folder)


@pytest.mark.parametrize(
    ("special", "part"),
    [
        ({"mask_token": None}, "no MASK token; set tokenizer.mask_token"),
        ({"eos_token": None}, "no EOS token; set tokenizer.eos_token"),
        ({"mask_token": "<pad>"}, "MASK and PAD are both id 0"),
        ({"mask_token": "<eos>"}, "MASK and EOS are both id 1"),
    ],
)
def test_a_tokenizer_without_its_own_mask_is_refused(
    diffpo: Diffpo, tmp_path: Path, special: dict[str, str | None], part: str
) -> None:
    folder = saved_model(tmp_path / "model", **special)
    for command in (["train", f"model.path={folder}"], ["eval", folder]):
        check_refused(diffpo(*command, *TINY), part)


def test_a_model_with_too_few_positions_is_refused(diffpo: Diffpo, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    ended = diffpo("sft", *TINY, f"model.path={folder}", "sampler.max_completion_tokens=56")
    check_refused(ended, "= 72 exceeds the model's 64 positions")


def test_sft_writes_a_policy_that_eval_measures(diffpo: Diffpo, tmp_path: Path) -> None:
    trained = diffpo("sft", *TINY)
    assert trained.code == 0
    folder = tmp_path / "runs/tiny/warm_start"
    assert str(folder) in trained.out
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["warm_start_steps"] for row in rows] == [1.0, 2.0, 3.0]
    assert all(row["kind"] == "warm_start" and row["warm_start_loss"] > 0 for row in rows)

    measured = diffpo("eval", str(folder), *TINY, "--out", "results")
    assert measured.code == 0
    assert (tmp_path / "results/pareto.png").stat().st_size > 1000
    results = json.loads((tmp_path / "results/evaluation.json").read_text())
    assert (results["task"], results["prompts"], results["split"]) == ("sudoku", 16, "test")
    settings = [row["setting"] for row in results["settings"]["policy"]]
    assert settings == ["eb gamma=0", "eb gamma=3", "confidence 0.9", "top-k 4", "learned, greedy", "learned, sampled"]
    by_name = {row["setting"]: row for row in results["settings"]["policy"]}
    # an answer may end before its 16 positions are revealed, never after 16 forwards
    assert 1 <= by_name["top-k 4"]["nfe"] <= 4
    assert 1 <= by_name["eb gamma=0"]["nfe"] <= 16
    for name in settings:
        assert name in measured.out
    answers = pq.read_table(tmp_path / "results/answers.parquet").to_pylist()
    assert len(answers) == 16 * len(settings)
    for name in settings:
        rows = [row for row in answers if row["setting"] == name]
        assert [row["index"] for row in rows] == list(range(16))
        assert sum(row["nfe"] for row in rows) / 16 == by_name[name]["nfe"]
    samples = [json.loads(line) for line in (tmp_path / "results/samples_policy.jsonl").read_text().splitlines()]
    assert [sample["resps"] for sample in samples] == [[[row["completion"]]] for row in answers]
    assert samples[17]["arguments"][0][0] == answers[17]["prompt"] == answers[1]["prompt"]
    assert not (tmp_path / "results/shards").exists()

    again = diffpo("sft", *TINY)
    assert again.code == 2
    assert again.err.count("\n") == 1
    assert "runs/tiny exists" in again.err
    assert "run.name=tiny-2 is free" in again.err
    assert sorted(os.listdir(tmp_path / "runs")) == ["tiny"]


def test_an_sft_that_was_killed_goes_on(diffpo: Diffpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n % 5}"}, {"role": "assistant", "content": "21" * n}]}
        for n in range(9)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*TINY, "warm_start.file=chat.jsonl", "warm_start.max_tokens=16", "warm_start.checkpoint_every=1"]
    append = RunDirectory.append_metrics

    def killed(self: RunDirectory, row: dict[str, float]) -> None:
        if row["warm_start_steps"] == 2:
            raise KeyboardInterrupt
        append(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "append_metrics", killed)
        assert diffpo("sft", *given).code == 130
    again = diffpo("sft", *given)
    assert "diffpo sft --resume" in again.err
    resumed = diffpo("sft", "--resume", "tiny")
    assert (resumed.code, resumed.err) == (0, "")
    written = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["warm_start_steps"] for row in written] == [1.0, 2.0, 3.0]
    assert written[-1]["warm_start_skipped"] > 0
    assert "has finished" in diffpo("sft", "--resume", "tiny").err


def test_an_evaluation_of_a_file_takes_all_its_rows(diffpo: Diffpo, tmp_path: Path) -> None:
    (tmp_path / "puzzles.csv").write_text(
        "Puzzle,Solution\n1234341221434320,1234341221434321\n1234341221430021,1234341221434321\n"
    )
    saved_model(tmp_path / "model")
    tiny = [item for item in TINY if not item.startswith("evaluation.prompts")]
    ended = diffpo("eval", "model", *tiny, "--file", "puzzles.csv")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads((tmp_path / "evaluation/evaluation.json").read_text())["prompts"] == 2


def test_an_evaluation_of_questions_that_it_could_train_on(diffpo: Diffpo, tmp_path: Path) -> None:
    """Nothing learns here, so none of them need be left; and it does not scale itself."""
    rows = [json.dumps({"question": f"{number}+1=", "answer": f"#### {number + 1}"}) for number in range(20)]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    (tmp_path / "own.yaml").write_text(
        "task: {name: gsm8k, data: questions.jsonl}\nrollout: {actors: 2, min_actors: 2, max_actors: 4}\n"
    )
    command = ["eval", "FOLDER", "--file", "questions.jsonl", "-c", "own.yaml", "--actors", "1", "--dry-run"]
    ended = diffpo(*command)
    assert (ended.code, ended.err) == (0, "")
    (tmp_path / "resolved.yaml").write_text(ended.out)
    config = load_config(tmp_path / "resolved.yaml")
    assert (config.model.path, config.rollout.actors, config.evaluation.prompts) == ("FOLDER", 1, 20)
    (tmp_path / "without.yaml").write_text(diffpo("eval", "FOLDER", "-c", CONFIG, "--dry-run").out)
    assert load_config(tmp_path / "without.yaml").model.path == "FOLDER"


def test_a_command_that_succeeds_writes_nothing_to_standard_error(diffpo: Diffpo) -> None:
    assert diffpo("sft", *TINY).err == ""


def test_a_loss_that_is_not_finite_ends_with_one(diffpo: Diffpo) -> None:
    ended = diffpo("sft", *TINY, "warm_start.learning_rate=1e30", "warm_start.autocast=false")
    assert ended.code == 1
    assert ended.err.startswith(("run failed: warm start: loss ", "run failed: warm start: gradient norm "))
    assert ended.err.count("\n") == 1


def test_a_model_beyond_the_memory_is_one_line(diffpo: Diffpo) -> None:
    ended = diffpo("sft", *TINY, f"model.hidden_size={10**12}")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("run failed: too little memory (")


def test_ctrl_c_ends_with_130(diffpo: Diffpo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learner.warm_start, "supervised", interrupted)
    assert diffpo("sft", *TINY).code == 130


def test_metrics_prints_every_name_of_the_catalogue(diffpo: Diffpo) -> None:
    ended = diffpo("metrics")
    assert ended.code == 0
    for name in CATALOGUE:
        assert f"`{PREFIX}{name}" in ended.out


def test_a_demonstration_of_a_file_beyond_the_limit_is_refused_before_anything_starts(
    diffpo: Diffpo, tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "1", "completion": "1" * 17}) + "\n")
    check_refused(diffpo("sft", *TINY, "warm_start.file=pairs.jsonl"), "17 tokens")


def test_a_device_that_does_not_exist_is_refused(diffpo: Diffpo) -> None:
    check_refused(diffpo("sft", *TINY, "model.device=quantum"), "model.device")
