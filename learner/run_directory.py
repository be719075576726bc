"""RunDirectory: the files of one run.

    config.yaml            the resolved configuration
    metrics.jsonl          one object per learner step (and per warm-start report)
    sft/step-N/            checkpoints of `diffpo sft` while it works
    warm_start/            the policy RL started from
    segments/              finished groups, and the journal, until a durable checkpoint contains them
    checkpoints/step-N/    the whole run at one version, newest `keep_checkpoints` (`common.checkpoint_store`)
    set_aside/             batches that could not be trained on, with the weights that they met
    quarantine.json        prompts that failed twice, with tracebacks
    shards/                what a final evaluation that is going on has finished
    evaluated/             the checkpoint that it measures, where checkpoints are in an object store
    evaluation.json        before and after, every setting
    pareto.png             the accuracy-NFE frontier before and after
    metrics_target.json    Prometheus `file_sd` target
    ../_targets/RUN.json   the same, while the run is going on or has failed: Prometheus wants them in one folder
    controller.json        where `diffpo status`, `scale` and `stop` find the run

A run directory belongs to one run: an existing one is refused, so nothing is ever overwritten, and one driver at a
time works on it (`lock`).
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.checkpoint_store import CheckpointStore
from common.config import IN_RAY_JOB, Config
from common.config_file import dump_config
from common.errors import UserError, cause

CONFIG_FILE = "config.yaml"
EVALUATION = "evaluation.json"
ROOT = Path("runs")
TARGETS = "_targets"  # beside the run directories; no run can have the name


class RunDirectory:
    """Created by the driver, written by controller and learner."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @staticmethod
    def check_free(path: Path, command: str = "train") -> None:
        """Refuse a run directory that exists, or that cannot be made; `command` is what would go on with it.

        Raises:
            UserError: naming a free name, or what is in the way.
        """
        if os.path.exists(path):  # Path.exists raises where permission is denied
            raise UserError(
                f"run directory {path} exists; go on with it (diffpo {command} --resume {path}), choose another "
                f"run.name (run.name={_next_name(path)} is free), or move it away"
            )
        above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            why = "cannot be written to" if above.is_dir() else "is a file"
            raise UserError(f"run directory {path} cannot be made: {above} {why}; choose another run.root")

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
        try:
            directory.write_config(config)
        except OSError as error:
            path.rmdir()  # without its configuration it could neither be resumed nor begun anew
            raise UserError(
                f"run directory {path} cannot be made: {error}; make room there, or choose another run.root"
            ) from error
        return directory

    def write_config(self, config: Config) -> None:
        """For a run that begins, or goes on with other keys of `learner.resumption.SAFE`; under the lock."""
        write_whole(self.path / CONFIG_FILE, dump_config(config))

    @classmethod
    def find(cls, run: str) -> "RunDirectory":
        """The directory of a run that is there, by its path or its name below `runs/`.

        Raises:
            UserError: naming the runs that are there.
        """
        at_home = [Path.home() / ROOT / run] if IN_RAY_JOB in os.environ else []
        for folder in (Path(run), ROOT / run, *at_home):
            if folder.is_dir():
                return cls(folder)
        known = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
        raise UserError(f"run {run!r}: no folder of that name, nor {ROOT / run}; runs: {', '.join(known) or 'none'}")

    @property
    def warm_start(self) -> Path:
        return self.path / "warm_start"

    @property
    def supervised_checkpoints(self) -> CheckpointStore:
        """Of `diffpo sft`, while it works."""
        return CheckpointStore(self.path / "sft")

    @property
    def segments(self) -> Path:
        return self.path / "segments"

    def set_aside(self, step: int, version: int, group: int) -> Path:
        """Folder of a batch that could not be trained on, by its first group: the next one meets the same weights."""
        return self.path / "set_aside" / f"step-{step:06d}-version-{version}-group-{group}"

    @property
    def pareto(self) -> Path:
        return self.path / "pareto.png"

    def announce(self, target: list[dict[str, Any]]) -> None:
        """Say where the run's metrics are, in Prometheus' `file_sd` format."""
        self.write_json("metrics_target.json", target)
        self._listed.parent.mkdir(exist_ok=True)
        write_whole(self._listed, json.dumps(target) + "\n")

    def withdraw(self) -> None:
        """The run ended as it should, and its endpoint is not missed."""
        self._listed.unlink(missing_ok=True)

    @property
    def _listed(self) -> Path:
        return self.path.parent / TARGETS / f"{self.path.name}.json"

    def finished_steps(self) -> int | None:
        """How many steps the run was evaluated after; None while it has not finished."""
        try:
            return int(self.read_json(EVALUATION)["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the driver while its run is alive.

        Raises:
            UserError: when another process holds it.
        """
        held = FileLock(self.path / "lock")
        try:
            held.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"run {self.path} is going on in another process; stop that one first, or choose another run.name"
            ) from error
        except OSError as error:
            raise UserError(
                f"run {self.path} cannot be locked ({cause(error)}); mend the permissions of the folder and of `lock` "
                "in it, or choose another run.name"
            ) from error
        try:
            yield
        finally:
            held.release()

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; after half of one that a killed process left, a new line is begun first."""
        with (self.path / "metrics.jsonl").open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a process that was killed may have left half of one, which is passed over."""
        rows = []
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def write_json(
        self, name: str, value: Any, *, indent: int | None = 1, default: Callable[[Any], Any] | None = None
    ) -> Path:
        """Write a file as a whole or not at all; `default` as that of `json.dumps`."""
        return write_whole(self.path / name, json.dumps(value, indent=indent, default=default) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def checkpoint_store(self, config: Config) -> CheckpointStore:
        """Where the checkpoints of this run are."""
        elsewhere = config.run.checkpoints
        return CheckpointStore(self.path / "checkpoints" if elsewhere is None else f"{elsewhere}/{config.run.name}")


def write_whole(path: Path, text: str) -> Path:
    """Write a file as a whole or not at all; of two processes that write it at once, one wins.

    Raises:
        OSError: naming the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:  # of a full disk it would name none
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _next_name(path: Path) -> str:
    number = 2
    while (path.parent / f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"
