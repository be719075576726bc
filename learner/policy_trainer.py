"""PolicyTrainer: the policy, its learner, and what of them a checkpoint holds.

A checkpoint's folder is in Hugging Face layout (`from_pretrained`, `diffpo eval` read it) with the threshold head
beside the model, and `learner_state.pt`: optimizer, schedule, counters, drift remedy, torch's generator. Everything
else that is drawn in a run is keyed by the run's seed and these counters (`common.keyed_random`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.evaluation import Evaluator, Setting
from common.adapter import Base, adapt, adapted, learned_state
from common.config import Config
from common.errors import RunError, one_line
from common.lease import Sample
from common.policy import THRESHOLD_CONFIG, Policy
from common.policy_loading import load_policy, on_cpu, open_empty_policy, open_policy, read_learned
from common.tasks import build_task
from common.trajectory import decode_group
from common.weights import adopt_base, base_arrays, load_flat, not_finite, to_flat
from learner.batch import build_batch
from learner.learner import Learner
from learner.ranks import Ranks
from learner.record_rows import record_rows
from learner.trainer import Report
from learner.warm_start import save_start, supervised

LEARNER_STATE = "learner_state.pt"
REPORTS_PER_WARM_START = 100


class PolicyTrainer:
    """Owned by the learner actor. `warm_start` comes first, then maybe `restore`."""

    def __init__(self, config: Config, warm_start: Path) -> None:
        self.config = config
        # of a model that several ranks share out, none ever has the whole on its device
        self._opened = on_cpu(config) if config.learner.ranks > 1 else config
        self._folder = warm_start
        self._task = build_task(config.task)
        self._policy: Policy
        self._learner: Learner
        self._ranks = Ranks()
        self._newest = np.empty(0, np.float32)
        self._base: list[np.ndarray] = []
        self._drift: Evaluator | None = None
        self._tables: list[pa.Table] = []

    @property
    def steps(self) -> int:
        return self._learner.steps_done

    def warm_start(self, report: Report) -> None:
        self.open(report)
        self.begin(self._ranks)

    def open(self, report: Report) -> None:
        """The policy that RL starts from: what an earlier life left, the given model, or a new one that learns now."""
        settings = self.config.warm_start
        every = max(1, settings.steps // REPORTS_PER_WARM_START)

        def progress(values: dict[str, float]) -> None:
            step, measured = values["warm_start_steps"], "warm_start_held_out_loss" in values
            if step % every == 0 or step == settings.steps or measured:
                report("warm_start", values)

        if (self._folder / THRESHOLD_CONFIG).is_file():  # written last
            model, threshold = self._opened.model, self.config.sampler.threshold
            self._policy = load_policy(self._folder, model, threshold, seed=self.config.run.seed)
        elif self.config.model.path is not None:
            self._policy = open_policy(self._opened, self._task)
            save_start(self._policy, self._folder)
        else:
            policy = supervised(self.config, self._task, self._folder, progress)
            self._policy = policy.to(self._opened.model.device)
            if self.config.model.lora is not None:
                base = Base.of(self._folder)
                adapt(self._policy.model, self.config.model.lora, base, seed=self.config.run.seed)

    def begin(self, ranks: Ranks) -> None:
        """The learner; called by all ranks at once, of which those that have opened nothing get rank 0's policy."""
        self._ranks = ranks
        torch.set_num_threads(self.config.learner.threads)
        if self.config.deterministic:
            torch.use_deterministic_algorithms(True)
        if not ranks.leads:
            self._policy = open_empty_policy(self._opened, self._task, torch.float32)
        self._learner = Learner(self._policy, self.config.learner, ranks)

    def restore(self, folder: Path | None) -> None:
        """Weights and learner of a checkpoint, which only rank 0 reads; the reference policy stays the warm start."""
        saved = None
        if folder is not None and not adapted(self._policy):
            saved = load_policy(folder, on_cpu(self.config).model, self.config.sampler.threshold).state_dict()
        try:
            state = None
            if folder is not None:
                saved = read_learned(self._policy, folder) if saved is None else saved
                state = torch.load(folder / LEARNER_STATE, map_location="cpu", weights_only=True)
            self._ranks.load(self._policy, saved)
            self._learner.restore(state)
        except Exception as error:  # a state can be wrong in more ways than torch has errors for
            reason = one_line(error) or type(error).__name__
            raise RunError(
                f"checkpoint {folder} does not fit this run: {reason}; resume the run it belongs to"
            ) from error

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        config = self.config
        width = config.sampler.max_prompt_tokens if config.deterministic else None
        self._tables = [decode_group(payload) for payload in payloads]
        batch = build_batch(self._tables, self._policy.vocabulary, width=width, device=self._policy.device)
        metrics = self._learner.step(batch, version=version)
        return metrics | {"learner_learning_rate": float(self._learner.scheduler.get_last_lr()[0])}

    def recorded(self, sample: Sample) -> pa.Table | None:
        return record_rows(
            self._tables,
            self._learner.observed(),
            self._policy.tokenizer,
            step=self.steps,
            version=sample.version,
            numbers=sample.numbers,
            staleness=sample.staleness,
            seconds=sample.seconds,
        )

    def weights(self) -> np.ndarray:
        how = {"narrow": self._narrow, "keep": self._ranks.leads}
        (wrong,) = self._ranks.sum(not_finite(self._policy, **how))
        if wrong and not self.steps:
            raise RunError(
                f"{wrong:.0f} of the weights to start from are not finite; start another run with another model.path "
                "or warm start"
            )
        if wrong:
            raise RunError(
                f"{wrong:.0f} of the published weights are not finite after step {self.steps}; "
                "start another run with model.path=RUN/checkpoints/STEP and a lower learner.learning_rate"
            )
        flat = to_flat(self._policy, **how)
        if self._measures_copy:
            self._newest = flat
        return flat

    def base(self) -> list[np.ndarray]:
        arrays = base_arrays(self._policy, narrow=self._narrow, keep=self._ranks.leads)
        if self._measures_copy:
            self._base = arrays
        return arrays

    @property
    def _measures_drift(self) -> bool:
        return bool(self.config.evaluation.drift_every) and "entropy_bound" in self.config.sampler.rule

    @property
    def _measures_copy(self) -> bool:
        """Whether drift is measured on a whole policy beside the shard."""
        return self._measures_drift and self._ranks.count > 1 and self._ranks.leads

    @property
    def _narrow(self) -> bool:
        return self.config.rollout.precision == "bfloat16"

    def saved(self) -> Callable[[Path], None]:
        policy = self._policy
        weights, state = self._ranks.kept(learned_state(policy)), self._ranks.kept(self._learner.state())

        def write(folder: Path) -> None:
            policy.save(folder, weights)
            torch.save(state, folder / LEARNER_STATE)

        return write

    def close(self) -> None:
        if self._drift is not None:
            self._drift.close()
        self._ranks.leave()

    def gauges(self) -> dict[str, float]:
        """NFE and accuracy at the initial gamma on validation prompts: the gauge of threshold drift *(ours)*."""
        if not self._measures_drift or self.steps % self.config.evaluation.drift_every:
            return {}
        prompts = self.config.evaluation.drift_prompts
        if self._drift is None:
            self._drift = Evaluator(self._measured(), self._task, self.config, prompts=prompts, split="validation")
        if self._ranks.count > 1:
            load_flat(self._drift.policy, self._newest)
        point = self._drift.measure(Setting("drift", "entropy_bound", self.config.sampler.threshold.gamma_init))
        return {"drift_nfe": point.mean_nfe, "drift_accuracy": point.accuracy}

    def _measured(self) -> Policy:
        """The policy whose drift is measured: where it is sharded, a whole one beside it, in rollout's precision."""
        if self._ranks.count == 1:
            return self._policy
        dtype = torch.bfloat16 if self._narrow else torch.float32
        policy = open_empty_policy(self.config, self._task, dtype).for_rollout(self.config.rollout)
        adopt_base(policy, self._base)
        return policy
