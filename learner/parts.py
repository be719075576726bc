"""Parts: what a run is made of beside its machinery: who generates, who learns, whether it is evaluated at the end.

The machinery (controller, fleet, buffer, learner actor, checkpoints) is the same for all. Benchmarks run it with
simulated parts, in processes that never load torch: what is heavy is imported where it is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.producer import Producer
from actors.rollout_actor import RolloutActor
from common.config import Config
from learner.trainer import Trainer


@dataclass(frozen=True)
class Parts:
    """Functions that travel to the actors; each must be importable."""

    producer: Callable[[Config, str, Callable[[], None]], Producer]
    trainer: Callable[[Config, Path], Trainer]
    actor: type[RolloutActor] = RolloutActor
    evaluates: bool = True
    ranked_trainer: Callable[[Config, Path], Trainer] | None = None
    """Of rank 0, where the learner has several ranks."""


def _policy_producer(config: Config, name: str, wake: Callable[[], None]) -> Any:
    from actors.group_producer import GroupProducer

    return GroupProducer(config, name, wake)


def _policy_trainer(config: Config, warm_start: Path) -> Any:
    from learner.policy_trainer import PolicyTrainer

    return PolicyTrainer(config, warm_start)


def _ranked_policy_trainer(config: Config, warm_start: Path) -> Any:
    from learner.ranked_trainer import RankedTrainer

    return RankedTrainer(config, warm_start)


POLICY = Parts(producer=_policy_producer, trainer=_policy_trainer, ranked_trainer=_ranked_policy_trainer)
