"""PolicyTrainer: the policy, its learner, and what of them a checkpoint holds.

A checkpoint's folder is in Hugging Face layout (`from_pretrained`, `diffpo eval` read it) with the threshold head
beside the model, and `learner_state.pt`: optimizer, schedule, counters, drift remedy, torch's generator. Everything
else that is drawn in a run is keyed by the run's seed and these counters (`common.keyed_random`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from actors.evaluation import Evaluator, Setting
from common.config import Config
from common.errors import RunError, one_line
from common.policy import THRESHOLD_CONFIG, Policy, load_policy, open_policy
from common.tasks import build_task
from common.trajectory import decode_group
from common.weights import to_flat
from learner.batch import build_batch
from learner.learner import Learner
from learner.trainer import Report
from learner.warm_start import supervised

LEARNER_STATE = "learner_state.pt"
REPORTS_PER_WARM_START = 100


class PolicyTrainer:
    """Owned by the learner actor. `warm_start` comes first, then maybe `restore`."""

    def __init__(self, config: Config, warm_start: Path) -> None:
        self.config = config
        self._folder = warm_start
        self._task = build_task(config.task)
        self._policy: Policy
        self._learner: Learner
        self._drift: Evaluator | None = None

    @property
    def steps(self) -> int:
        return self._learner.steps_done

    def warm_start(self, report: Report) -> None:
        """The policy that RL starts from: what an earlier life left, the given model, or a new one that learns now."""
        settings = self.config.warm_start
        every = max(1, settings.steps // REPORTS_PER_WARM_START)

        def progress(values: dict[str, float]) -> None:
            if values["warm_start_steps"] % every == 0 or values["warm_start_steps"] == settings.steps:
                report("warm_start", values)

        if (self._folder / THRESHOLD_CONFIG).is_file():  # written last
            self._policy = load_policy(self._folder, self.config.model, self.config.sampler.threshold)
        elif self.config.model.path is not None:
            self._policy = open_policy(self.config, self._task)
            self._policy.save(self._folder)
        else:
            self._policy = supervised(self.config, self._task, self._folder, progress)
        torch.set_num_threads(self.config.learner.threads)
        if self.config.deterministic:
            torch.use_deterministic_algorithms(True)
        self._learner = Learner(self._policy, self.config.learner)

    def restore(self, folder: Path) -> None:
        """Weights and learner of a checkpoint; the reference policy stays the warm start."""
        saved = load_policy(folder, self.config.model, self.config.sampler.threshold)
        try:
            self._policy.load_state_dict(saved.state_dict())
            state = torch.load(folder / LEARNER_STATE, map_location="cpu", weights_only=True)
            self._learner.restore(state)
        except Exception as error:  # a state can be wrong in more ways than torch has errors for
            reason = one_line(error) or type(error).__name__
            raise RunError(
                f"checkpoint {folder} does not fit this run: {reason}; resume the run it belongs to"
            ) from error

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        config = self.config
        width = config.sampler.max_prompt_tokens if config.deterministic else None
        tables = [decode_group(payload) for payload in payloads]
        batch = build_batch(tables, self._policy.vocabulary, width=width, device=self._policy.device)
        metrics = self._learner.step(batch, version=version)
        return metrics | {"learner_learning_rate": float(self._learner.scheduler.get_last_lr()[0])}

    def weights(self) -> np.ndarray:
        flat = to_flat(self._policy)
        if not np.isfinite(flat).all():
            raise RunError(
                f"{int((~np.isfinite(flat)).sum())} of {flat.size} weights are not finite after step {self.steps}; "
                "resume from the last checkpoint with a lower learner.learning_rate"
            )
        return flat

    def saved(self) -> Callable[[Path], None]:
        policy, weights = (
            self._policy,
            {key: value.detach().cpu().clone() for key, value in self._policy.state_dict().items()},
        )
        state = _copied(self._learner.state())

        def write(folder: Path) -> None:
            policy.save(folder, weights)
            torch.save(state, folder / LEARNER_STATE)

        return write

    def close(self) -> None:
        if self._drift is not None:
            self._drift.close()

    def gauges(self) -> dict[str, float]:
        """NFE and accuracy at the initial gamma on validation prompts: the gauge of threshold drift *(ours)*."""
        every = self.config.evaluation.drift_every
        if not every or self.steps % every or "entropy_bound" not in self.config.sampler.rule:
            return {}
        prompts = self.config.evaluation.drift_prompts
        if self._drift is None:
            self._drift = Evaluator(self._policy, self._task, self.config, prompts=prompts, split="validation")
        point = self._drift.measure(Setting("drift", "entropy_bound", self.config.sampler.threshold.gamma_init))
        return {"drift_nfe": point.mean_nfe, "drift_accuracy": point.accuracy}


def _copied(value: object) -> object:
    """A state with its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
