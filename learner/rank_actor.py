"""RankActor: a rank of the learner beside rank 0, which it obeys (`learner.ranked_trainer`)."""

import logging
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from common.config import Config
from learner.trainer import BatchRefused

log = logging.getLogger(__name__)

ENDING = "close"


class RankActor:
    """Started by the controller beside the learner actor, and ended with it."""

    def __init__(self, *, config: Config, rank: int) -> None:
        self._config, self._rank = config, rank
        self._orders: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._doing, self._since = "starts", time.monotonic()

    def order(self, name: str, *arguments: Any) -> None:
        """Called by rank 0, from another thread; returns at once."""
        self._orders.put((name, arguments))

    def doing(self) -> str:
        """Called by the watchdog, from another thread."""
        return f"{self._doing} for {time.monotonic() - self._since:.0f} s"

    def follow(self) -> None:
        """Called once by the controller: the whole life of the rank."""
        from learner.policy_trainer import PolicyTrainer  # the controller, which names this class, needs no torch
        from learner.ranks import Ranks

        trainer = PolicyTrainer(self._config, Path())  # the warm start is rank 0's
        while True:
            self._note("waits for an order of rank 0")
            name, arguments = self._orders.get()
            self._note(f"obeys: {name}")
            if name == ENDING:
                trainer.close()
                return
            if name == "begin":
                host, port = arguments
                store = Ranks.store(host, port, self._config.learner.ranks)
                arguments = (Ranks.join(store, self._rank, self._config),)
            try:
                getattr(trainer, name)(*arguments)
            except BatchRefused as refused:  # by all ranks
                log.info("%s", refused)

    def _note(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()
