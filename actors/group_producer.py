"""GroupProducer: leases in, denoised and rewarded groups out.

    lease -> prompt -> G requests -> engine -> G completions -> reward pool -> finished group

- A prompt that cannot be served, logits that are no numbers and a reward that fails are the data's fault.
- A group is dropped by forgetting it: its rows run out unseen.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np
import torch

from actors.engine import DenoisingEngine
from actors.group import finished_group, group_requests
from actors.producer import Fault
from actors.request import Failure
from actors.reward_actor import rewards_of
from actors.reward_pool import Scores
from common.config import Config
from common.errors import RunError, UserError, one_line
from common.histogram import Histogram
from common.lease import FinishedGroup, Lease
from common.policy_loading import open_rollout_policy
from common.tasks import Example, build_task
from common.trajectory import NOT_DRAWN, Completion
from common.weight_store import Snapshot
from common.weights import adopt_base


@dataclass
class _Group:
    """A leased group while it is generated."""

    lease: Lease
    example: Example
    completions: list[Completion | None]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.completions)


class GroupProducer:
    """Owned by one rollout actor, with an engine and a reward pool of its own; lives until `close`."""

    def __init__(self, config: Config, name: str, wake: Callable[[], None]) -> None:
        torch.set_num_threads(config.rollout.threads)
        self.config = config
        self._name, self._wake = name, wake
        self._task = build_task(config.task)
        self._policy = open_rollout_policy(config, self._task)
        self._engine = DenoisingEngine.of(
            self._policy,
            config,
            rule=config.sampler.rule,
            slots=config.rollout.slots,
            fixed_padding=config.deterministic,
        )
        self._engine.version = -1
        self._rewards = rewards_of(config, self._task, wake)
        # by (number, attempt): a lost lease may come back here while its old rows still run out
        self._groups: dict[tuple[int, int], _Group] = {}
        self._rows: dict[int, tuple[tuple[int, int], int]] = {}
        self._scored: SimpleQueue[tuple[_Group, Scores | Exception]] = SimpleQueue()
        self._refused: list[Fault] = []
        self._digest = ""
        kinds = ("reward", "nfe", "tokens", "gamma")
        self._seen = {kind: Histogram(f"rollout_completion_{kind}") for kind in kinds}

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def room(self) -> int:
        if not self._rewards.ready:  # a group that nobody can score would hold up all that come after it
            return 0
        return (self.config.rollout.slots - self._engine.load) // self.config.learner.group_size

    def start(self, lease: Lease) -> None:
        """Queue the completions of one lease."""
        config = self.config
        try:
            example = self._task.example("train", lease.cursor)
            prompt = tuple(self._policy.encode_prompt(example.prompt))
            self._engine.check_prompt(prompt)
        except UserError as error:
            self._refused.append(Fault(lease.number, lease.attempt, str(error)))
            return
        except Exception as error:  # of the task's code
            self._refused.append(Fault(lease.number, lease.attempt, _told(error)))
            return
        key = (lease.number, lease.attempt)
        self._groups[key] = _Group(lease, example, [None] * config.learner.group_size)
        for index, request in enumerate(group_requests(config, prompt, cursor=lease.cursor, number=lease.number)):
            self._rows[self._engine.submit(request)] = (key, index)

    def drop(self, lease: Lease) -> None:
        """Forget a group."""
        self._groups.pop((lease.number, lease.attempt), None)

    def adopt(self, flat: np.ndarray, snapshot: Snapshot) -> None:
        """Take new weights; live rows go on with them."""
        self._engine.adopt(flat, snapshot.version)
        self._digest = snapshot.digest

    def adopt_base(self, arrays: Sequence[np.ndarray]) -> None:
        """Actors of one node share the arrays' memory, unless they compute elsewhere than on the CPU."""
        adopt_base(self._policy, arrays)

    def step(self) -> list[FinishedGroup | Fault]:
        """One denoising step, and the groups whose rewards have arrived."""
        ended: list[FinishedGroup | Fault] = [*self._refused]
        self._refused.clear()
        for handle, outcome in self._engine.step():
            fault = self._take(handle, outcome)
            ended += [fault] if fault else []
        try:
            while True:
                group, scores = self._scored.get_nowait()
                found = self._finish(group, scores)
                ended += [found] if found else []
        except Empty:
            return ended

    def rest(self) -> float | None:
        """0 while rows are denoised or something is to be handed out."""
        return None if self._engine.idle and self._scored.empty() and not self._refused else 0.0

    def gauges(self) -> dict[str, float]:
        """Counters of the engine."""
        cost = self._engine.cost
        return {
            "row_forwards": float(cost.row_forwards),
            "token_forwards": float(cost.token_forwards),
            "probed_positions": float(cost.probed_positions),
            "probed_kl": cost.probed_kl,
            "probed_flips": float(cost.probed_flips),
            **{key: value for seen in self._seen.values() for key, value in seen.values().items()},
        }

    def close(self) -> None:
        """Stop the reward processes."""
        self._rewards.close()

    def _take(self, handle: int, outcome: Completion | Failure) -> Fault | None:
        key, index = self._rows.pop(handle)
        group = self._groups.get(key)
        if group is None:
            return None
        if isinstance(outcome, Failure):
            del self._groups[key]  # its other rows run out unseen
            return Fault(*key, outcome.reason)
        group.completions[index] = outcome
        group.missing -= 1
        if group.missing == 0:
            self._score(group)
        return None

    def _score(self, group: _Group) -> None:
        texts = [self._policy.decode(c.completion_ids.tolist()) for c in group.completions if c is not None]

        def done(outcome: Scores | Exception) -> None:
            self._scored.put((group, outcome))
            self._wake()

        self._rewards.submit(group.example, texts, done)

    def _finish(self, group: _Group, scores: Scores | Exception) -> FinishedGroup | Fault | None:
        lease = group.lease
        if self._groups.pop((lease.number, lease.attempt), None) is None:
            return None
        if isinstance(scores, RunError):  # it is not this group's fault
            raise scores
        if isinstance(scores, Exception):
            return Fault(lease.number, lease.attempt, _told(scores))
        completions = [c for c in group.completions if c is not None]
        for completion, score in zip(completions, scores, strict=True):
            self._seen["reward"].observe(score.rewards["reward"])
            self._seen["nfe"].observe(completion.nfe)
            self._seen["tokens"].observe(int((completion.token_version != NOT_DRAWN).sum()))
            self._seen["gamma"].observe(completion.gamma)
        return finished_group(
            self.config,
            completions,
            [score.rewards for score in scores],
            number=lease.number,
            cursor=lease.cursor,
            attempt=lease.attempt,
            worker=self._name,
            model_digest=self._digest,
        )


def _told(error: Exception) -> str:
    """Where it happened, and on the last line what: notes of the error may follow it in the traceback."""
    where = "".join(traceback.format_exception(error)).rstrip()
    return f"{where}\n{type(error).__name__}: {one_line(error)}"
