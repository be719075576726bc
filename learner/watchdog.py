"""Watchdog: ends a run that stands still.

- In the training phase only groups that can be trained count as progress: discarding every group for equal rewards is
  none. In the evaluation every forward pass and every reward counts.
- A run that lacks nodes waits for them for `run.capacity_timeout`, anything else for `run.stall_timeout`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from common.config import RunConfig
from common.errors import RunError
from common.place import FAILURES
from learner.capacity import NODE_SECONDS
from learner.run_directory import RunDirectory


class Watchdog:
    """Owned by the controller, which tells it of progress."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        lacking: Callable[[], str],
        who_waits: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        """
        Args:
            config: its limits.
            directory: where `stall.json` is left.
            lacking: what the run cannot go on without; empty while it has its nodes.
            who_waits: what every part is doing, and the `phase`.
        """
        self._config, self._directory = config, directory
        self._lacking, self._who_waits = lacking, who_waits
        self._progressed = time.monotonic()
        self.untrainable = ""
        """Why groups were generated that cannot be trained; follows "no progress" in the message."""

    def mark(self) -> None:
        """There was progress."""
        self._progressed = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since there was progress."""
        return time.monotonic() - self._progressed

    async def watch(self) -> None:
        """Raises RunError when nothing has progressed for too long; sleeps until the moment that could be."""
        limit, patience = self._config.stall_timeout, self._config.capacity_timeout
        while True:
            idle, lacking = self.idle, self._lacking()
            if lacking and idle < patience:
                await asyncio.sleep(NODE_SECONDS)
            elif lacking:
                raise RunError(
                    f"no nodes for {idle:.0f} s (run.capacity_timeout={patience:g}): {lacking}; add such nodes, or ask "
                    "for less (cpus, gpus and labels of rollout and learner)"
                )
            elif idle < limit:
                await asyncio.sleep(limit - idle)
            else:
                waits = await self._who_waits()
                with suppress(*FAILURES):  # the message says the same
                    self._directory.write_json("stall.json", waits)
                raise RunError(
                    f"no progress for {idle:.0f} s in phase {waits['phase']} (run.stall_timeout={limit:g})"
                    f"{self.untrainable}; raise the limit if single groups or steps take longer, else look at the "
                    f"actors' logs; who waits for whom (RUN/stall.json): {waits}"  # long: what follows may be cut
                )
