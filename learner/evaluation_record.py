"""Evaluation record: what an evaluation found, answer by answer, on disk.

    shards/DIGEST/N.parquet      finished shards of an evaluation that is going on; removed at its end
    answers.parquet              a row for every answer: policy, setting, prompt, completion, verdict, reward, NFE
    samples_POLICY.jsonl         the same in the layout of lm-evaluation-harness' sample files

The digest tells evaluations apart: of everything in the configuration that says what is computed, of the policies'
files and of the task's (names, sizes, times of change). So the same command goes on where it was killed, and another
one begins anew.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.evaluation import Point, Setting, standard_settings
from common.config import Config
from common.errors import RunError, one_line
from common.place import FAILURES, Place
from common.tasks import Example, Task
from learner.evaluation_fleet import Shard

ANSWERS = "answers.parquet"
ELSEWHERE = {"actors", "min_actors", "max_actors", "scaling_seconds", "labels", "cpus", "gpus"}
ELSEWHERE |= {"threads", "max_restarts", "drain_seconds", "reward_workers", "reward_cpus", "reward_labels"}
COMPONENT = "component."  # prefix of a column
Points = Mapping[str, list[Point]]


class ShardFolder:
    """The finished shards of one evaluation, by their numbers."""

    def __init__(self, out: Place, config: Config, folders: Mapping[str, str]) -> None:
        """Raises RunError when the folder cannot be made."""
        self.place = out / "shards" / evaluation_digest(config, folders)
        try:
            self.place.filesystem.create_dir(self.place.path, recursive=True)
        except FAILURES as error:
            raise RunError(f"{self.place} cannot be made ({one_line(error)}); choose another --out") from error

    def read(self, number: int, shard: Shard) -> Point | None:
        """The point of a shard that is finished; one that cannot be read is not."""
        try:
            return _point(self.place.read_parquet(f"{number}.parquet"), shard)
        except (*FAILURES, KeyError, ValueError):
            return None

    def write(self, number: int, point: Point) -> None:
        """As a whole or not at all. Raises RunError when there is no room."""
        encoded = pa.BufferOutputStream()
        pq.write_table(pa.table(_columns(point)), encoded)
        try:
            self.place.write(f"{number}.parquet", encoded.getvalue())
        except FAILURES as error:
            text = f"shard {number} cannot be written to {self.place} ({one_line(error)}); make room"
            raise RunError(text) from error

    def remove(self) -> None:
        with suppress(*FAILURES):
            self.place.remove_all()
            if not self.place.parent.folders():  # else shards of another evaluation are there
                self.place.parent.remove_all()


def evaluation_digest(config: Config, folders: Mapping[str, str]) -> str:
    """Changes with whatever changes what an evaluation finds."""
    places = {name: Place(folder) for name, folder in folders.items()}
    said = {
        "task": config.task.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json", exclude={"path"}),
        "sampler": config.sampler.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json", exclude=ELSEWHERE),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "settings": [[one.rule, one.parameter, one.temperature] for one in standard_settings(config)],
        "cost": [config.learner.speed_weight, config.learner.cost],
        "seed": config.run.seed,
        "policies": {name: [place.name, *place.files()] for name, place in places.items()},
        "data": [[*_files(Path(name))] for name in config.task.files],
        "code": [[*_files(Path(name))] for name in _modules(config)],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _modules(config: Config) -> Iterator[str]:
    """Files of the modules that a task names as `module:object`."""
    for name in config.task.model_dump().values():
        if isinstance(name, str) and re.fullmatch(r"[\w.]+:[\w.]+", name):
            with suppress(ImportError, ValueError):
                found = find_spec(name.split(":")[0])
                if found is not None and found.origin:
                    yield found.origin


def _files(path: Path) -> Iterator[list[Any]]:
    """Of what may be no path at all: any text of the task's."""
    files = [path]
    with suppress(OSError):
        files = sorted(path.iterdir()) if path.is_dir() else files
    for file in files:
        with suppress(OSError):
            found = file.stat()
            yield [file.name, found.st_size, found.st_mtime_ns]


def write_answers(out: Path, config: Config, task: Task, points: Points) -> list[Path]:
    """Every answer of an evaluation, as Parquet and as sample files.

    Raises:
        RunError: when there is no room.
    """
    chosen = config.evaluation
    examples = [task.example(chosen.split, index) for index in range(chosen.prompts)]
    answers = out / ANSWERS
    written = [answers]
    try:
        writer: pq.ParquetWriter | None = None
        for name, found in points.items():
            for point in found:
                table = _answers(name, point, task, examples)
                writer = writer or pq.ParquetWriter(answers, table.schema)
                writer.write_table(table)
            written.append(_write_samples(out, config, name, found, task, examples))
        if writer is not None:
            writer.close()
    except OSError as error:
        raise RunError(f"the answers cannot be written to {out} ({one_line(error)}); make room") from error
    return written


def _answers(name: str, point: Point, task: Task, examples: list[Example]) -> pa.Table:
    count = len(examples)
    return pa.table(
        {
            "policy": [name] * count,
            "setting": [point.setting.name] * count,
            "index": np.arange(count),
            "prompt": [example.prompt for example in examples],
            "ground_truth": [json.dumps(example.fields, default=str) for example in examples],
            "answer": [task.answer(text) for text in point.completions],
            **_columns(point),
        }
    )


def _write_samples(
    out: Path, config: Config, name: str, points: list[Point], task: Task, examples: list[Example]
) -> Path:
    path = out / f"samples_{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for point in points:
            asked = _arguments(config, point.setting)
            for index, (example, text) in enumerate(zip(examples, point.completions, strict=True)):
                sample = {
                    "doc_id": index,
                    "doc": example.fields,
                    "target": json.dumps(example.fields, default=str),
                    "arguments": [[example.prompt, asked]],
                    "resps": [[text]],
                    "filtered_resps": [task.answer(text)],
                    "filter": "answer",
                    "metrics": ["exact_match", "reward"],
                    "exact_match": float(point.correct[index]),
                    "reward": float(point.reward[index]),
                    "nfe": int(point.nfe[index]),
                    "gamma": float(point.gamma[index]),
                }
                file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
    return path


def _arguments(config: Config, setting: Setting) -> dict[str, Any]:
    return {
        "setting": setting.name,
        "rule": setting.rule,
        "parameter": setting.parameter,
        "temperature": setting.temperature,
        "max_gen_toks": config.sampler.max_completion_tokens,
    }


def _columns(point: Point) -> dict[str, Any]:
    return {
        "completion": list(point.completions),
        "correct": point.correct,
        "reward": point.reward,
        "reward_costed": point.reward_costed,
        "nfe": point.nfe,
        "gamma": point.gamma,
        "failure": list(point.failures),
        **{f"{COMPONENT}{name}": values for name, values in point.components.items()},
    }


def _point(table: pa.Table, shard: Shard) -> Point:
    """Raises KeyError, ValueError for a table that is not the shard's."""
    if table.num_rows != len(shard.prompts):
        raise ValueError(f"{table.num_rows} rows for {len(shard.prompts)} prompts")
    values = {name: table.column(name).to_numpy() for name in table.column_names}
    failures = tuple(table.column("failure").to_pylist())
    return Point(
        setting=shard.setting,
        correct=values["correct"].astype(bool),
        nfe=values["nfe"],
        reward=values["reward"],
        reward_costed=values["reward_costed"],
        components={
            name.removeprefix(COMPONENT): values[name] for name in table.column_names if name.startswith(COMPONENT)
        },
        gamma=values["gamma"],
        failed=sum(map(bool, failures)),
        completions=tuple(table.column("completion").to_pylist()),
        failures=failures,
    )
