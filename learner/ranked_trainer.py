"""RankedTrainer: the trainer of rank 0 when a learner has several ranks.

    rank 0: learner actor -> RankedTrainer -> PolicyTrainer          rank r: RankActor -> PolicyTrainer
                                  | orders: begin, restore, train, weights, base, saved     ^
                                  +---------------------------------------------------------+

An order is delivered before rank 0 obeys it itself, so all ranks make the same calls in the same order, and meet in
these (`learner.ranks`). Nobody waits in a collective call while rank 0 waits for a batch.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from common.config import Config
from common.lease import Sample
from learner.policy_trainer import PolicyTrainer
from learner.rank_actor import ENDING
from learner.ranks import Ranks
from learner.trainer import Report


class RankedTrainer:
    """Lives in the learner actor, as a `Trainer`."""

    def __init__(self, config: Config, warm_start: Path) -> None:
        self._config, self._folder = config, warm_start
        self._store = Ranks.store(ray.util.get_node_ip_address(), 0, config.learner.ranks)
        self._trainer = PolicyTrainer(config, warm_start)
        self._others: list[Any] = []

    def lead(self, others: Sequence[Any]) -> None:
        """Called before everything else, with the other ranks' actors."""
        self._others = list(others)

    @property
    def steps(self) -> int:
        return self._trainer.steps

    def warm_start(self, report: Report) -> None:
        """The supervised part is rank 0's alone."""
        self._trainer.open(report)
        self._order("begin", str(self._store.host), int(self._store.port))
        self._trainer.begin(Ranks.join(self._store, 0, self._config))

    def restore(self, folder: Path) -> None:
        self._order("restore", None)
        self._trainer.restore(folder)

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        self._order("train", list(payloads), version)
        return self._trainer.train(payloads, version)

    def recorded(self, sample: Sample) -> pa.Table | None:
        return self._trainer.recorded(sample)

    def weights(self) -> np.ndarray:
        self._order("weights")
        return self._trainer.weights()

    def base(self) -> list[np.ndarray]:
        self._order("base")
        return self._trainer.base()

    def saved(self) -> Callable[[Path], None]:
        self._order("saved")
        return self._trainer.saved()

    def gauges(self) -> dict[str, float]:
        return self._trainer.gauges()

    def close(self) -> None:
        with suppress(RayError):  # whoever is dead already has ended
            self._order(ENDING)
        self._trainer.close()

    def _order(self, name: str, *arguments: Any) -> None:
        ray.get([other.order.remote(name, *arguments) for other in self._others])
