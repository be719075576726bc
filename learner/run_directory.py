"""RunDirectory: the files of one run, in a local file system or an object store.

    config.yaml            the resolved configuration
    metrics.jsonl          one object per learner step (and per warm-start report)
    sft/step-N/            checkpoints of `diffpo sft` while it works
    warm_start/            the policy RL started from
    segments/              finished groups, and the journal, until a durable checkpoint contains them
    checkpoints/step-N/    the whole run at one version, newest `keep_checkpoints` (`common.checkpoint_store`)
    record/                the completions that it was trained on (`learner.run_record`)
    set_aside/             batches that could not be trained on, with the weights that they met
    quarantine.json        prompts that failed twice, with tracebacks
    shards/                what a final evaluation that is going on has finished
    evaluation.json        before and after, every setting
    pareto.png             the accuracy-NFE frontier before and after
    tensorboard/           event files, where `metrics.trackers` asks for them
    wandb.json             id of the run in Weights & Biases, likewise (`wandb/`: its own files)
    metrics_target.json    Prometheus `file_sd` target
    ../_targets/RUN.json   the same, while the run is going on or has failed: Prometheus wants them in one folder
    controller.json        where `diffpo status`, `scale` and `stop` find the run
    lock, buffer.lock      `learner.run_lock`; the buffer's

A run directory belongs to one run: an existing one is refused, so nothing is ever overwritten, and one driver at a
time works on it (`lock`).

In an object store nothing can be appended to: `metrics.jsonl` is written anew now and then, after each checkpoint, and
at the end of each phase, so a process that is killed may take some lines with it; `_targets` and `buffer.lock` are on
the driver's node.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

import xxhash

from common.checkpoint_store import CheckpointStore
from common.config import IN_RAY_JOB, Config
from common.config_file import dump_config, load_config
from common.errors import RunError, UserError, cause
from common.local_copy import cache_folder, local_copy
from common.location import above, below, is_uri
from common.new_folder import writing
from common.place import FAILURES, Place, write_whole
from learner.run_lock import RunLock

CONFIG_FILE = "config.yaml"
EVALUATION = "evaluation.json"
RUN_CONFIG = "run_config.yaml"  # in a checkpoint: the configuration of the run that wrote it
METRICS = "metrics.jsonl"
PARETO = "pareto.png"
ROOT = Path("runs")
WHY = "why.json"  # of a batch that was set aside
TARGETS = "_targets"  # beside the run directories; no run can have the name
LAST_OF_START = "threshold.json"  # of warm_start/ written last
FLUSH_SECONDS = 5.0  # between two uploads of metrics.jsonl, at least
FLUSH_PAUSE = 20.0  # times as long as the last one took


class RunDirectory:
    """Created by the driver, written by controller and learner."""

    def __init__(self, where: str | Path) -> None:
        """`where` is a local path or a URI. Raises UserError when a URI is not understood."""
        try:
            self.place = Place(where)
        except FAILURES as error:
            raise UserError(
                f"run directory {where} cannot be opened: {cause(error)}; give a local folder, or a URI such as "
                "s3://bucket/runs, as run.root"
            ) from error
        self.name = self.place.name
        """Its absolute path or URI."""
        self._lock = RunLock(self.place)
        self._metrics: list[bytes] | None = None
        self._next_flush = 0.0
        self._flushing = threading.Lock()

    @property
    def path(self) -> Path:
        """Of a run directory in a local file system."""
        if self.place.folder is None:
            raise RunError(f"run {self.name} is in an object store; this needs a run.root that is a folder")
        return self.place.folder

    @staticmethod
    def check_free(where: str | Path, command: str = "train") -> None:
        """Refuse a run directory that exists, or that cannot be made; `command` is what would go on with it.

        Raises:
            UserError: naming a free name, or what is in the way.
        """
        directory = RunDirectory(where)
        if directory.exists():
            raise UserError(
                f"run directory {where} exists; go on with it (diffpo {command} --resume {quote(str(where))}), choose "
                f"another run.name (run.name={_next_name(str(where))} is free), or move it away"
            )
        if directory.place.folder is None:
            return
        path = directory.path
        parent = next(folder for folder in path.parents if os.path.exists(folder))
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            why = "cannot be written to" if parent.is_dir() else "is a file"
            raise UserError(f"run directory {where} cannot be made: {parent} {why}; choose another run.root")

    def exists(self) -> bool:
        """Raises UserError when an object store does not answer."""
        if self.place.folder is not None:
            return os.path.exists(self.place.folder)  # Path.exists raises where permission is denied
        try:
            return self.place.exists()
        except FAILURES as error:
            raise UserError(
                f"run directory {self.name} cannot be looked at: {cause(error)}; mend the connection or the "
                "credentials, or choose another run.root"
            ) from error

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make the directory and write the configuration.

        Raises:
            UserError: when it exists or cannot be made.
        """
        where = config.run_directory
        cls.check_free(where)
        directory = cls(where)
        try:
            directory.place.filesystem.create_dir(directory.place.path, recursive=True)
        except FAILURES as error:
            raise UserError(f"run directory {where} cannot be made: {cause(error)}; choose another run.root") from error
        try:
            directory.write_config(config)
        except FAILURES as error:
            directory.place.remove_all()  # without its configuration it could neither be resumed nor begun anew
            raise UserError(
                f"run directory {where} cannot be made: {error}; make room there, or choose another run.root"
            ) from error
        return directory

    def write_config(self, config: Config) -> None:
        """For a run that begins, or goes on with other keys of `learner.resumption.SAFE`; under the lock."""
        self.place.write(CONFIG_FILE, dump_config(config).encode())

    def config(self, overrides: list[str] | None = None) -> Config:
        """The configuration that the run was started with, or went on with, and dotted overrides on top.

        Raises:
            UserError: when there is none, or it is none.
        """
        try:
            text = self.place.read(CONFIG_FILE)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name} is no run directory: it has no {CONFIG_FILE}; start a run with --config FILE"
            ) from error
        except FAILURES as error:
            raise UserError(f"{below(self.name, CONFIG_FILE)} cannot be read ({cause(error)}); mend that") from error
        return load_config(below(self.name, CONFIG_FILE), overrides, text=text)

    @classmethod
    def find(cls, run: str) -> "RunDirectory":
        """The directory of a run that is there, by its path or its name below `runs/`.

        Raises:
            UserError: naming the runs that are there.
        """
        if is_uri(run):
            directory = cls(run)
            if directory.exists():
                return directory
            raise UserError(f"run {run!r}: there is nothing; give run.root/run.name of a run")
        at_home = [Path.home() / ROOT / run] if IN_RAY_JOB in os.environ else []
        for folder in (Path(run), ROOT / run, *at_home):
            if folder.is_dir():
                return cls(folder)
        known = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
        raise UserError(
            f"run {run!r}: no folder of that name, nor {ROOT / run}; runs: {', '.join(known) or 'none'} "
            "(one that is just starting has its folder once Ray is there)"
        )

    @property
    def warm_start(self) -> Place:
        return self.place / "warm_start"

    def has_warm_start(self) -> bool:
        """Whether it is there as a whole."""
        return self.warm_start.holds(LAST_OF_START)

    def warm_start_here(self) -> Path:
        """A folder of this machine that has the warm start, or where it can be made, for `keep_warm_start`.

        Raises:
            RunError: when it cannot be copied from the object store.
        """
        if self.warm_start.folder is not None:
            return self.warm_start.folder
        if self.has_warm_start():
            return local_copy(self.warm_start)
        with writing(cache_folder()):
            cache_folder().mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="warm-start-", dir=cache_folder()))

    def keep_warm_start(self, folder: Path) -> None:
        """Put a warm start that was made in `warm_start_here` where it belongs. Raises RunError when that fails."""
        if self.warm_start.folder is None and (folder / LAST_OF_START).is_file() and not self.has_warm_start():
            self._upload(folder, self.warm_start, last=LAST_OF_START)
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, folder: Path, place: Place, *, last: str) -> None:
        try:
            place.upload(folder, last=last)
        except FAILURES as error:
            raise RunError(f"{place} cannot be written ({cause(error)}); mend the connection or its rights") from error

    @property
    def supervised_checkpoints(self) -> CheckpointStore:
        """Of `diffpo sft`, while it works."""
        return CheckpointStore((self.place / "sft").name)

    @property
    def segments(self) -> str:
        return (self.place / "segments").name

    @property
    def buffer_lock(self) -> Path:
        """On the driver's node, where the buffer is started again when it dies."""
        if self.place.folder is not None:
            return self.place.folder / "buffer.lock"
        cache_folder().mkdir(parents=True, exist_ok=True)
        return cache_folder() / f"buffer-{xxhash.xxh3_64_hexdigest(self.name.encode())}.lock"

    @property
    def set_aside(self) -> Place:
        """A folder for each batch that could not be trained on."""
        return self.place / "set_aside"

    @contextmanager
    def setting_aside(self, step: int, version: int, group: int) -> Iterator[tuple[Path, str]]:
        """A folder to fill with a batch that could not be trained on, and what it will be called.

        It is named after its first group too: the next one meets the same weights.

        Raises:
            RunError: when it cannot be written, or uploaded.
        """
        place = self.set_aside / f"step-{step:06d}-version-{version}-group-{group}"
        if place.folder is not None:
            with writing(place.folder):
                place.folder.mkdir(parents=True, exist_ok=True)  # should the buffer die, it may come once more
                yield place.folder, place.name
            return
        with tempfile.TemporaryDirectory(prefix="diffpo-set-aside-") as folder:
            with writing(Path(folder)):
                yield Path(folder), place.name
            self._upload(Path(folder), place, last=WHY)

    def announce(self, target: list[dict[str, Any]]) -> None:
        """Say where the run's metrics are, in Prometheus' `file_sd` format."""
        self.write_json("metrics_target.json", target)
        self._listed.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._listed, (json.dumps(target) + "\n").encode())

    def withdraw(self) -> None:
        """The run ended as it should, and its endpoint is not missed."""
        self._listed.unlink(missing_ok=True)

    @property
    def _listed(self) -> Path:
        if self.place.folder is not None:
            root = self.place.folder.parent
        else:
            root = (Path.home() if IN_RAY_JOB in os.environ else Path()) / ROOT
        return root / TARGETS / f"{self.place.last}.json"

    def finished_steps(self) -> int | None:
        """How many steps the run was evaluated after; None while it has not finished."""
        try:
            return int(self.read_json(EVALUATION)["steps"])
        except (*FAILURES, ValueError, KeyError, TypeError):
            return None

    def lock(self) -> AbstractContextManager[None]:
        """Held by the driver while its run is alive. Raises UserError when another process holds it."""
        return self._lock.held()

    def check_lock(self) -> None:
        """Raises RunError once another process has taken the lock away."""
        self._lock.check()

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; after half of one that a killed process left, a new line is begun first.

        Raises:
            pa.ArrowException, OSError: when it cannot be written.
        """
        line = json.dumps(row).encode() + b"\n"
        if self.place.folder is not None:
            with (self.place.folder / METRICS).open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(line)
            return
        if self._metrics is None:
            self._metrics = self._metrics_so_far().splitlines(keepends=True)
        self._metrics.append(line)

    def flush_metrics(self, *, now: bool = True) -> None:
        """Upload lines that are only in memory; unless it must be `now`, only now and then. Raises as `append_metrics`.

        May be called from several threads.
        """
        if self._metrics is None or not (now or time.monotonic() >= self._next_flush):
            return
        with self._flushing:
            started = time.monotonic()
            self._next_flush = started + FLUSH_SECONDS
            self.place.write(METRICS, b"".join(self._metrics))
            ended = time.monotonic()
            self._next_flush = ended + max(FLUSH_SECONDS, FLUSH_PAUSE * (ended - started))

    def _metrics_so_far(self) -> bytes:
        try:
            return self.place.read(METRICS)
        except FileNotFoundError:
            return b""

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a process that was killed may have left half of one, which is passed over."""
        rows = []
        for line in self._metrics_so_far().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def write_json(self, name: str, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
        """Write a file as a whole or not at all; `default` as that of `json.dumps`.

        Raises:
            pa.ArrowException, OSError: when it cannot be written.
        """
        self.place.write(name, (json.dumps(value, indent=1, default=default) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.place.read(name))

    def checkpoint_store(self, config: Config) -> CheckpointStore:
        """Where the checkpoints of this run are."""
        elsewhere = config.run.checkpoints
        folder = (self.place / "checkpoints").name if elsewhere is None else below(elsewhere, config.run.name)
        return CheckpointStore(folder)

    def check_unused_checkpoints(self, config: Config) -> None:
        """Refuse (UserError) a new run that would go on from another one's checkpoints, and remove them."""
        store = self.checkpoint_store(config)
        if store.checkpoints() or store.damaged():
            raise UserError(
                f"{store.name} holds checkpoints of another run of this name; choose another run.name or "
                "run.checkpoints, or move them away"
            )


def _next_name(where: str) -> str:
    parent, name = above(where)
    number = 2
    while RunDirectory(below(parent or ".", f"{name}-{number}")).exists():
        number += 1
    return f"{name}-{number}"
