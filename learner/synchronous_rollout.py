"""Synchronous rollout: the batch that the newest weights generate, in the learner's own process.

What rollout actors, reward processes and the replay buffer do in a distributed run, without waiting for anybody:
prompts in the order of their cursor -> completions -> rewards -> groups with spread -> a batch. With the same weights
it yields the batch of `diffpo train` with `replay.max_staleness=0`, bit for bit (a test holds it to that). Rewards are
scored in this process, without limits: one that hangs or crashes takes the run with it.
"""

import numpy as np

from actors.engine import DenoisingEngine
from actors.group import finished_group, group_requests
from actors.reward_pool import score
from common.config import Config
from common.errors import RunError
from common.lease import FinishedGroup
from common.policy import Policy
from common.tasks import Task
from common.trajectory import decode_group
from learner.batch import Batch, build_batch

SPREAD_ROUNDS = 50  # rounds of replacement for groups without spread before a batch is given up


class SynchronousRollout:
    """Holds the engine and the prompt cursor of one run; `batch` and `adopt` take turns."""

    def __init__(self, config: Config, task: Task, policy: Policy) -> None:
        """`policy` becomes the rollout's own: its precision may change, and `adopt` overwrites it."""
        self.policy = policy.for_rollout(config.rollout)
        self.engine = DenoisingEngine.of(
            self.policy,
            config,
            rule=config.sampler.rule,
            slots=config.rollout.slots,
            fixed_padding=config.deterministic,
        )
        self.discarded = 0  # groups replaced because their rewards were all equal
        self._config = config
        self._task = task
        self._cursor = 0

    def adopt(self, flat: np.ndarray, version: int) -> None:
        """Generate with these weights (`common.weights.to_flat`) from now on."""
        self.engine.adopt(flat, version)

    def batch(self) -> Batch:
        """The next groups; those without spread are replaced by later prompts, as the replay buffer does.

        Raises:
            RunError: when replacement does not fill the batch.
        """
        config, tables = self._config, []
        for _ in range(SPREAD_ROUNDS):
            missing = config.learner.groups_per_step - len(tables)
            if not missing:
                break
            for group in self._groups(missing):
                if group.spread > 0 or not config.replay.drop_no_spread:
                    tables.append(decode_group(group.payload))
                else:
                    self.discarded += 1
        else:
            raise RunError(
                f"{SPREAD_ROUNDS} rounds did not fill a batch of {config.learner.groups_per_step} groups with spread "
                "in their rewards; train the warm start longer, or set replay.drop_no_spread=false"
            )
        width = config.sampler.max_prompt_tokens if config.deterministic else None
        return build_batch(tables, self.policy.vocabulary, width=width, device=self.policy.device)

    def _groups(self, count: int) -> list[FinishedGroup]:
        """The groups of the next prompts, generated and rewarded."""
        config, size = self._config, self._config.learner.group_size
        cursors = range(self._cursor, self._cursor + count)
        self._cursor += count
        examples = [self._task.example("train", cursor) for cursor in cursors]
        requests = []
        for cursor, example in zip(cursors, examples, strict=True):
            ids = tuple(self.policy.encode_prompt(example.prompt))
            requests += group_requests(config, ids, cursor=cursor, number=cursor)
        completions = self.engine.generate(requests)
        found = []
        for place, (cursor, example) in enumerate(zip(cursors, examples, strict=True)):
            own = completions[place * size : (place + 1) * size]
            texts = [self.policy.decode(c.completion_ids.tolist()) for c in own]
            rewards = [scored.rewards for scored in score(self._task, example, texts)]
            found.append(
                finished_group(
                    config, own, rewards, number=cursor, cursor=cursor, attempt=1, worker="synchronous", model_digest=""
                )
            )
        return found
