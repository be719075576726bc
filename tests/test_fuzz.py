"""Readers under arbitrary and damaged bytes: what was written, or the one error that they promise; nothing else.

Bounded: a fixed number of examples, derandomised. What Arrow could crash on is read in a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkpoint_manifest import MANIFEST
from common.checkpoint_store import CheckpointStore
from common.config import Config
from common.config_file import dump_config, load_config
from common.errors import RunError, UserError
from common.journal import SCHEMA as JOURNAL_SCHEMA
from common.journal import decode_journal, encode_journal
from common.lease import FinishedGroup
from common.ledger import GroupRecord
from common.place import Place
from common.segment_folder import damage_named, decode_segment, encode_segment
from common.trajectory import SCHEMA, Completion, decode_group, encode_group
from learner.demonstration_file import DemonstrationFile
from learner.run_directory import RunDirectory
from learner.saved_group import WHY, _version
from learner.study.grid import Study, load_study

FEW = settings(max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGES = 1000  # read in the other process, of each format
CONFIG = Path(__file__).parents[1] / "deploy/configs/sudoku.yaml"
STUDY = Path(__file__).parents[1] / "deploy/studies/quick.yaml"
YAML_PARTS = [
    "task",
    "name",
    "sudoku",
    ": ",
    "\n",
    "  ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!!int ",
    "${",
    "}",
    "'",
]
YAML_PARTS += [
    '"',
    "#",
    "|",
    ">",
    "?",
    "%",
    "@",
    "---\n",
    "<<",
    "1e9",
    ".nan",
    "null",
    "\t",
    "\0",
    "\x85",
    "é",
    "\\",
    "???",
]


def texts(whole: str) -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, YAML-like text, and mutations of a real file."""
    mutated = st.lists(
        st.tuples(st.integers(0, len(whole)), st.integers(0, 20), st.sampled_from(YAML_PARTS)), min_size=1, max_size=4
    ).map(lambda edits: mutate(whole, edits).encode())
    return st.one_of(
        mutated, st.lists(st.sampled_from(YAML_PARTS), max_size=30).map(lambda p: "".join(p).encode()), st.binary()
    )


def mutate(text: str, edits: list[tuple[int, int, str]]) -> str:
    for at, length, put in edits:
        text = text[:at] + put + text[at + length :]
    return text


def one_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


@FEW
@given(data=texts(CONFIG.read_text()))
def test_a_config_file_is_a_config_or_a_user_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(data)
    try:
        config = load_config(path)
    except UserError as error:
        one_line(error)
    else:
        assert isinstance(config, Config)
        path.write_text(dump_config(config))
        assert load_config(path) == config


@FEW
@given(items=st.lists(st.lists(st.sampled_from([*YAML_PARTS, "learner.steps", "run.name", "=", "."])), max_size=3))
def test_overrides_are_a_config_or_a_user_error(items: list[list[str]]) -> None:
    try:
        assert isinstance(load_config(None, ["task.name=sudoku", *map("".join, items)]), Config)
    except UserError as error:
        one_line(error)


@FEW
@given(data=texts(STUDY.read_text()))
def test_a_study_file_is_a_study_or_a_user_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(load_study(str(path), out=tmp_path)[1], Study)
    except UserError as error:
        one_line(error)


MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", "x", 3, None])),
    max_size=3,
)
JSONL = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), st.one_of(st.text(), st.integers(), st.none())),
        st.fixed_dictionaries({"messages": MESSAGES}),
        st.lists(st.integers()),
        st.text(),
        st.floats(),
    ).map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    max_size=5,
).map(b"\n".join)


@FEW
@given(data=st.one_of(JSONL, st.binary(), st.text('{}[]":,\\ud8 promtcle\n\u2028').map(str.encode)))
def test_demonstrations_are_pairs_of_text_or_a_user_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(data)
    try:
        rows = DemonstrationFile(str(path))
    except UserError as error:
        one_line(error)
    else:
        messages = [message for row in range(len(rows)) for message in rows[row]]
        assert messages
        assert all(text.encode() is not None for message in messages for text in message.values())


@FEW
@given(data=st.one_of(JSONL, st.binary(), st.integers().map(lambda n: json.dumps({"version": n, "steps": n}).encode())))
def test_what_a_run_says_of_itself_is_a_number_or_unknown(tmp_path: Path, data: bytes) -> None:
    (tmp_path / WHY).write_bytes(data)
    (tmp_path / "evaluation.json").write_bytes(data)
    for found in (_version(Place(tmp_path), WHY), RunDirectory(tmp_path).finished_steps()):
        assert found is None or isinstance(found, int)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@FEW
@given(edits=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=3))
def test_a_manifest_is_what_was_committed_or_damaged(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    draft = store.begin(3)
    (draft.path / "a").write_text("a")
    written = draft.commit(version=5, journal_index=7, facts={"life": 1})
    path = tmp_path / "checkpoints/step-000003" / MANIFEST
    data = path.read_bytes()
    for at, length, put in edits:
        data = data[:at] + put + data[at + length :]
    path.write_bytes(data)
    found = store.checkpoints()
    assert found in ([], [written])
    assert len(store.damaged()) == (not found)
    if not found:
        with pytest.raises(RunError, match="restore one of them"):
            store.newest_sound()


VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(), st.booleans()), lambda v: st.dictionaries(st.text(), v), max_leaves=5
)
KEYS = ["step", "version", "journal_index", "facts", "files", "schema"]


@FEW
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1), gone=st.sets(st.sampled_from(KEYS)))
def test_a_manifest_with_a_right_digest_and_odd_content_is_damaged_or_sound(
    tmp_path: Path, changes: dict[str, Any], gone: set[str]
) -> None:
    from common.checkpoint_manifest import digest, encode

    store = CheckpointStore(tmp_path / "checkpoints")
    draft = store.begin(3)
    draft.commit(version=5, journal_index=7)
    path = tmp_path / "checkpoints/step-000003" / MANIFEST
    described = json.loads(path.read_bytes()) | changes
    described = {key: value for key, value in described.items() if key not in {*gone, "digest"}}
    path.write_bytes(encode({**described, "digest": digest(described)}))
    assert len(store.checkpoints()) + len(store.damaged()) == 1
    try:
        store.newest_sound()
    except RunError as error:
        one_line(error)


# -- Arrow -------------------------------------------------------------------------------------------------------------


def completion(seed: int) -> Completion:
    rng = np.random.default_rng(seed)
    floats = {name: rng.random(4, np.float32) for name in ("behaviour_logprob", "reveal_logprob", "entropy")}
    return Completion(
        prompt_ids=np.array([4, 5]),
        completion_ids=rng.integers(0, 9, 4),
        reveal_step=np.array([1, 1, 2, 3]),
        token_version=np.array([3, 3, 3, -1]),
        first_entropy=0.5,
        gamma=0.3,
        gamma_logprob=-1.0,
        nfe=3,
        finish_reason="eos",
        seed=seed,
        temperature=1.0,
        **floats,
    )


def group() -> bytes:
    shared = {"group_id": 7, "task": "sudoku", "reveal_rule": "entropy_bound", "block_length": 4, "cache": "none"}
    shared |= {"attempt": 1, "worker": "w", "model_digest": "d"}
    scores = [{"cells": 0.5, "reward": 0.5}, {"cells": 1.0, "reward": 1.0}]
    return encode_group([completion(0), completion(1)], shared, scores)


def segment() -> bytes:
    groups = [FinishedGroup(number, 1, group(), 0.5, 3, 2, 0.75, 3.0) for number in (7, 8)]
    return encode_segment(groups, {"start": 0, "entries": [], "end": 2}).to_pybytes()


def journal() -> bytes:
    return encode_journal([GroupRecord(n, n, "leased", 1, "w", 9.5, 3, "", 0) for n in range(40)])


def read_segment(data: bytes) -> Any:
    with damage_named("it"):
        return decode_segment(data, name="it")


def damages(whole: bytes, seed: int, number: int) -> Any:
    """Cut short, bits flipped, numbers overwritten, parts spliced or doubled; reproducible."""
    rng = np.random.default_rng(seed)
    for index in range(number):
        data = bytearray(whole)
        kind, at = index % 5, int(rng.integers(len(whole)))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**30, 255])).to_bytes(4, "little")
        elif kind == 3:
            other = int(rng.integers(len(whole)))
            data[at : at + 16] = whole[other : other + 16]
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 64))]
        yield bytes(data)


READERS: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
    "group": (group, decode_group),
    "segment": (segment, read_segment),
    "journal": (journal, decode_journal),
}


def damaged_reads(name: str) -> None:
    """In the other process: every damaged copy is refused, or read; counts go to standard output."""
    write, read = READERS[name]
    whole = write()
    sound = read(whole)
    counts = {"refused": 0, "same": 0, "other": 0}
    for data in damages(whole, seed=len(name), number=DAMAGES):
        try:
            found = read(data)
        except RunError as error:
            one_line(error)
            counts["refused"] += 1
            continue
        if name == "group":
            assert found.schema.equals(SCHEMA)
            found.to_pylist()  # touches every value
            counts["same" if found.equals(sound) else "other"] += 1
        else:
            counts["same" if found == sound else "other"] += 1
            assert name == "segment" or all(len(row) == len(JOURNAL_SCHEMA) for row in found)
    print(json.dumps(counts))  # noqa: T201


@pytest.mark.parametrize("name", READERS)
def test_damaged_arrow_is_refused_and_never_crashes(name: str) -> None:
    """A segment holds a checksum of everything: what is read is what was written. Groups lie in segments, journals in
    checkpoints, whose digests say the same of them; alone they promise the right columns."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fuzz\n"
    code += f"test_fuzz.damaged_reads({name!r})"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["refused"] > DAMAGES / 3
    assert name != "segment" or counts["other"] == 0


@FEW
@given(data=st.binary(max_size=300))
@pytest.mark.parametrize("name", READERS)
def test_bytes_that_are_no_arrow_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(RunError):
        READERS[name][1](data)
