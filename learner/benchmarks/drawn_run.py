"""Drawn run: a run directory full of random completions and steps, as a run that was trained leaves it behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.config_file import load_config
from learner.record_rows import SCHEMA
from learner.run_directory import EVALUATION, RunDirectory
from learner.run_record import RunRecord

CELLS = 16
GROUP = 5  # completions of one


def draw_run(root: Path, name: str, *, steps: int, per_step: int, seed: int = 0, **rest: Any) -> Path:
    """Make a finished run and return its directory.

    Args:
        root: its `run.root`.
        name: its `run.name`.
        steps: of the learner.
        per_step: completions of each.
        seed: of all that is drawn.
        rest: further keys, `section__key=value`.
    """
    given = [f"{key.replace('__', '.')}={value}" for key, value in rest.items()]
    keys = ["task.name=sudoku", f"run.root={root}", f"run.name={name}", f"learner.steps={steps}", f"run.seed={seed}"]
    run = RunDirectory.create(load_config(None, [*keys, *given]))
    generator = np.random.default_rng(seed)
    record = RunRecord(run.place, groups=1, warn=lambda text: None)
    numbers = iter(range(1_000_000_000))
    for step in range(1, steps + 1):
        share = step / steps
        record.add(_rows(generator, step, share, per_step, numbers))
        if step % 50 == 0 or step == steps:
            record.write()
        run.append_metrics(_metrics(generator, step, share))
    run.write_json(EVALUATION, _evaluation(steps))
    return run.path


def _rows(generator: np.random.Generator, step: int, share: float, count: int, numbers: Any) -> pa.Table:
    rows = []
    for index in range(count):
        if index % GROUP == 0:
            number = next(numbers)
            puzzle = "".join(map(str, generator.integers(0, 5, CELLS)))
        nfe = int(generator.integers(2, 12))
        answer = "".join(map(str, generator.integers(1, 5, CELLS)))
        reward = float(np.clip(generator.normal(0.2 + 0.5 * share, 0.2), 0, 1))
        reveal = generator.integers(1, nfe + 1, CELLS)
        rows.append(
            {
                **{"step": step, "version": step - 1, "group": number, "attempt": 0, "index": index % GROUP},
                **{"prompt": puzzle, "completion": answer, "reward": reward, "earned": reward - 0.01 * nfe},
                **{"advantage": reward - 0.5, "components": [("exact", float(reward > 0.9))], "nfe": nfe},
                **{"gamma": float(generator.lognormal(-1, 0.5)), "staleness": int(generator.integers(0, 3))},
                **{"seconds": float(generator.gamma(3, 0.2)), "worker": f"rollout-{index % 2}", "weight": 1.0},
                "tokens": [*answer, ""],
                "reveal_step": [*reveal.tolist(), nfe + 1],
                "logprob": [*(-generator.exponential(0.5, CELLS)).tolist(), 0.0],
                "entropy": [*generator.exponential(0.5, CELLS).tolist(), 0.0],
                "token_version": [step - 1] * CELLS + [-1],
                "token_weight": [*generator.lognormal(0, 0.2, CELLS).tolist(), None],
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _metrics(generator: np.random.Generator, step: int, share: float) -> dict[str, Any]:
    noise = generator.normal(0, 0.02, 4)
    row = {
        **{"kind": "step", "seconds": 0.5 * step, "learner_steps": float(step)},
        **{"rollout_generated_reward": 0.2 + 0.5 * share + noise[0], "rollout_reward_costed": 0.15 + 0.5 * share},
        **{"rollout_generated_nfe": 10 - 6 * share + noise[1], "rollout_tokens_per_forward": 1.6 + 2 * share},
        **{"threshold_gamma": 0.3 + share, "replay_staleness_mean": 1.2, "replay_staleness_max": 2.0},
        **{"learner_weight_ess": 0.95 + noise[2], "learner_gradient_norm": 1.0 + noise[3]},
        **{"learner_wait_share": 0.05, "rollout_wait_share": 0.4, "rollout_completions_per_second": 50.0},
        **{f"learner_weight_ess{{reveal_step={low}}}": 0.99 - low / 100 for low in (1, 2, 4, 8)},
    }
    return row | ({"drift_accuracy": 0.3 + 0.3 * share, "drift_nfe": 8.0} if step % 20 == 0 else {})


def _evaluation(steps: int) -> dict[str, Any]:
    def row(setting: str, accuracy: float, nfe: float) -> dict[str, Any]:
        return {"setting": setting, "accuracy": accuracy, "nfe": nfe, "reward_costed": accuracy}

    def policy(better: float) -> list[dict[str, Any]]:
        fixed = [
            row(f"eb gamma={gamma}", 0.8 - 0.1 * n + better, 16 / 2**n) for n, gamma in enumerate((0.1, 0.3, 1, 3))
        ]
        return [*fixed, row("learned, greedy", 0.7 + better, 4.0 - 10 * better)]

    return {
        **{"steps": steps, "task": "sudoku", "split": "test", "prompts": 100, "nfe_range": [2.0, 16.0]},
        **{"settings": {"before": policy(0.0), "after": policy(0.1)}, "area": {"before": 0.6, "after": 0.7}},
        "frontier_gain": {"gain": 0.1, "low": 0.05, "high": 0.15},
    }
