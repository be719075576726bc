"""Trajectory: what one group of completions is when it crosses a process.

- Token ids, never text to be tokenised again; enough to recompute every loss and to draw the reveal order.
- One Arrow record batch per group, one row per completion, under `SCHEMA`; the version travels in its metadata and a
  reader refuses another one.
- Positions filled without being drawn (after the first stop token) have reveal step `nfe + 1`, log-probability 0,
  entropy 0 and token version -1; they stand outside loss and staleness.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import RunError

SCHEMA_VERSION = "2"
NOT_DRAWN = -1

SCHEMA = pa.schema(
    [
        pa.field("group_id", pa.int64(), nullable=False),  # prompt cursor
        pa.field("completion_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("reveal_step", pa.list_(pa.int16()), nullable=False),
        pa.field("behaviour_logprob", pa.list_(pa.float32()), nullable=False),  # nats
        pa.field("reveal_logprob", pa.list_(pa.float32()), nullable=False),  # nats, of the set revealed in its step
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),  # nats, at reveal, as the reveal rule saw it
        pa.field("token_version", pa.list_(pa.int32()), nullable=False),
        pa.field("first_entropy", pa.float32(), nullable=False),  # nats, mean over the positions active in step 1
        pa.field("gamma", pa.float32(), nullable=False),  # nats, before the policy's scale; else the rule's parameter
        pa.field("gamma_logprob", pa.float32(), nullable=False),  # 0 where gamma was given, not drawn
        pa.field("nfe", pa.int16(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("rewards", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("reveal_rule", pa.string(), nullable=False),
        pa.field("block_length", pa.int32(), nullable=False),
        pa.field("cache", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("model_digest", pa.string(), nullable=False),
    ],
    metadata={"diffpo.trajectory": SCHEMA_VERSION},
)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One denoised completion of `L` positions, as the engine hands it out."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    reveal_step: np.ndarray
    behaviour_logprob: np.ndarray
    reveal_logprob: np.ndarray
    entropy: np.ndarray
    token_version: np.ndarray
    first_entropy: float
    gamma: float
    gamma_logprob: float
    nfe: int
    finish_reason: str
    seed: int
    temperature: float

    @property
    def oldest_version(self) -> int:
        """Oldest version among the drawn tokens."""
        return int(self.token_version[self.token_version != NOT_DRAWN].min())


def encode_group(completions: list[Completion], shared: dict[str, Any], scores: list[dict[str, float]]) -> bytes:
    """Arrow IPC stream of one group.

    Args:
        completions: the group's completions, in order of completion index.
        shared: the fields that all rows have in common (`group_id`, `task`, `reveal_rule`, ...).
        scores: per completion, the reward components and their weighted sum under `reward`.
    """
    names = ("prompt_ids", "completion_ids", "reveal_step", "behaviour_logprob", "reveal_logprob", "entropy")
    names += ("token_version", "first_entropy", "gamma", "gamma_logprob", "nfe", "finish_reason", "seed", "temperature")
    columns: dict[str, list[Any]] = {name: [getattr(c, name) for c in completions] for name in names}
    columns |= {name: [value] * len(completions) for name, value in shared.items()}
    columns["completion_index"] = list(range(len(completions)))
    columns["reward"] = [score["reward"] for score in scores]
    columns["rewards"] = [[(k, v) for k, v in score.items() if k != "reward"] for score in scores]
    batch = pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def decode_group(payload: bytes) -> pa.Table:
    """The table of one group.

    Raises:
        RunError: when the bytes are not an Arrow stream of this schema version.
    """
    try:
        table = pa.ipc.open_stream(payload).read_all()
        table.validate(full=True)  # flipped bytes can decode and then crash whoever reads them
        found = (table.schema.metadata or {}).get(b"diffpo.trajectory", b"none").decode()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RunError(f"a group's payload of {len(payload)} bytes is not a sound Arrow stream: {error}") from error
    if found != SCHEMA_VERSION:
        raise RunError(
            f"trajectory schema version {found}, this code reads {SCHEMA_VERSION}; use the code that wrote it"
        )
    if not table.schema.equals(SCHEMA):
        raise RunError(f"a group has the columns {table.schema.names}, this code reads {SCHEMA.names}")
    return table
