"""LearnerActor: the learner's loop as a Ray actor.

    warm_start()  ->  run(buffer): publish version 0, then {sample, step, publish, report} until done or closed

- It waits for nobody but the buffer; generation goes on while it learns.
- A closed buffer ends the loop after the step in hand; the last checkpoint is always written.
"""

import logging
import time
from pathlib import Path
from typing import Any

import ray
import torch

from actors.evaluation import Evaluator, Setting
from common.config import Config
from common.lease import Batch as Sampled
from common.policy import Policy, open_policy
from common.tasks import build_task
from common.trajectory import decode_group
from common.weight_store import Snapshot, digest
from common.weights import to_flat
from learner.batch import build_batch
from learner.checkpoint import write_checkpoint
from learner.learner import Learner
from learner.run_directory import RunDirectory
from learner.warm_start import supervised

log = logging.getLogger(__name__)

REPORTS_PER_WARM_START = 100


class LearnerActor:
    """Started by the controller; warm-starts the policy, trains it, writes its checkpoints."""

    def __init__(self, *, config: Config, directory: Path, controller: Any) -> None:
        self.config = config
        self._directory = RunDirectory(directory)
        self._controller = controller
        self._task = build_task(config.task)
        self._policy: Policy
        self._drift: Evaluator | None = None

    def warm_start(self) -> None:
        """Make the policy that RL starts from, and save it: the given model, or a new one after its demonstrations."""
        settings = self.config.warm_start
        if self.config.model.path is not None:
            self._policy = open_policy(self.config, self._task)
            self._policy.save(self._directory.warm_start)
            return
        every = max(1, settings.steps // REPORTS_PER_WARM_START)

        def report(step: int, loss: float) -> None:
            if step % every == 0 or step == settings.steps:
                self._report("warm_start", {"warm_start_steps": float(step), "warm_start_loss": loss})

        self._policy = supervised(self.config, self._task, self._directory.warm_start, report)

    def run(self, buffer: Any) -> dict[str, float]:
        """The training loop; returns steps and version reached."""
        try:
            return self._train(buffer)
        finally:
            if self._drift is not None:
                self._drift.close()

    def _train(self, buffer: Any) -> dict[str, float]:
        config = self.config
        torch.set_num_threads(config.learner.threads)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        learner = Learner(self._policy, config.learner)
        version = 0
        self._publish(buffer, version, [])
        self._measure_drift(0)
        for step in range(1, config.learner.steps + 1):
            sampled: Sampled = ray.get(buffer.sample.remote())
            if not sampled.numbers:
                log.warning("buffer closed after %d of %d steps", step - 1, config.learner.steps)
                break
            started = time.monotonic()
            tables = [decode_group(payload) for payload in sampled.payloads]
            width = config.sampler.max_prompt_tokens if config.deterministic else None
            batch = build_batch(tables, self._policy.vocabulary, width=width, device=self._policy.device)
            metrics = learner.step(batch, version=sampled.version)
            version = sampled.version + 1
            metrics["weights_bytes"] = float(self._publish(buffer, version, sampled.numbers))
            metrics |= {f"rollout_generated_{name}": value for name, value in sampled.generated.items()}
            metrics["learner_step_seconds"] = time.monotonic() - started
            metrics["learner_learning_rate"] = float(learner.scheduler.get_last_lr()[0])
            metrics |= self._measure_drift(step)
            self._report("step", metrics | {"learner_steps": float(step), "weights_version": float(version)})
            if config.run.checkpoint_every and step % config.run.checkpoint_every == 0 and step < config.learner.steps:
                self._checkpoint(learner, version)
        self._checkpoint(learner, version)
        return {"steps": float(learner.steps_done), "version": float(version)}

    def _publish(self, buffer: Any, version: int, trained: list[int]) -> int:
        flat = to_flat(self._policy)
        snapshot = Snapshot(version=version, digest=digest(flat), payload=[ray.put(flat)])
        ray.get(buffer.publish.remote(snapshot, trained))
        return flat.nbytes

    def _measure_drift(self, step: int) -> dict[str, float]:
        """NFE and accuracy at the initial gamma on validation prompts: the gauge of threshold drift *(ours)*."""
        every = self.config.evaluation.drift_every
        if not every or step % every or "entropy_bound" not in self.config.sampler.rule:
            return {}
        prompts = self.config.evaluation.drift_prompts
        if self._drift is None:
            self._drift = Evaluator(self._policy, self._task, self.config, prompts=prompts, split="validation")
        point = self._drift.measure(Setting("drift", "entropy_bound", self.config.sampler.threshold.gamma_init))
        return {"drift_nfe": point.mean_nfe, "drift_accuracy": point.accuracy}

    def _checkpoint(self, learner: Learner, version: int) -> None:
        folder = self._directory.checkpoint_path(learner.steps_done)
        if not folder.exists():
            write_checkpoint(learner, folder, version=version)
            self._directory.prune_checkpoints(self.config.run.keep_checkpoints)

    def _report(self, kind: str, values: dict[str, float]) -> None:
        self._controller.report.remote(kind, values)
