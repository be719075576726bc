"""Runner: the runs of a study as Ray tasks, side by side, and what has been finished is not run again.

- One warm start for all arms with a seed, kept as `.npy` in `runs/studies`, also for other studies.
- A finished run is one small JSON in the report's folder, written as a whole; it names the digest of its
  configuration, and a run whose configuration has changed since is done again.
- A run that fails, or hangs for longer than `run_minutes`, is named with its cause; the others go on, and the next call
  tries it again.
"""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from rich.console import Console

from common.config import Config
from common.errors import RunError, UserError, one_line
from learner.controller import PATIENT_THREADS
from learner.driver import probe
from learner.run_directory import RunDirectory
from learner.study.grid import Planned, Study, plan
from learner.study.measures import not_finite
from learner.study.report import write_report
from learner.study.single_run import make_warm_start, run_arm

WORK = Path("runs/studies")
DECIMALS = 5  # kept of a result's numbers
CODE = ("common", "actors", "learner", "deploy")

Trainer = Callable[[Config, np.ndarray], dict[str, Any]]
Warmer = Callable[[Config], np.ndarray]


class Runner:
    """Holds a study and its folders; `run` does what is missing."""

    def __init__(
        self,
        name: str,
        study: Study,
        *,
        out: Path,
        console: Console,
        work: Path = WORK,
        seeds: int | None = None,
        train: Trainer = run_arm,
        warm: Warmer = make_warm_start,
    ) -> None:
        self.name, self.study = name, study
        self.runs = plan(study, seeds=seeds)
        self._out, self._folder, self._work = out, out / name, work
        self._console = console
        self._train, self._warm = train, warm
        self._failed: dict[str, str] = {}
        self._made_by: dict[str, Any] = {}
        try:
            for folder in (self._folder, self._work):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{error}; choose another --out, or make room") from error

    def finished(self) -> dict[str, dict[str, Any]]:
        """Results by run name, of runs whose configuration is still the study's."""
        found = {}
        for run in self.runs:
            path = self._folder / f"{run.name}.json"
            if not path.is_file():
                continue
            try:
                result = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error}); remove it, and the run is done again") from error
            if result.get("digest") == run.digest:
                found[run.name] = result
            else:
                self._console.print(f"{run.name}: its configuration has changed since {path} was made; runs again")
        return found

    def report(self, done: dict[str, dict[str, Any]]) -> Path:
        """Write the report of what is finished."""
        return write_report(self.name, self.study, self.runs, done, self._out)

    def run(self, *, jobs: int | None = None) -> Path:
        """Do what is missing; the path of the report.

        Args:
            jobs: runs at once; None is one for every CPU.

        Raises:
            RunError: naming the runs that failed, after all others are done.
        """
        done = self.finished()
        missing = [run for run in self.runs if run.name not in done]
        self._console.print(f"study {self.name}: {len(done)} of {len(self.runs)} runs are finished")
        if missing:
            self._connect()
            try:
                cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
                at_once = jobs or cpus
                self._made_by = {"commit": commit(), "cpus": cpus, "jobs": at_once}  # now: a later edit is not in them
                self._all(missing, done, at_once)
            finally:
                ray.shutdown()
        path = self.report(done)
        if self._failed:
            causes = "; ".join(f"{name}: {cause}" for name, cause in self._failed.items())
            raise RunError(f"{len(self._failed)} of {len(self.runs)} runs failed, the others are in {path}: {causes}")
        return path

    def _connect(self) -> None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            probe(address)
            ray.init(
                address=address, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False, **local
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"Ray at {address!r} cannot be reached ({one_line(error)}); start it, or unset RAY_ADDRESS for a local "
                "one"
            ) from error

    def _all(self, missing: list[Planned], done: dict[str, dict[str, Any]], jobs: int) -> None:
        """Keep `jobs` tasks going until nothing is left; a run starts once its warm start is there."""
        task = {"num_cpus": 1, "runtime_env": PATIENT_THREADS, "max_retries": 2}
        tasks: list[Any] = [ray.remote(**task)(bounded(w, self.study.run_minutes)) for w in (self._warm, self._train)]
        warm, train = tasks
        waiting = list(missing)
        going: dict[Any, tuple[str, Planned]] = {}
        starts: dict[str, Any] = {}
        while waiting or going:
            for run in list(waiting):
                key = run.warm_start_digest
                if len(going) >= jobs:
                    break
                if key not in starts:
                    starts[key] = self._kept_start(key)
                if starts[key] is None and not any(
                    kind == "warm" and r.warm_start_digest == key for kind, r in going.values()
                ):
                    going[warm.remote(run.config)] = ("warm", run)
                elif starts[key] is not None:
                    waiting.remove(run)
                    going[train.remote(run.config, starts[key])] = ("train", run)
            ready, _ = ray.wait(list(going), num_returns=1)
            kind, run = going.pop(ready[0])
            self._take(kind, run, ready[0], starts, waiting, done)
            names = ", ".join(f"{r.name}{' (warm start)' if k == 'warm' else ''}" for k, r in going.values())
            self._console.print(f"{len(done)} of {len(self.runs)} finished; running: {names or 'nothing'}")

    def _kept_start(self, key: str) -> Any:
        path = self._work / f"warm_start-{key}.npy"
        return ray.put(np.load(path)) if path.is_file() else None

    def _take(
        self,
        kind: str,
        run: Planned,
        reference: Any,
        starts: dict[str, Any],
        waiting: list[Planned],
        done: dict[str, dict[str, Any]],
    ) -> None:
        try:
            result: Any = ray.get(reference)
            wrong = not_finite(result) if kind == "train" else None
            if wrong is not None:
                raise RunError(f"{wrong} of its result is not finite")
        except (RayError, RunError) as error:
            cause = one_line(getattr(error, "cause", None) or error)
            concerned = [run]
            if kind == "warm":
                concerned = [other for other in waiting if other.warm_start_digest == run.warm_start_digest]
            for other in concerned:
                self._failed[other.name] = cause
                if other in waiting:
                    waiting.remove(other)
            self._console.print(f"{run.name} failed: {cause}")
            return
        if kind == "warm":
            partial = self._work / f"partial-{run.warm_start_digest}-{os.getpid()}.npy"  # studies share the folder
            np.save(partial, result)
            os.replace(partial, self._work / f"warm_start-{run.warm_start_digest}.npy")
            starts[run.warm_start_digest] = ray.put(result)
            return
        result |= {"arm": run.arm, "seed": run.seed, "digest": run.digest, "overrides": list(run.overrides)}
        result |= self._made_by
        result = json.loads(json.dumps(result), parse_float=lambda digits: round(float(digits), DECIMALS))
        RunDirectory(self._folder).write_json(f"{run.name}.json", result, indent=None)
        done[run.name] = result
        self.report(done)


def bounded(work: Callable[..., Any], minutes: float) -> Callable[..., Any]:
    """`work`, ended by a `RunError` after so many minutes; for the main thread of a process, where Ray runs tasks."""

    def run(*arguments: Any) -> Any:
        def late(*_: Any) -> None:
            raise RunError(f"took longer than run_minutes={minutes:g}; mend a reward that hangs, or raise it")

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, minutes * 60, 1.0)  # again every second: code may swallow exceptions
        try:
            return work(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    return run


def commit() -> str:
    """Short hash of the checkout, with a + if code has changes (the reports themselves do not count); else empty."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
