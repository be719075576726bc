"""Agreement with d1's verdicts on real answers of LLaDA-8B-Instruct: a sample beside the tests, all where they are."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from common.tasks import Task
from learner.answer_file import until_stop

SAMPLES = Path(__file__).parent / "llada_answers"
ANSWERS = Path(__file__).parents[2] / "shared/benchmarks/llada_answers"


def check_agreement(task: Task, disagreements: Collection[int]) -> None:
    """Ours differ from d1's in these rows of the whole file alone, of its sample too, and in 2 % of them at most."""
    assert _differing(task, SAMPLES)[0] == set(disagreements)
    if not ANSWERS.exists():
        pytest.skip("the sample agrees; d1's benchmark files are not beside the checkout")
    found, rows = _differing(task, ANSWERS)
    assert found == set(disagreements)
    assert len(found) <= 0.02 * rows


def _differing(task: Task, folder: Path) -> tuple[set[int], int]:
    """Rows, as the whole file numbers them, where our verdict is not d1's, and how many rows there are."""
    rows = [json.loads(line) for line in (folder / f"{task.name}.jsonl").read_text().splitlines()]
    for row in rows:
        row["ours"] = task.correct(task.posed(row["question"], row["ground_truth"]), until_stop(row["completion"]))
    return {row.get("row", index) for index, row in enumerate(rows) if row["ours"] != row["correct"]}, len(rows)
