"""Runner: the runs of a study as Ray tasks, side by side, and what has been finished is not run again.

- One warm start for all arms with a seed, kept as `.npy` in `runs/studies`, also for other studies.
- Everything is checked before Ray starts: the folders can be written, every arm could train.
- A finished run is one small JSON in the report's folder, written as a whole; it names the digest of its
  configuration, and a run whose configuration has changed since is done again.
- A run that fails, or hangs for longer than `run_minutes`, is named with its cause; the others go on, and the next call
  tries it again. A signal ends the call; what is finished stays.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from rich.console import Console

from common.config import Config
from common.errors import RunError, Stopped, UserError, one_line
from common.place import write_whole
from learner.learner_ranks import PATIENT_THREADS
from learner.preflight import preflight
from learner.ray_connection import chosen_address, connect
from learner.study.grid import Planned, Study, plan
from learner.study.measures import not_finite
from learner.study.report import write_report
from learner.study.result import read_result
from learner.study.single_run import make_warm_start, run_arm
from learner.study.warm_starts import WarmStarts

WORK = Path("runs/studies")
DECIMALS = 5  # kept of a result's numbers
CODE = ("common", "actors", "learner", "deploy")
CLOCK = """
import os, select, signal, sys
seconds = float(sys.argv[2])
for number in [signal.SIGUSR2] * 60 + [signal.SIGKILL]:  # every second: code may swallow exceptions
    if select.select([sys.stdin], [], [], seconds)[0]:
        break
    os.kill(int(sys.argv[1]), number)
    seconds = 1.0
"""
"""The program that keeps a run's time: SIGUSR2 to a process after some seconds, and in the end SIGKILL."""

Trainer = Callable[[Config, np.ndarray, int], dict[str, Any]]
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
        self._starts = WarmStarts(work, console)
        self._train, self._warm = train, warm
        self._failed: dict[str, str] = {}
        self._made_by: dict[str, Any] = {}
        try:
            for folder in (self._folder, self._work):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{error}; choose another --out, or make room") from error
        self._refuse_to_leave_out(seeds)

    def _refuse_to_leave_out(self, seeds: int | None) -> None:
        """Fewer seeds than are finished would write over the fuller report."""
        parts = {path.stem: path.stem.partition("-seed") for path in self._folder.glob("*-seed*.json")}
        done = {
            name: int(seed) for name, (arm, _, seed) in parts.items() if arm in self.study.arms and seed.isdecimal()
        }
        left = sorted(done.keys() - {run.name for run in self.runs})
        if left:
            enough = done.keys() <= {run.name for run in plan(self.study)}
            way_out = "leave --seeds out" if enough else f"give --seeds {max(done.values()) + 1}"
            given = "the study's own seeds" if seeds is None else f"--seeds {seeds}"
            raise UserError(
                f"{given} would leave {len(left)} finished runs ({left[0]}, ...) out of the report in {self._out}; "
                f"{way_out}, or choose another --out"
            )

    def finished(self) -> dict[str, dict[str, Any]]:
        """Results by run name, of runs whose configuration is still the study's."""
        found = {}
        for run in self.runs:
            path = self._folder / f"{run.name}.json"
            if not path.is_file():
                continue
            result = read_result(path, arm=run.arm, seed=run.seed, digest=run.digest)
            if result is not None:
                found[run.name] = result
            else:
                self._console.print(f"{run.name}: its configuration has changed since {path} was made; runs again")
        return found

    def report(self, done: dict[str, dict[str, Any]]) -> Path:
        """Write the report of what is finished.

        Raises:
            RunError: when it cannot be written.
        """
        try:
            return write_report(self.name, self.study, self.runs, done, self._out)
        except OSError as error:
            raise RunError(
                f"the report in {self._out} cannot be written ({error.strerror or error}); make room, and `--report` "
                "makes it again"
            ) from error

    def run(self, *, jobs: int | None = None) -> Path:
        """Do what is missing; the path of the report.

        Args:
            jobs: runs at once; None is one for every CPU.

        Raises:
            RunError: naming the runs that failed, after all others are done.
        """
        self._failed = {}
        done = self.finished()
        missing = [run for run in self.runs if run.name not in done]
        self._console.print(f"study {self.name}: {len(done)} of {len(self.runs)} runs are finished")
        if missing:
            self._check(missing)
            connect(chosen_address(), way_out="start it, or unset RAY_ADDRESS for a local one")
            try:
                cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
                at_once = jobs or cpus
                self._made_by = {"commit": commit(), "cpus": cpus, "jobs": at_once}  # now: a later edit is not in them
                with ended_by_signals():  # once Ray has set its own handlers
                    self._all(missing, done, at_once)
            except Stopped as stop:
                self._console.print(
                    f"stopped by {stop}: {len(done)} of {len(self.runs)} runs are finished; the same command goes on"
                )
                raise
            finally:
                ray.shutdown()
        causes = "; ".join(f"{name}: {cause}" for name, cause in self._failed.items())
        failed = f"{len(self._failed)} of {len(self.runs)} runs failed: {causes}" if causes else ""
        try:
            path = self.report(done)
        except RunError as error:
            raise RunError("; ".join(filter(None, (failed, str(error))))) from error
        if failed:
            raise RunError(f"{failed}; the others are in {path}")
        return path

    def _check(self, missing: list[Planned]) -> None:
        """Refuse folders that cannot be written, and arms that could not train; an arm's seeds differ in nothing."""
        for folder in (self._out, self._folder, self._work):
            try:
                with TemporaryFile(dir=folder) as file:
                    file.write(b"0" * 4096)
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error}); choose another --out, or make room") from error
        for arm, config in {run.arm: run.config for run in missing}.items():
            try:
                preflight(config)
            except UserError as error:
                raise UserError(f"arm {arm}: {error}") from error

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
                    kept = self._starts.kept(run)
                    starts[key] = None if kept is None else ray.put(kept)
                if starts[key] is None and not any(
                    kind == "warm" and r.warm_start_digest == key for kind, r in going.values()
                ):
                    going[warm.remote(run.config)] = ("warm", run)
                elif starts[key] is not None:
                    waiting.remove(run)
                    going[train.remote(run.config, starts[key], run.staleness)] = ("train", run)
            names = ", ".join(f"{r.name}{' (warm start)' if k == 'warm' else ''}" for k, r in going.values())
            self._console.print(f"{len(done)} of {len(self.runs)} finished; running: {names}")
            ready, _ = ray.wait(list(going), num_returns=1)
            kind, run = going.pop(ready[0])
            try:
                result: Any = ray.get(ready[0])
                wrong = not_finite(result) if kind == "train" else None
                if wrong is not None:
                    raise RunError(f"{wrong} of its result is not finite")
            except (RayError, RunError) as error:
                self._give_up(kind, run, one_line(getattr(error, "cause", None) or error), waiting)
                continue
            if kind == "warm":
                starts[run.warm_start_digest] = ray.put(result)
                self._starts.keep(run, result)
            else:
                done[run.name] = self._save(run, result)
                self._report_so_far(done)

    def _give_up(self, kind: str, run: Planned, cause: str, waiting: list[Planned]) -> None:
        """Name a run that failed; with a warm start, all runs that wait for it."""
        concerned = [run]
        if kind == "warm":
            concerned = [other for other in waiting if other.warm_start_digest == run.warm_start_digest]
        for other in concerned:
            self._failed[other.name] = cause
            if other in waiting:
                waiting.remove(other)
        self._console.print(f"{run.name} failed: {cause}")

    def _save(self, run: Planned, result: dict[str, Any]) -> dict[str, Any]:
        """Write a finished run, in a temporary folder where the report's has no room; what is in the file."""
        result |= {"arm": run.arm, "seed": run.seed, "digest": run.digest, "overrides": list(run.overrides)}
        result |= self._made_by
        result = json.loads(json.dumps(result), parse_float=lambda digits: round(float(digits), DECIMALS))
        name, encoded = f"{run.name}.json", (json.dumps(result) + "\n").encode()
        try:
            write_whole(self._folder / name, encoded)
        except OSError as error:
            cause = f"finished, but {self._folder / name} cannot be written ({error.strerror}); "
            try:
                spare = write_whole(Path(mkdtemp(prefix="diffpo-study-")) / name, encoded)
                cause += f"make room, and move {spare} there"
            except OSError:
                cause += "make room, and it is run again"
            self._failed[run.name] = cause
            self._console.print(f"{run.name}: {cause}")
        return result

    def _report_so_far(self, done: dict[str, dict[str, Any]]) -> None:
        try:
            self.report(done)
        except Exception as error:  # the runs that go on are worth more; the report at the end raises it
            self._console.print(f"no report yet: {one_line(error)}")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside as `Stopped`; at Ray's own SIGTERM handler the process would abort."""
    got: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        got.append(number)
        raise KeyboardInterrupt  # what Ray's waiting lets through

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if not got:
            raise
        raise Stopped(signal.Signals(got[0]).name) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def bounded(work: Callable[..., Any], minutes: float) -> Callable[..., Any]:
    """`work`, ended by a `RunError` after so many minutes; for the main thread of a process, where Ray runs tasks.

    Another process keeps the time, until this one closes the pipe or is gone: math-verify takes this one's only alarm
    clock, and a thread of it would wait for a reward that holds the interpreter, such as a regular expression.
    """

    def run(*arguments: Any) -> Any:
        def late(*_: Any) -> None:
            raise RunError(f"took longer than run_minutes={minutes:g}; mend a reward that hangs, or raise it")

        signal.signal(signal.SIGUSR2, late)
        clock = [sys.executable, "-S", "-c", CLOCK, str(os.getpid()), str(minutes * 60)]
        with subprocess.Popen(clock, stdin=subprocess.PIPE):
            return work(*arguments)

    return run


def commit() -> str:
    """Short hash of the checkout, with a + if code has changes (the reports themselves do not count); else empty."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
