"""RunDirectory: the files of one run.

    config.yaml            the resolved configuration
    metrics.jsonl          one object per learner step (and per warm-start report)
    warm_start/            the policy RL started from
    segments/              finished groups until they are trained or discarded, in numbered Arrow files
    checkpoints/step-N/    policies, newest `keep_checkpoints`; `manifest.json` is written last
    evaluation.json        before and after, every setting
    pareto.png             the accuracy-NFE frontier before and after
    metrics_target.json    Prometheus `file_sd` target
    controller.json        where `diffpo scale` finds the run

A run directory belongs to one run: an existing one is refused, so nothing is ever overwritten.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from common.config import Config
from common.config_file import dump_config
from common.errors import UserError

ROOT = Path("runs")
MANIFEST = "manifest.json"


class RunDirectory:
    """Created by the driver, written by controller and learner."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a run directory that exists.

        Raises:
            UserError: naming a free name.
        """
        if path.exists():
            raise UserError(
                f"run directory {path} exists; choose another run.name (run.name={_next_name(path)} is free), "
                "or move it away"
            )

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make the directory and write the configuration.

        Raises:
            UserError: when it exists or cannot be made.
        """
        path = config.run_directory
        cls.check_free(path)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"run directory {path} cannot be made: {error}; choose another run.root") from error
        directory = cls(path)
        (directory.path / "config.yaml").write_text(dump_config(config))
        return directory

    @classmethod
    def find(cls, run: str) -> "RunDirectory":
        """The directory of a run that is there, by its path or its name below `runs/`.

        Raises:
            UserError: naming the runs that are there.
        """
        for folder in (Path(run), ROOT / run):
            if folder.is_dir():
                return cls(folder)
        known = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
        raise UserError(f"run {run!r}: no folder of that name, nor {ROOT / run}; runs: {', '.join(known) or 'none'}")

    @property
    def warm_start(self) -> Path:
        return self.path / "warm_start"

    @property
    def segments(self) -> Path:
        return self.path / "segments"

    @property
    def pareto(self) -> Path:
        return self.path / "pareto.png"

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write_json(self, name: str, value: Any, *, indent: int | None = 1) -> Path:
        """Write a file as a whole or not at all."""
        return write_whole(self.path / name, json.dumps(value, indent=indent) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        complete = [path.parent for path in self.path.glob(f"checkpoints/step-*/{MANIFEST}")]
        return sorted(complete, key=lambda folder: int(folder.name.removeprefix("step-")))

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep`."""
        for path in self.checkpoints()[:-keep]:
            shutil.rmtree(path)


def write_whole(path: Path, text: str) -> Path:
    """Write a file as a whole or not at all; of two processes that write it at once, one wins."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _next_name(path: Path) -> str:
    number = 2
    while (path.parent / f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"
