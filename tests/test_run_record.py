"""RunRecord: which completions a run keeps, that a step is never there twice, and that it never ends a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from common.place import Place
from common.tokenizer import character_tokenizer
from common.trajectory import Completion, decode_group, encode_group
from learner.record_rows import POSITIONS, SCHEMA, Observed, record_rows
from learner.run_record import RunRecord, read_record

TOKENIZER = character_tokenizer("0123")
GROUP = 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    record = RunRecord(Place(tmp_path), groups=1, warn=print)
    for step in (1, 2):
        record.add(rows(step, {step: [0.0, 1.0]}))
        record.write()
    (tmp_path / "record" / "steps-000002-000002.parquet").write_bytes(b"torn")
    table, [unread] = read_record(Place(tmp_path))
    assert set(table["step"].to_pylist()) == {1}, "the others are read"
    assert unread.startswith("steps-000002-000002.parquet: ")


def group_of(number: int, rewards: list[float]) -> pa.Table:
    """Completions `12`, then the end; the second position is drawn first."""
    ids = TOKENIZER.convert_tokens_to_ids(["1", "2"])
    made = [
        Completion(
            prompt_ids=np.array(ids, np.int32),
            completion_ids=np.array([*ids, TOKENIZER.eos_token_id], np.int32),
            reveal_step=np.array([2, 1, 3], np.int16),
            behaviour_logprob=np.array([-1, -0.5, 0], np.float32),
            reveal_logprob=np.zeros(3, np.float32),
            entropy=np.array([0.3, 0.2, 0], np.float32),
            token_version=np.array([4, 4, -1], np.int32),
            first_entropy=0.3,
            gamma=0.7,
            gamma_logprob=-1.0,
            nfe=2,
            finish_reason="stop",
            seed=1,
            temperature=1.0,
        )
        for _ in rewards
    ]
    shared = {"group_id": number, "task": "t", "reveal_rule": "r", "block_length": 3, "cache": "none", "attempt": 0}
    shared |= {"worker": "w", "model_digest": "d"}
    scores = [{"exact": reward, "reward": reward} for reward in rewards]
    return decode_group(encode_group(made, shared, scores))


def rows(step: int, groups: dict[int, list[float]], seconds: float = 1.0) -> pa.Table:
    count = sum(map(len, groups.values()))
    weights = np.full((count, 3), np.nan, np.float32)
    weights[0, :2] = [1.0, 0.5]
    return record_rows(
        [group_of(number, rewards) for number, rewards in groups.items()],
        Observed(np.concatenate([*groups.values()]).astype(np.float32), np.ones(count, np.float32), weights),
        TOKENIZER,
        step=step,
        version=step - 1,
        numbers=list(groups),
        staleness=[1] * len(groups),
        seconds=[seconds * (1 + number) for number in groups],
    )


def record(path: Path, warned: list[str] | None = None, **settings: Any) -> RunRecord:
    told = (warned if warned is not None else []).append
    return RunRecord(Place(path), **{"groups": 1, "warn": told, **settings})


def whole(path: Path, columns: list[str] | None = None) -> pa.Table:
    """What is recorded, nothing of it damaged."""
    table, unread = read_record(Place(path), columns=columns)
    assert unread == []
    return table


def steps_on_disk(path: Path) -> list[int]:
    return sorted(set(whole(path)["step"].to_pylist()))


def test_a_row_says_what_was_drawn_and_what_came_of_it() -> None:
    table = rows(5, {7: [0.25, 1.0]})
    assert table.schema.equals(SCHEMA)
    first, second = table.to_pylist()
    assert (first["step"], first["version"], first["group"], first["index"], second["index"]) == (5, 4, 7, 0, 1)
    assert (first["prompt"], first["completion"], first["seconds"], first["staleness"]) == ("12", "12", 8.0, 1)
    assert (first["reward"], first["earned"], dict(first["components"])) == (0.25, 0.25, {"exact": 0.25})
    assert (first["tokens"][:2], first["reveal_step"]) == (["1", "2"], [2, 1, 3])
    assert (first["token_weight"], first["weight"]) == ([1.0, 0.5, None], 0.75)
    assert second["token_weight"] == [None] * 3
    assert np.isnan(second["weight"]), "it was not scored"


def test_positions_are_kept_of_some_groups_and_of_those_that_stand_out(tmp_path: Path) -> None:
    found = record(tmp_path)
    found.add(rows(1, {0: [0.5, 0.5], 1: [0.5, 0.5], 2: [0.9, 0.5]}))
    found.add(rows(2, {3: [0.5, 0.5], 4: [0.1, 0.5], 5: [0.5, 0.5], 6: [0.5, 0.5]}))
    assert steps_on_disk(tmp_path) == []
    found.write()
    found.write()
    [file] = (tmp_path / "record").iterdir()
    assert file.name == "steps-000001-000002.parquet"
    table = whole(tmp_path)
    assert len(table) == 7 * GROUP
    kept = {row["group"] for row in table.to_pylist() if row["tokens"] is not None}
    assert kept == {0, 3, 2, 4, 6}, "the first of each step, the best, the worst, the slowest"
    for row in table.to_pylist():
        assert len({row[name] is None for name in POSITIONS}) == 1


def test_none_are_kept_if_none_shall_be(tmp_path: Path) -> None:
    found = record(tmp_path, groups=0)
    found.add(rows(1, {0: [0.5, 1.0]}))
    found.write()
    table = whole(tmp_path)
    assert (table["tokens"].null_count, table["completion"].to_pylist()) == (2, ["12", "12"])


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 9])
def test_steps_that_are_done_again_are_not_there_twice(tmp_path: Path, step: int) -> None:
    found = record(tmp_path)
    for one in (1, 2, 3, 4):
        found.add(rows(one, {one: [0.5, 1.0]}))
        if one % 2 == 0:
            found.write()
    found.add(rows(5, {5: [0.5, 1.0]}))  # in memory only
    again = record(tmp_path)
    again.rewind(step)
    assert steps_on_disk(tmp_path) == [one for one in (1, 2, 3, 4) if one <= step]
    for one in range(step + 1, 7):
        again.add(rows(one, {one + 10: [0.5, 1.0]}))
    again.write()
    found = whole(tmp_path).to_pylist()
    assert [row["step"] for row in found][::GROUP] == list(range(1, max(7, step)) if step < 7 else range(1, 5))


def test_what_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    warned: list[str] = []
    (tmp_path / "record").write_text("in the way")
    found = record(tmp_path, warned)
    for one in (1, 2):
        found.add(rows(one, {one: [0.5, 1.0]}))
        found.write()
    [told] = warned
    assert f"{tmp_path}/record lacks completions, it cannot be written: " in told


def test_without_room_a_file_that_a_rewind_would_shorten_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    warned: list[str] = []
    found = record(tmp_path, warned)
    for one in (1, 2):
        found.add(rows(one, {one: [0.5, 1.0]}))
    found.write()
    with monkeypatch.context() as patched:
        patched.setattr(Place, "write", full)
        found.rewind(1)
    assert steps_on_disk(tmp_path) == [1, 2]
    assert "No space left" in warned[0]


def test_some_columns_can_be_read_alone(tmp_path: Path) -> None:
    assert whole(tmp_path, ["step"]).column_names == ["step"]
    found = record(tmp_path)
    for one in (1, 2):
        found.add(rows(one, {one: [0.5, 1.0]}))
        found.write()
    table = whole(tmp_path, ["step", "reward"])
    assert table.to_pydict() == {"step": [1, 1, 2, 2], "reward": [0.5, 1.0] * 2}
