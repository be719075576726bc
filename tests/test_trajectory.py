"""Trajectory: what goes in comes out, and what is not a group of this schema version is refused as RunError."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import RunError
from common.trajectory import NOT_DRAWN, SCHEMA, SCHEMA_VERSION, Completion, decode_group, encode_group

SHARED = {
    "group_id": 2**40,
    "task": "sudoku",
    "reveal_rule": "entropy_bound",
    "block_length": 4,
    "cache": "none",
    "attempt": 2,
    "worker": "rollout-1",
    "model_digest": "ab" * 16,
}
SCORES = [{"cells": 0.5, "exact": 0.0, "reward": 0.25}, {"reward": -1.0}]


def completion(index: int) -> Completion:
    return Completion(
        prompt_ids=np.arange(4, 7 + index, dtype=np.int32),
        completion_ids=np.array([126_335, 5, 1, 1], dtype=np.int32),
        reveal_step=np.array([2, 1, 2, 3], dtype=np.int16),
        behaviour_logprob=np.array([-0.1, -1e-7, -30.0, 0], dtype=np.float32),
        reveal_logprob=np.array([-0.4, -2.5, -0.4, 0], dtype=np.float32),
        entropy=np.array([0.3, 0.1, 2.5, 0], dtype=np.float32),
        token_version=np.array([8, 7, 8, NOT_DRAWN], dtype=np.int32),
        first_entropy=0.9,
        gamma=0.3,
        gamma_logprob=-1.5,
        nfe=2,
        finish_reason="stop",
        seed=2**63 - 1 - index,
        temperature=0.7,
    )


FLOATS = ("behaviour_logprob", "reveal_logprob", "entropy")
GROUP = [completion(0), completion(1)]
PAYLOAD = encode_group(GROUP, SHARED, SCORES)


def with_metadata(metadata: dict[str, str] | None) -> bytes:
    """The same table under other schema metadata."""
    sink = pa.BufferOutputStream()
    table = decode_group(PAYLOAD).replace_schema_metadata(metadata)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_group_round_trips() -> None:
    table = decode_group(PAYLOAD)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [row["completion_index"] for row in rows] == [0, 1]
    for row, mine, score in zip(rows, GROUP, SCORES, strict=True):
        for name in ("prompt_ids", "completion_ids", "reveal_step", "token_version", *FLOATS):
            values = getattr(mine, name)
            np.testing.assert_array_equal(np.array(row[name], dtype=values.dtype), values)
        for name in ("nfe", "finish_reason", "seed"):
            assert row[name] == getattr(mine, name)
        for name in ("first_entropy", "gamma", "gamma_logprob", "temperature"):
            assert row[name] == np.float32(getattr(mine, name))
        assert {name: row[name] for name in SHARED} == SHARED
        assert row["reward"] == score["reward"]
        assert dict(row["rewards"]) == {name: value for name, value in score.items() if name != "reward"}


def test_the_oldest_version_leaves_out_what_was_not_drawn() -> None:
    assert completion(0).oldest_version == 7


@pytest.mark.parametrize("missing", ["task", "worker"])
def test_a_row_lacks_nothing(missing: str) -> None:
    shared = {name: value for name, value in SHARED.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        encode_group(GROUP, shared, SCORES)


@pytest.mark.parametrize(
    ("metadata", "found"), [({"diffpo.trajectory": "0"}, "0"), ({"other": "1"}, "none"), (None, "none")]
)
def test_another_schema_version_is_refused(metadata: dict[str, str] | None, found: str) -> None:
    assert decode_group(with_metadata({"diffpo.trajectory": SCHEMA_VERSION})).num_rows == 2
    with pytest.raises(RunError, match=f"version {found}, this code reads {SCHEMA_VERSION}; use"):
        decode_group(with_metadata(metadata))


@settings(max_examples=300)
@given(payload=st.binary(max_size=400))
@example(payload=b"")
@example(payload=b"\xff\xff\xff\xff")
@example(payload=b"\xff\xff\xff\xff\x00\x00\x00\x00")
@example(payload=b"PAR1" * 20)
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(RunError):
        decode_group(payload)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_a_truncated_group_is_refused(share: float) -> None:
    with pytest.raises(RunError, match="not a sound Arrow stream"):
        decode_group(PAYLOAD[: int(share * len(PAYLOAD))])
