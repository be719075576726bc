"""QuarantineReport: which groups failed by their own data, with examples and tracebacks, in `RUN/quarantine.json`."""

import asyncio
from collections.abc import Sequence
from typing import Any

from common.config import Config
from common.place import FAILURES
from common.tasks import Task, build_task
from learner.run_directory import RunDirectory


class QuarantineReport:
    """Owned by the controller; builds the run's task when the first group has failed."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self._config, self._directory = config, directory
        self._task: Task | None = None

    def written(self) -> int:
        """How many groups an earlier report of the run names; 0 without one that can be read."""
        try:
            return len(self._directory.read_json("quarantine.json"))
        except (*FAILURES, ValueError, TypeError):
            return 0

    async def write(self, found: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Write all of them down.

        Args:
            found: number and reason of every group that is quarantined, newest last; at least one.

        Returns:
            `group` and `reason` (the last line) of the newest, and how many are `quarantined`.

        Raises:
            pa.ArrowException, OSError: when the file cannot be written.
        """
        if self._task is None:
            self._task = await asyncio.to_thread(build_task, self._config.task)
        kept = [{"group": n, "example": _fields(self._task, n), "reason": reason} for n, reason in found]
        self._directory.write_json("quarantine.json", kept, default=str)  # a user's task may have any fields
        group, reason = found[-1]
        return {"group": group, "reason": reason.strip().splitlines()[-1], "quarantined": len(found)}


def _fields(task: Task, cursor: int) -> dict[str, Any] | None:
    """Of an example; None of one that cannot be made, which may be why its group failed."""
    try:
        return vars(task.example("train", cursor))
    except Exception:
        return None
