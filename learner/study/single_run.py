"""Single run: one arm of a study with one seed, synchronously, in one process.

The same engine, batch, learner and evaluation as the distributed system, without Ray: generate a batch with the newest
weights, train on it, adopt, repeat. It equals `diffpo train` with `replay.max_staleness=0` bit for bit (a test holds
it to that), so arms that share a seed see the same prompts and the same draws until their weights differ.

- Forward passes are counted twice: by the paper's count (completions times m) and as rows really forwarded.
- It can also generate with weights of a fixed number of versions ago: the worst that `replay.max_staleness` allows.
- The checkpoint is chosen by the reward after cost, sampled as in training, on validation prompts, one rule for all
  arms; test prompts are seen once, by the warm start and by the chosen weights.
- The operating point is the learned threshold (the mean in log space) where one is trained, else `gamma_init`.
"""

import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from actors.evaluation import Evaluator, Point, Setting, standard_settings
from actors.frontier import area, frontier_area
from actors.group import rollout_threshold
from common.adapter import adapt, adapted
from common.config import Config
from common.policy import Policy
from common.policy_loading import open_policy
from common.tasks import Split, Task, build_task
from common.weights import load_flat, to_flat
from learner.learner import Learner
from learner.synchronous_rollout import SynchronousRollout
from learner.warm_start import warm_start as supervise

CURVE_POINTS = 20
LEARNED_SCALES = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0, 9.0, 27.0)
RESAMPLES = 1000


def make_warm_start(config: Config) -> np.ndarray:
    """Weights of the model after its supervised warm start, float32; arms with the same seed share them."""
    torch.set_num_threads(config.learner.threads)
    task = build_task(config.task)
    policy = open_policy(config, task)
    if config.model.path is None:
        supervise(policy, task, config)
    return to_flat(policy.model)


def start_size(config: Config) -> int | None:
    """How many numbers a warm start has; None where the model is a folder's: its weights would have to be loaded."""
    if config.model.path is not None:
        return None
    return sum(weights.numel() for weights in open_policy(config, build_task(config.task)).model.parameters())


def run_arm(config: Config, warm_start: np.ndarray, staleness: int) -> dict[str, Any]:
    """Train and evaluate one arm.

    Args:
        config: the resolved configuration of the arm, its seed included.
        warm_start: from `make_warm_start` of a configuration with the same task, model, warm start and seed.
        staleness: versions that every token is old when it is trained, but for the first steps.

    Returns:
        Plain JSON: curve, validation, chosen step, test before and after, adaptation, diagnostics.
    """
    try:
        return SingleRun(config, warm_start, staleness=staleness).run()
    finally:
        torch.use_deterministic_algorithms(False)  # Ray's next task in this process may be of another arm


class SingleRun:
    """Holds the policies, the engine and the counters of one arm while it runs."""

    def __init__(self, config: Config, warm_start: np.ndarray, *, staleness: int = 0) -> None:
        torch.set_num_threads(config.learner.threads)
        self.config = config
        self._task: Task = build_task(config.task)
        self._policy = self._open(warm_start)
        self._rollout = SynchronousRollout(config, self._task, self._open(warm_start))
        self._start = to_flat(self._policy)
        self._versions = deque([(0, self._start)], maxlen=staleness + 1)  # the oldest generates
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        self.learner = Learner(self._policy, config.learner)
        self._seconds = {"rollout": 0.0, "learner": 0.0}
        self._passes = self._rows = 0.0
        self._curve: list[dict[str, float]] = []
        self._validation: list[dict[str, float]] = []
        self._labelled: dict[str, list[float]] = {}
        self._best = (-np.inf, 0, self._start)

    def _open(self, warm_start: np.ndarray) -> Policy:
        policy = open_policy(self.config, self._task)
        load_flat(policy.model, warm_start)
        if self.config.model.lora is not None and not adapted(policy):
            adapt(policy.model, self.config.model.lora, None, seed=self.config.run.seed)
        return policy

    def run(self) -> dict[str, Any]:
        """All learner steps, then the test."""
        started = time.monotonic()
        with self._evaluator(self.config.evaluation.drift_prompts, "validation") as evaluator:
            self._train(evaluator)
        _, selected, weights = self._best
        trained = self._seconds["rollout"] + self._seconds["learner"]
        with self._evaluator(self.config.evaluation.prompts, self.config.evaluation.split) as evaluator:
            before, _ = self._test(evaluator, self._start)
            after, adaptation = self._test(evaluator, weights)
        return {
            "curve": self._curve,
            "validation": self._validation,
            "selected_step": selected,
            "test": {"before": before, "after": after},
            "adaptation": adaptation,
            "diagnostics": self._diagnostics(),
            "train_seconds": trained,
            "discarded_groups": self._rollout.discarded,
            "seconds": time.monotonic() - started,
        }

    def _evaluator(self, prompts: int, split: Split) -> Evaluator:
        return Evaluator(self._rollout.policy, self._task, self.config, prompts=prompts, split=split)

    def _train(self, evaluator: Evaluator) -> None:
        config = self.config
        self._validate(evaluator, 0)
        every = max(1, config.learner.steps // CURVE_POINTS)
        sums: dict[str, list[float]] = {}
        for step in range(1, config.learner.steps + 1):
            clock = time.monotonic()
            batch = self._rollout.batch()
            self._seconds["rollout"] += time.monotonic() - clock
            clock = time.monotonic()
            metrics = self.learner.step(batch, version=step - 1)
            self._seconds["learner"] += time.monotonic() - clock
            self._versions.append((step, to_flat(self._policy)))
            self._adopt_oldest()
            self._count(metrics)
            for name, value in metrics.items():
                sums.setdefault(name, []).append(value)
                if "{" in name:
                    self._labelled.setdefault(name, []).append(value)
            if step % every == 0 or step == config.learner.steps:
                self._curve.append(self._curve_point(step, sums))
                sums = {}
            if step == config.learner.steps or step % (config.evaluation.drift_every or config.learner.steps) == 0:
                self._validate(evaluator, step)

    def _adopt_oldest(self) -> None:
        version, flat = self._versions[0]
        self._rollout.adopt(flat, version)

    # -- what is kept -------------------------------------------------------------------------------------------

    def _count(self, metrics: dict[str, float]) -> None:
        learner = self.config.learner
        passes = 3 if learner.surrogate == "coupled_masks" else learner.surrogate_passes
        passes = passes if learner.train != "threshold" else 1
        self._passes += learner.inner_updates * learner.groups_per_step * learner.group_size * passes
        self._rows += metrics.get("learner_rows_forwarded", 0.0)

    def _axes(self, step: int) -> dict[str, float]:
        return {
            "step": step,
            "seconds": round(sum(self._seconds.values()), 2),
            "passes": self._passes,
            "rows_forwarded": self._rows,
        }

    def _curve_point(self, step: int, sums: dict[str, list[float]]) -> dict[str, float]:
        def mean(name: str) -> float:
            return round(float(np.mean(sums[name])), 5) if name in sums else float("nan")

        names = {
            "reward": "rollout_reward",
            "reward_costed": "rollout_reward_costed",
            "nfe": "rollout_nfe",
            "token_entropy": "rollout_token_entropy",
            "gamma": "threshold_gamma",
            "gamma_spread": "threshold_gamma_spread",
            "weight_ess": "learner_weight_ess",
            "weight_mean": "learner_weight_mean",
            "clip_fraction": "learner_clip_fraction",
            "gradient_norm": "learner_gradient_norm",
        }
        point = self._axes(step) | {"rollout_forwards": float(self._rollout.engine.cost.row_forwards)}
        return point | {short: mean(name) for short, name in names.items() if name in sums}

    def _diagnostics(self) -> dict[str, float]:
        """Means over the run of the learner's labelled metrics: weights and surrogate by reveal step, gammas."""
        return {name: round(float(np.mean(values)), 5) for name, values in sorted(self._labelled.items())}

    def _operating(self) -> Setting:
        threshold = rollout_threshold(self.config)
        rule = self.config.sampler.rule
        return Setting("operating", rule, "mean" if threshold == "sample" else threshold)

    def _sampled(self) -> Setting:
        return replace(self._operating(), name="sampled", temperature=self.config.sampler.temperature)

    def _validate(self, evaluator: Evaluator, step: int) -> None:
        """Operating point, greedy and sampled, and initial gamma on validation prompts; keeps the best weights."""
        config = self.config
        flat = to_flat(self._policy)
        load_flat(self._rollout.policy, flat)
        point = evaluator.measure(self._operating())
        sampled = evaluator.measure(self._sampled())
        drift = evaluator.measure(Setting("drift", "entropy_bound", config.sampler.threshold.gamma_init))
        value = float(sampled.reward_costed.mean())
        self._validation.append(
            self._axes(step)
            | {
                "accuracy": point.accuracy,
                "nfe": point.mean_nfe,
                "reward_costed": float(point.reward_costed.mean()),
                "sampled_accuracy": sampled.accuracy,
                "sampled_nfe": sampled.mean_nfe,
                "sampled_reward_costed": value,
                "drift_nfe": drift.mean_nfe,
                "drift_accuracy": drift.accuracy,
            }
        )
        if value > self._best[0]:
            self._best = (value, step, flat)
        self._adopt_oldest()  # the measurement put the newest weights there

    # -- test ---------------------------------------------------------------------------------------------------

    def _test(self, evaluator: Evaluator, flat: np.ndarray) -> tuple[dict[str, Any], dict[str, float] | None]:
        config = self.config
        load_flat(self._rollout.policy, flat)
        operating = evaluator.measure(self._operating())
        sampled = evaluator.measure(self._sampled())
        settings = [s for s in standard_settings(config) if not isinstance(s.parameter, str)]
        points = [evaluator.measure(setting) for setting in settings]
        found: dict[str, Any] = {
            "area": area(points, config.evaluation.nfe_range),
            "operating": {
                "accuracy": operating.accuracy,
                "nfe": operating.mean_nfe,
                "reward_costed": float(operating.reward_costed.mean()),
                "sampled_accuracy": sampled.accuracy,
                "sampled_nfe": sampled.mean_nfe,
                "sampled_reward_costed": float(sampled.reward_costed.mean()),
            },
            "frontier": [_row(point) for point in points],
        }
        if rollout_threshold(config) != "sample":
            return found, None
        learned = [
            evaluator.measure(
                Setting(f"learned x{scale:.3g}", "entropy_bound", scale), thresholds=operating.gamma * scale
            )
            for scale in LEARNED_SCALES
        ]
        found["learned_frontier"] = [_row(point) for point in learned]
        found["learned_area"] = area(learned, config.evaluation.nfe_range)
        difficulty = np.array([example.difficulty for example in evaluator.examples])
        return found, adaptation(operating, learned, points, difficulty, config.evaluation.nfe_range)


def adaptation(
    operating: Point,
    learned: list[Point],
    constant: list[Point],
    difficulty: np.ndarray,
    nfe_range: tuple[float, float],
) -> dict[str, float]:
    """Whether thresholds differ between prompts, follow their difficulty, and are worth it. *(ours)*

    `slack` is a lower bound on what choosing a constant gamma by difficulty label, not one for all, would add to the
    greedy reward. `learned_minus_constant` is the area under the frontier of the learned per-prompt gammas times
    common factors, less that of constant gammas under the same weights, with a bootstrap interval paired over prompts;
    the two have other nodes, so read it beside that of a prompt-blind head, whose true difference is 0.
    """
    fixed = [point for point in constant if point.setting.rule == "entropy_bound"]
    generator = np.random.default_rng(0)
    count = len(operating.correct)

    def difference(rows: np.ndarray) -> float:
        areas = [
            frontier_area([p.nfe[rows].mean() for p in points], [p.correct[rows].mean() for p in points], nfe_range)
            for points in (learned, fixed)
        ]
        return areas[0] - areas[1]

    draws = [difference(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5])
    varies = np.ptp(operating.gamma) > 0 and np.ptp(difficulty) > 0
    correlation = float(spearmanr(operating.gamma, difficulty)[0]) if varies else 0.0  # pyright: ignore
    mean_gamma = [operating.gamma[difficulty == level].mean() for level in np.unique(difficulty)]
    return {
        "rank_correlation": correlation,
        "gamma_ratio": float(max(mean_gamma) / min(mean_gamma)),
        "gamma_ratio_prompts": float(np.quantile(operating.gamma, 0.95) / np.quantile(operating.gamma, 0.05)),
        "learned_minus_constant": difference(np.arange(count)),
        "low": float(low),
        "high": float(high),
        "slack": slack(np.stack([point.reward_costed for point in fixed]), difficulty),
    }


def slack(reward: np.ndarray, difficulty: np.ndarray) -> float:
    """Mean reward of the best setting per level of difficulty, less that of the best setting for all. *(ours)*

    Cross-fitted: settings are chosen on one half of the prompts and paid on the other, so that noise earns nothing;
    a single prompt has no other half, and 0 is what is known of it.

    Args:
        reward: `[settings, prompts]`.
        difficulty: `[prompts]`.
    """
    if reward.shape[1] < 2:
        return 0.0
    even = np.arange(reward.shape[1]) % 2 == 0
    gains = []
    for choose, pay in ((even, ~even), (~even, even)):
        best = reward[:, choose].mean(1).argmax()
        total = 0.0
        for level in np.unique(difficulty):
            known, own = choose & (difficulty == level), pay & (difficulty == level)
            chosen = reward[:, known].mean(1).argmax() if known.any() else best
            total += float((reward[chosen, own] - reward[best, own]).sum())
        gains.append(total / pay.sum())
    return float(np.mean(gains))


def _row(point: Point) -> dict[str, Any]:
    return {
        "name": point.setting.name,
        "rule": point.setting.rule,
        "parameter": point.setting.parameter,
        "nfe": round(point.mean_nfe, 4),
        "accuracy": round(point.accuracy, 5),
    }
