"""Record rows: what a run keeps of the completions that it trained on, one row each, for people to look at.

    step, version           learner step, and the version that it began with
    group, attempt          number of the group; which of its leases was handed in
    index                   of the completion inside its group
    prompt, completion      texts; special tokens left out
    reward, earned          as the task gave it; after the cost of forward passes
    advantage               what the update weighed it with
    components              rewards by name
    nfe, gamma              forward passes; threshold in nats, or the rule's parameter
    staleness               of its group, in versions
    seconds                 from lease to hand-in of its group, rewards included; NaN where that is not known
    worker                  rollout actor
    weight                  mean importance weight of its scored tokens; NaN where none was scored

and for some groups (`run.record_groups`), position by position, else null:

    tokens                  texts
    reveal_step             1-based; `nfe + 1` where it was filled after the end, not drawn
    logprob, entropy        at reveal, nats, as the sampler saw them
    token_version           of the weights that drew it; -1 where it was not drawn
    token_weight            importance weight in the first update; null where it was not scored
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # whoever reads a record needs no tokenizer
    from transformers import PreTrainedTokenizerBase

PER_TOKEN = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("earned", pa.float32(), nullable=False),
        pa.field("advantage", pa.float32(), nullable=False),
        pa.field("components", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("nfe", pa.int32(), nullable=False),
        pa.field("gamma", pa.float32(), nullable=False),
        pa.field("staleness", pa.int32(), nullable=False),
        pa.field("seconds", pa.float32(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("reveal_step", pa.list_(pa.int32())),
        pa.field("logprob", PER_TOKEN),
        pa.field("entropy", PER_TOKEN),
        pa.field("token_version", pa.list_(pa.int64())),
        pa.field("token_weight", PER_TOKEN),
    ],
    metadata={"diffpo.record": "1"},
)
POSITIONS = ("tokens", "reveal_step", "logprob", "entropy", "token_version", "token_weight")
"""Columns that hold a value for every position."""


@dataclass(frozen=True)
class Observed:
    """What the learner computed of a batch of `N` completions of `L` positions, in the batch's order."""

    earned: np.ndarray
    """`[N]`."""
    advantage: np.ndarray
    """`[N]`."""
    weights: np.ndarray
    """`[N, L]` importance weights of the first update; NaN where a token was not scored (on this rank)."""


def record_rows(
    groups: Sequence[pa.Table],
    observed: Observed,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    step: int,
    version: int,
    numbers: Sequence[int],
    staleness: Sequence[int],
    seconds: Sequence[float],
) -> pa.Table:
    """The rows of one batch, every position with them.

    Args:
        groups: tables under `common.trajectory.SCHEMA`.
        observed: of the same completions, in the same order.
        tokenizer: the policy's.
        step: that was done with the batch.
        version: it began with.
        numbers, staleness, seconds: of each group.
    """
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    ids = {one for table in groups for line in table["completion_ids"].to_pylist() for one in line}
    texts = {one: tokenizer.decode([one]) for one in ids}  # once for each: there are thousands of places
    for table, number, age, took in zip(groups, numbers, staleness, seconds, strict=True):
        prompt = tokenizer.decode(table["prompt_ids"][0].as_py(), skip_special_tokens=True)
        for row in table.to_pylist():
            known = {
                **{"step": step, "version": version, "group": number, "staleness": age, "seconds": took},
                **{"index": row["completion_index"], "attempt": row["attempt"], "prompt": prompt},
                "completion": tokenizer.decode(row["completion_ids"], skip_special_tokens=True),
                "components": row["rewards"],
                "tokens": [texts[one] for one in row["completion_ids"]],
                "logprob": row["behaviour_logprob"],
            }
            for name in ("reward", "nfe", "gamma", "worker", "reveal_step", "entropy", "token_version"):
                known[name] = row[name]
            for name, value in known.items():
                rows[name].append(value)
    rows["earned"], rows["advantage"] = list(observed.earned), list(observed.advantage)
    scored = np.isfinite(observed.weights)
    count = scored.sum(-1)
    total = np.where(scored, observed.weights, 0.0).sum(-1)
    rows["weight"] = list(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    rows["token_weight"] = [
        [float(weight) if known else None for weight, known in zip(line, mask, strict=True)]
        for line, mask in zip(observed.weights, scored, strict=True)
    ]
    return pa.table({field.name: pa.array(rows[field.name], field.type) for field in SCHEMA}, schema=SCHEMA)
