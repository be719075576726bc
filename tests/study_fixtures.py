"""What the studies' tests share: a small study, and what its runs leave."""

from pathlib import Path
from typing import Any

from learner.study.grid import Study

ROOT = Path(__file__).parent.parent
STUDY: dict[str, Any] = {
    "title": "A title",
    "question": "A question?",
    "config": str(ROOT / "deploy/configs/sudoku.yaml"),
    "seeds": 2,
    "arms": {
        "one": {"about": "the first"},
        "other": {"about": "the second", "overrides": ["learner.learning_rate=1e-3"]},
    },
    "comparisons": [
        {"claim": "it learns", "arm": "one", "baseline": "before", "measure": "test.after.area"},
        {"claim": "one beats other", "arm": "one", "baseline": "other", "measure": "test.after.area"},
    ],
}


def study(**changes: Any) -> Study:
    return Study.model_validate(STUDY | changes)


def claim(**changes: Any) -> dict[str, Any]:
    return {"claim": "c", "arm": "one", "measure": "test.after.area"} | changes


def result(arm: str, seed: int, area: float, **changes: Any) -> dict[str, Any]:
    """What a run leaves, as small as the report allows."""
    point = {"step": 0, "seconds": 0.0, "passes": 0.0, "rows_forwarded": 0.0, "accuracy": 0.3, "nfe": 4.0}
    point |= {"sampled_reward_costed": 0.2, "drift_nfe": 4.0, "drift_accuracy": 0.3}
    later = point | {"step": 20, "seconds": 50.0, "passes": 100.0, "rows_forwarded": 60.0}
    later |= {"sampled_reward_costed": 0.2 + area, "accuracy": 0.3 + area}
    frontier = [{"rule": "entropy_bound", "nfe": nfe, "accuracy": 0.1 * nfe} for nfe in (1.0, 2.0, 4.0)]
    test = {"area": 0.2, "operating": {"accuracy": 0.3, "nfe": 3.0}, "frontier": frontier}
    return {
        "arm": arm,
        "seed": seed,
        "validation": [point, later],
        "curve": [{"step": 10, "rollout_forwards": 300.0}, {"step": 20, "rollout_forwards": 400.0}],
        "test": {"before": test, "after": test | {"area": 0.2 + area}},
        "commit": "abc",
    } | changes
