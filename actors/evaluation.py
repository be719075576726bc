"""Evaluation: accuracy and NFE of a policy on held-out prompts, one setting of the sampler at a time.

- Every setting answers the same prompts with the same seeds, so differences between settings and policies are paired.
- Greedy (temperature 0) settings draw nothing; sampled ones use keyed numbers.
- Rewards are scored in a reward pool, unless the task is trusted; one that fails costs its prompt: wrong, reward 0.
  Where one after the other takes too long, the evaluation ends.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from actors.engine import DenoisingEngine
from actors.request import Request
from actors.reward_pool import RewardPool, Score, score
from common.config import Config
from common.cost import with_cost
from common.errors import RunError, one_line
from common.keyed_random import derive
from common.policy import Policy
from common.tasks.task import Example, Split, Task
from common.trajectory import Completion

log = logging.getLogger(__name__)

EVALUATION_SEED = 1_000_003  # keeps evaluation draws apart from training draws of the same run seed


@dataclass(frozen=True)
class Setting:
    """One way to sample: a reveal rule, its parameter, and a temperature."""

    name: str
    rule: str
    parameter: float | Literal["sample", "mean", "initial"]
    temperature: float = 0.0


@dataclass(frozen=True)
class Point:
    """What one setting reached; arrays have one entry per prompt."""

    setting: Setting
    correct: np.ndarray
    nfe: np.ndarray
    reward: np.ndarray
    reward_costed: np.ndarray
    components: dict[str, np.ndarray]
    gamma: np.ndarray
    failed: int = 0
    """Prompts whose reward failed; they count as wrong, with reward 0."""
    completions: tuple[str, ...] = ()
    """What each prompt was answered; for records of single answers, summaries do without."""
    failures: tuple[str, ...] = ()
    """Why each prompt's reward failed; empty texts where it did not."""

    @classmethod
    def joined(cls, points: Sequence["Point"]) -> "Point":
        """One point of several of the same setting, which answered different prompts, in their order."""
        return cls(
            setting=points[0].setting,
            correct=np.concatenate([point.correct for point in points]),
            nfe=np.concatenate([point.nfe for point in points]),
            reward=np.concatenate([point.reward for point in points]),
            reward_costed=np.concatenate([point.reward_costed for point in points]),
            components={
                name: np.concatenate([point.components[name] for point in points]) for name in points[0].components
            },
            gamma=np.concatenate([point.gamma for point in points]),
            failed=sum(point.failed for point in points),
            completions=tuple(text for point in points for text in point.completions),
            failures=tuple(text for point in points for text in point.failures),
        )

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_nfe(self) -> float:
        return float(self.nfe.mean())

    def summary(self) -> dict[str, Any]:
        """One row of the results table; the standard error is the binomial one, `components` are d1's metrics."""
        return {
            "setting": self.setting.name,
            "rule": self.setting.rule,
            "temperature": self.setting.temperature,
            "accuracy": self.accuracy,
            "accuracy_se": float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))),
            "nfe": self.mean_nfe,
            "reward": float(self.reward.mean()),
            "reward_costed": float(self.reward_costed.mean()),
            "components": {name: float(values.mean()) for name, values in self.components.items()},
            "gamma": float(np.exp(np.log(np.maximum(self.gamma, 1e-9)).mean())),
            "failed_rewards": self.failed,
        }


class Evaluator:
    """Holds a policy, its held-out prompts and, for a task that is not trusted, a reward pool, until `close`."""

    def __init__(self, policy: Policy, task: Task, config: Config, *, prompts: int, split: Split) -> None:
        self.policy = policy
        self.task = task
        self.config = config
        self.examples: list[Example] = [task.example(split, index) for index in range(prompts)]
        self._prompt_ids = [tuple(policy.encode_prompt(example.prompt)) for example in self.examples]
        self._pool: RewardPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reward processes, if there are any."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def measure(
        self,
        setting: Setting,
        *,
        thresholds: np.ndarray | None = None,
        prompts: range | None = None,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> Point:
        """Accuracy, NFE and reward of every prompt under one setting.

        Args:
            setting: how to sample.
            thresholds: one parameter of the reveal rule per prompt, in place of the setting's.
            prompts: which of the prompts; None is all.
            progress: called after every forward pass and every reward, with what is being done.

        Raises:
            RunError: when completions fail, or one reward after the other takes too long.
        """
        config = self.config
        chosen = range(len(self.examples)) if prompts is None else prompts
        completions = self._completed(setting, thresholds, chosen, progress)
        texts = [self.policy.decode(c.completion_ids.tolist()) for c in completions]
        outcomes = self._scored([self.examples[index] for index in chosen], texts, progress)
        failures = {index: found for index, found in zip(chosen, outcomes, strict=True) if isinstance(found, Exception)}
        if failures:
            index, failure = next(iter(failures.items()))
            log.warning(
                "%s: the reward of %d of %d prompts failed; they count as wrong. Prompt %d: %s",
                *(setting.name, len(failures), len(outcomes), index, one_line(failure)),
            )
        own = thresholds is None and isinstance(setting.parameter, str)
        scale = self.policy.calibration.gamma_scale if own else 1.0  # a given threshold is used as it is
        nothing = Score(dict.fromkeys([*self.task.components, "reward"], 0.0), False)
        scores = [nothing if isinstance(found, Exception) else found for found in outcomes]
        reward = np.array([found.rewards["reward"] for found in scores])
        nfe = np.array([c.nfe for c in completions], dtype=np.int64)
        costed = with_cost(
            torch.from_numpy(reward),
            torch.from_numpy(nfe),
            length=config.sampler.max_completion_tokens,
            speed_weight=config.learner.speed_weight,
            form=config.learner.cost,
        )
        return Point(
            setting=setting,
            correct=np.array([found.correct for found in scores], dtype=bool),
            nfe=nfe,
            reward=reward,
            reward_costed=costed.numpy(),
            components={name: np.array([found.rewards[name] for found in scores]) for name in self.task.components},
            gamma=np.array([c.gamma for c in completions]) * scale,
            failed=len(failures),
            completions=tuple(texts),
            failures=tuple(one_line(found) if isinstance(found, Exception) else "" for found in outcomes),
        )

    def _completed(
        self, setting: Setting, thresholds: np.ndarray | None, chosen: range, progress: Callable[[str], None]
    ) -> list[Completion]:
        """A completion of each chosen prompt; a prompt's draws are keyed by its place among all."""
        slots = min(self.config.rollout.slots, len(chosen))
        engine = DenoisingEngine.of(self.policy, self.config, rule=setting.rule, slots=slots)
        requests = (
            Request(
                prompt_ids=self._prompt_ids[index],
                seed=derive(self.config.run.seed, EVALUATION_SEED, index),
                group=index,
                temperature=setting.temperature,
                threshold=setting.parameter if thresholds is None else float(thresholds[index]),
            )
            for index in chosen
        )
        return engine.generate(requests, lambda done: progress(f"{done} of {len(chosen)} completions"))

    def _scored(
        self, examples: list[Example], texts: list[str], progress: Callable[[str], None]
    ) -> list[Score | Exception]:
        """What each prompt's completion got, or why it could not be scored."""
        if self.task.trusted:
            return [score(self.task, e, [text])[0] for e, text in zip(examples, texts, strict=True)]
        if self._pool is None:
            self._pool = RewardPool(self.task, self.config.rollout)
        progress(f"0 of {len(texts)} rewards")
        try:
            return self._pool.score_each(
                list(zip(examples, texts, strict=True)), lambda done: progress(f"{done} of {len(texts)} rewards")
            )
        except RunError as error:
            self.close()
            raise RunError(f"the evaluation ends: {one_line(error)}") from error


def standard_settings(config: Config) -> list[Setting]:
    """The settings of `diffpo eval`: fixed gammas, the other rules, and the learned threshold greedy and sampled."""
    chosen = config.evaluation
    settings = [Setting(f"eb gamma={gamma:g}", "entropy_bound", gamma) for gamma in chosen.gammas]
    settings += [Setting(f"confidence {value:g}", "confidence", value) for value in chosen.confidences]
    settings += [Setting(f"top-k {count}", "top_k", float(count)) for count in chosen.tokens_per_step]
    own = "initial" if config.learner.train == "model" else "mean"  # as rollouts have it
    settings.append(Setting("learned, greedy", "entropy_bound", own))
    settings.append(Setting("learned, sampled", "entropy_bound", own, config.sampler.temperature))
    return settings
