"""`diffpo score`: real answers of every task, other names and formats, rows that cannot be read or scored."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from misbehaving_task import HangingTask

from common.config import RolloutConfig
from common.errors import RunError, UserError
from common.tasks import TASK_CONFIGS, Gsm8kConfig, SudokuConfig, build_task
from learner.answer_file import STOPS, Answer, check_out, field_names, judge, read_answers, until_stop
from learner.cli import main

ROOT = Path(__file__).parents[1]
SAMPLES = Path(__file__).parent / "llada_answers"
RIGHT = {"gsm8k": 17, "math500": 9, "countdown": 2, "sudoku": 0}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diffpo", "score", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("task", RIGHT)
def test_real_answers_of_every_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "verdicts.parquet", SAMPLES / f"{task}.jsonl"
    assert run(monkeypatch, "--task", task, str(file), "--out", str(out)) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = pq.read_table(out).to_pylist()
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    assert [row["row"] for row in found] == [f"{file}, row {number}" for number in range(1, len(rows) + 1)]
    assert sum(row["correct"] for row in found) == RIGHT[task]
    assert all(row["error"] is None for row in found)
    if task == "sudoku":
        ours = [round(row["cells"] * given["empty_cells"]) for row, given in zip(found, rows, strict=True)]
        assert ours == [row["correct_cells"] for row in rows]
    printed = capsys.readouterr().out
    assert f"{RIGHT[task]} of {len(rows)} correct" in printed
    assert set(build_task_components(task)) <= set(printed.split())


def build_task_components(task: str) -> tuple[str, ...]:
    from common.config_file import load_config

    return build_task(load_config(None, [f"task.name={task}"]).task).components


def test_fields_have_the_names_that_are_given(tmp_path: Path) -> None:
    file = tmp_path / "answers.csv"
    file.write_text('prompt,text,truth\n"How many, in all?","<answer>\n4\n</answer>",4\n')
    names = field_names("question=prompt,completion=text,ground_truth=truth")
    task = build_task(Gsm8kConfig())
    assert [verdict.correct for verdict in judge(task, read_answers(task, file, names), RolloutConfig(), print)] == [
        True
    ]
    for wrong in ("question", "question=", "answer=text", "question=a,,"):
        with pytest.raises(UserError, match="is not of the form NAME=FIELD"):
            field_names(wrong)


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("gsm8k", {"question": "a", "ground_truth": 3}, "no value in field 'completion'; the row has 'question', "),
        ("gsm8k", {"question": "a", "completion": "b"}, "no value in field 'ground_truth'"),
        ("gsm8k", {"completion": "b", "ground_truth": 3}, "name the field with --fields question=FIELD"),
        ("gsm8k", {"question": "a", "completion": None, "ground_truth": 3}, "field 'completion' holds nothing; mend"),
        ("gsm8k", {"question": "a", "completion": 3, "ground_truth": 3}, "completion '3' is no text"),
        ("gsm8k", {"question": "a", "completion": "b", "ground_truth": "x"}, "answer 'x' is no number"),
        ("math500", {"question": "a", "completion": "b", "ground_truth": []}, "is neither text nor a number"),
        ("countdown", {"question": "a", "completion": "b", "ground_truth": 3}, "is not [[numbers], target]"),
        ("countdown", {"question": "a", "completion": "b", "ground_truth": [[1, 0], 3]}, "with positive integers"),
        ("sudoku", {"question": "a", "completion": "b", "ground_truth": "1234"}, "is no puzzle and its solution"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    task: str,
    row: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "answers.jsonl"
    good = json.loads((SAMPLES / f"{task}.jsonl").read_text().splitlines()[0])
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    assert run(monkeypatch, "--task", task, str(file)) == 2
    printed = capsys.readouterr()
    assert f"{file}, row 3: " in printed.err
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_rewards_that_fail_cost_their_rows_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "failing_rewards.py").write_text(
        "import os, time\n"
        "def reward(completion):\n"
        "    if completion == 'hang': time.sleep(60)\n"
        "    if completion == 'die': os._exit(3)\n"
        "    if completion == 'text': return 'good'\n"
        "    return 1 / int(completion)\n"
    )
    rows = [
        {"question": "q", "ground_truth": "t", "completion": text} for text in ("1", "0", "hang", "text", "die", "2")
    ]
    Path("answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--task", "custom", "answers.jsonl", "task.reward=failing_rewards:reward", "rollout.reward_timeout=1"]
    assert run(monkeypatch, *arguments, "--out", "out.parquet") == 0
    printed = capsys.readouterr().out
    assert "1 of 6 correct" in printed
    assert "4 of 6 rows could not be scored and count as wrong" in printed
    found = pq.read_table("out.parquet").to_pylist()
    assert [row["reward"] for row in found] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    for row, told in zip(found[1:5], ("ZeroDivisionError", "reward_timeout=1", "returned 'good'", "died"), strict=True):
        assert told in row["error"]
    Path("wrong.jsonl").write_text("\n".join(map(json.dumps, rows[1:3])))
    assert run(monkeypatch, *arguments[:2], "wrong.jsonl", *arguments[3:], "--out", "none.parquet") == 1
    assert "none of the 2 rows could be scored; the first: reward raised ZeroDivisionError" in capsys.readouterr().err
    assert pq.read_table("none.parquet").num_rows == 2
    sys.modules.pop("failing_rewards")


def test_what_is_wrong_with_the_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(SAMPLES / "countdown.jsonl")
    for arguments, told in (
        (["--task", "gsm", file], f"unknown task 'gsm'; known tasks: {', '.join(sorted(TASK_CONFIGS))}"),
        (["--task", "countdown", "nowhere.jsonl"], "answer file: nowhere.jsonl is no file or folder here"),
        (["--task", "countdown", file, "--out", str(tmp_path / "no/x.parquet")], "cannot be written"),
        (["--task", "countdown", file, "--out", str(tmp_path)], "cannot be written (Is a directory)"),
        (["--task", "countdown", file, "task.numbrs=3"], "did you mean task.numbers"),
    ):
        assert run(monkeypatch, *arguments) == 2
        printed = capsys.readouterr()
        assert told in printed.err
        assert not printed.out  # nothing was scored


def test_what_is_there_is_kept_until_there_are_verdicts(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("kept")
    check_out(there)
    check_out(tmp_path / "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["a[b].jsonl", "c[/b].jsonl", "1:100:2.jsonl"])
def test_files_are_named_as_they_are_and_their_verdicts_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text((SAMPLES / "countdown.jsonl").read_text())
    assert run(monkeypatch, "--task", "countdown", name, "--out", "verdicts.parquet") == 0
    assert f"countdown: {name}" in capsys.readouterr().out
    assert pq.read_table("verdicts.parquet").num_rows > 0


def test_a_completion_ends_at_its_first_stop_token() -> None:
    assert until_stop("a<|eot_id|>b<|endoftext|>") == "a"
    assert until_stop("a<|endoftext|><|eot_id|>") == "a"
    assert until_stop("a </answer>") == "a </answer>"
    assert until_stop("a</s>b<end>", ["<end>", ""]) == "a</s>b"
    listed = (ROOT / "docs/tasks.md").read_text()
    assert all(f"`{stop}`" in listed for stop in STOPS)


@pytest.mark.parametrize(("stops", "right"), [([], 0), (["--stop", ""], 1), (["--stop", "<end>", "--stop", "</s>"], 0)])
def test_the_stop_tokens_may_be_chosen(
    stops: list[str], right: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "?", "completion": "<s>4</s> <answer>5</answer>", "ground_truth": 5}))
    assert run(monkeypatch, "--task", "gsm8k", str(file), *stops) == 0
    assert f"{right} of 1 correct" in capsys.readouterr().out


def test_scoring_whose_rewards_all_hang_ends_after_a_few() -> None:
    task = HangingTask(SudokuConfig())
    rows = [Answer("row", task.example("train", index), "q", "c", "t") for index in range(60)]
    done: list[int] = []
    with pytest.raises(RunError, match=r"^8 rewards in a row took too long, 8 of 60 completions were scored; the last"):
        judge(task, rows, RolloutConfig(reward_timeout=0.1, reward_workers=4), done.append)
    assert done == list(range(1, 9))


def test_scoring_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom learner.cli import main\n"
        f"sys.argv = ['diffpo', 'score', '--task', 'countdown', {str(SAMPLES / 'countdown.jsonl')!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
