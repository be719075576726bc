"""SupervisedRun: `diffpo sft`, the warm start alone, in this process."""

import time
from collections.abc import Callable
from typing import Any

import learner.warm_start
from common.config import Config
from learner.pace import Pace
from learner.preflight import preflight
from learner.run_directory import RunDirectory
from learner.trackers import check_trackers, open_trackers


def supervised_run(config: Config, show: Callable[[str, dict[str, Any]], None], *, resume: bool) -> dict[str, Any]:
    """Train to the end, or go on to it.

    Args:
        config: the run.
        show: called with every event, as the controller's are.
        resume: whether the run directory is there.

    Returns:
        `model`: the folder that was written, and `run_directory`.

    Raises:
        UserError: when something the user gave is wrong.
        RunError: when training failed.
    """
    check_trackers(config)
    task = preflight(config, trains=config.warm_start.file is None, evaluates=False)
    directory = RunDirectory.create(config) if not resume else RunDirectory(config.run_directory)
    with directory.lock():
        pace = Pace()
        trackers = open_trackers(config, directory, lambda text: show("warning", {"text": text}))

        def report(values: dict[str, float]) -> None:
            values = values | pace.beside("warm_start", values, time.monotonic())
            trackers.put("warm_start", values)
            directory.append_metrics({"kind": "warm_start", **values})
            show("warm_start", values)

        try:
            folder = directory.warm_start_here()
            learner.warm_start.supervised(config, task, folder, report, directory.supervised_checkpoints)
            directory.keep_warm_start(folder)
            directory.flush_metrics()
        finally:
            trackers.close()
    return {"model": str(directory.warm_start), "run_directory": directory.name}
