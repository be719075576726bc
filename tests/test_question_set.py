"""Questions from data: formats, folders and hubs, errors that name file and row, and splits that never share one."""

import csv
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.tasks import SPLITS, Gsm8kConfig, Split, build_task
from common.tasks.question_set import Question, normalised, read_question_set
from common.tasks.rows import read_rows

ROWS: list[dict[str, Any]] = [
    {"question": "One, “quoted”?", "answer": "#### 1"},
    {"question": "Two\nlines?", "answer": "a,b\n#### 2"},
]


def questions(texts: list[str]) -> list[Question]:
    return [Question(text, "1", None, f"row {number}") for number, text in enumerate(texts, 1)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"rows{suffix}", ROWS)
    assert [row.values for row in read_rows(str(file), "task.data")] == ROWS


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.parquet", ROWS[:1])
    write(tmp_path / "train-00001.jsonl", ROWS[1:])
    write(tmp_path / "val.jsonl", [{"question": "Three?", "answer": "3"}])
    (tmp_path / "README.md").write_text("not data")
    found = {split: [row.values for row in read_rows(str(tmp_path), "task.data", split)] for split in SPLITS[:2]}
    assert found == {"train": ROWS, "validation": [{"question": "Three?", "answer": "3"}]}
    assert len(read_rows(str(tmp_path), "task.data")) == 3
    with pytest.raises(UserError, match=r"has no file that starts with test"):
        read_rows(str(tmp_path), "task.test_data", "test")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, row 2: '{\"a\": ' is no JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, row 1: '[1]' is no object with fields"),
        ("a.jsonl", "\n \n", "a.jsonl holds no rows"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl cannot be read"),
        ("a.json", "[{]", "a.json is no JSON list"),
        ("a.json", "[1]", "a.json, row 1: '1' is no object"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud800"}', "a.jsonl, row 2: it holds what is no text ('utf-8'"),
        ("a.json", '[{"a": ["\\ud800"]}]', "a.json, row 1: it holds what is no text"),
        ("a.jsonl", '{"a": 1, "a": 3}', "a.jsonl, row 1: '{\"a\": 1, \"a\": 3}' is no JSON (it has 'a' twice)"),
        ("a.json", '[{"a": 1, "a": 3}]', "a.json is no JSON list (it has 'a' twice)"),
        ("a.csv", 'a,b,a\n1,2,3\n', "a.csv, row 1: the header has 'a' twice"),
        ("a.csv", 'a,b\n1,2\n1,2,3\n', "a.csv, row 3: more columns than the header's 2"),
        ("a.csv", 'a\n"1\n', "a.csv, row 2: "),
        ("a.parquet", "nothing", "a.parquet is no readable Parquet"),
        ("a.txt", "a", "a.txt has an unknown ending '.txt'"),
        ("a.jsonl", None, "a.jsonl is no file or folder here"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_rows(str(tmp_path / name), "task.data")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_without_a_name_are_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,,\nOne?,1,,\n")
    [row] = read_rows(str(tmp_path / "a.csv"), "task.data")
    assert (row.values["question"], row.values["answer"]) == ("One?", "1")


def test_a_path_is_taken_for_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/train\.jsonl is no file or folder here; give"):
        read_rows("data/train.jsonl", "task.data")


def test_a_hub_is_asked_only_when_named_and_only_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(UserError, match=r"needs the package datasets; pip install 'diffpo\[hub\]'"):
        read_rows("hub:openai/gsm8k:main", "task.data", "train")
    asked: list[Any] = []

    def load_dataset(*given: Any, **named: Any) -> list[dict[str, Any]]:
        asked.append((given, named))
        if given[0] == "no/where":
            raise ConnectionError("offline")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows("hub:openai/gsm8k:main", "task.data", "test")
    assert [row.values for row in rows] == ROWS
    assert rows[1].where == "hub:openai/gsm8k:main, row 2"
    read_rows("hub:HuggingFaceH4/MATH-500::train", "task.data", "validation")
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("HuggingFaceH4/MATH-500", None), {"split": "train"}),
    ]
    with pytest.raises(UserError, match=r"cannot be loaded .offline.; commands stay offline unless HF_HUB_OFFLINE=0"):
        read_rows("hub:no/where", "task.data")
    with pytest.raises(UserError, match="give hub:OWNER/NAME"):
        read_rows("hub:../secrets", "task.data")
    with pytest.raises(UserError, match="a data set of a hub is hub:openai/gsm8k"):
        read_rows("openai/gsm8k", "task.data")


TEXTS = st.lists(st.text(alphabet="abAB é", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=40)


@given(TEXTS, st.none() | TEXTS, st.none() | TEXTS, st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.4]))
def test_splits_never_share_a_question(
    train: list[str], validation: list[str] | None, test: list[str] | None, seed: int, holdout: float
) -> None:
    given_texts: dict[Split, list[str] | None] = {"train": train, "validation": validation, "test": test}
    sources: dict[Split, str | None] = {split: None if texts is None else split for split, texts in given_texts.items()}
    try:
        found = read_question_set(
            sources, lambda source, _: questions(given_texts[source] or []), seed=seed, holdout=holdout  # type: ignore[index]
        )  # fmt: skip
    except UserError:
        assert holdout or validation or test
        return
    keys = {split: {normalised(q.text) for q in found.splits[split]} for split in SPLITS}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    kept = sum(map(len, found.splits.values())) + sum(found.removed.values())
    assert kept == len(train) + len(validation or []) + len(test or [])
    if test is not None:
        assert [q.text for q in found.splits["test"]] == test


def test_what_is_the_same_question() -> None:
    assert normalised("How  MANY\n eggs? ") == normalised("how many eggs?") == normalised("how many eggs？")
    assert normalised("2 eggs?") != normalised("3 eggs?")


def test_a_question_stays_in_its_split_when_rows_are_added() -> None:
    texts = [f"question {number}?" for number in range(400)]
    sources: dict[Split, str | None] = {"train": "file", "validation": None, "test": None}
    few, many = (
        read_question_set(sources, lambda *_, n=n: questions(texts[:n]), seed=3, holdout=0.1) for n in (200, 400)
    )
    for split in SPLITS:
        assert {q.text for q in few.splits[split]} <= {q.text for q in many.splits[split]}
    assert 20 <= len(many.splits["test"]) <= 60
    other = read_question_set(sources, lambda *_: questions(texts), seed=4, holdout=0.1)
    assert {q.text for q in other.splits["test"]} != {q.text for q in many.splits["test"]}


def test_training_goes_round_in_another_order_each_epoch() -> None:
    texts = [f"question {number}?" for number in range(50)]
    sources: dict[Split, str | None] = {"train": "file", "validation": None, "test": None}
    one, two = (read_question_set(sources, lambda *_: questions(texts), seed=3, holdout=0) for _ in range(2))
    epochs = [[one.question("train", 50 * epoch + index).text for index in range(50)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    far = (1 << 32) + 7
    assert two.question("train", far) == one.question("train", far)
    assert two.question("train", 60).text == epochs[1][10]


def test_a_task_ends_its_splits_where_the_files_end(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": f"{n}?", "answer": str(n)} for n in range(20)])
    test = write(tmp_path / "test.jsonl", [{"question": f"{n}?", "answer": str(n)} for n in (3, 99)])
    task = build_task(Gsm8kConfig(data=str(train), test_data=str(test), holdout=0))
    assert (task.size("train"), task.size("validation"), task.size("test")) == (None, 0, 2)
    assert [task.example("test", index).fields["answer"] for index in range(2)] == ["3", "99"]
    assert {task.example("train", index).fields["answer"] for index in range(40)} == {str(n) for n in range(20)} - {"3"}
    with pytest.raises(UserError, match=r"test example 2 does not exist: there are 2 \(0 to 1\)"):
        task.example("test", 2)
    with pytest.raises(UserError, match=r"there are no validation questions; give task.validation_data=FILE, or hold"):
        task.example("validation", 0)
    with pytest.raises(ValueError, match="negative"):
        task.example("train", -1)
    only = build_task(Gsm8kConfig(test_data=str(test)))
    assert (only.size("train"), only.size("test")) == (0, 2)
    with pytest.raises(UserError, match=r"there are no train questions; give task.data=FILE"):
        only.example("train", 0)
    with pytest.raises(
        UserError, match=r"none of the 2 questions .* is left for training: 2 stand in validation or test"
    ):
        build_task(Gsm8kConfig(data=str(test), test_data=str(test))).example("train", 0)
    with pytest.raises(UserError, match=r"task.data is missing: gsm8k takes its questions from a file"):
        build_task(Gsm8kConfig()).size("train")


def test_removed_questions_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": f"Q {n}?", "answer": "1"} for n in range(5)])
    test = write(tmp_path / "test.jsonl", [{"question": f"q  {n}?", "answer": "1"} for n in (1, 2)])
    task = build_task(Gsm8kConfig(data=str(train), test_data=str(test), holdout=0))
    assert task.size("test") == 2
    assert "2 train questions stand in another split too and are left out" in caplog.text
