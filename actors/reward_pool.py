"""Rewards: scored in processes of their own, with a limit of time and of memory.

- A reward is the task's code: it may hang, crash, eat memory or return nonsense. That costs one group, never an actor.
- Processes are spawned, import neither torch nor ray by themselves, and build the task once.
- What comes back is JSON, so nothing that a reward makes is unpickled here. What it prints goes where we print.
- A process whose reward raised goes on; one that exceeded a limit or died is replaced for the next group.
- Where one after the other takes too long, those who wait for many give up: each costs the whole time-out.
"""

import atexit
import errno
import faulthandler
import json
import math
import multiprocessing
import os
import pickle
import reprlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple

import numpy as np

from common.config import RolloutConfig
from common.errors import RunError, one_line
from common.tasks.task import Example, Task

HOPELESS = 8  # rewards in a row that take too long
START_SECONDS = 120.0  # to import the task's module and build the task
GRACE_SECONDS = 2.0  # beyond its limit, for a process to say where it hung and to end itself
TRACE_CHARACTERS = 20_000  # of a traceback, the end


class Score(NamedTuple):
    """What one completion got."""

    rewards: dict[str, float]
    """Every component, and their weighted sum under `reward`."""
    correct: bool


Scores = list[Score]
Done = Callable[[Scores | Exception], None]


class RewardError(Exception):
    """A group that could not be scored; one line with the cause, and as a note where it happened."""


class RewardTimeout(RewardError):
    """A reward took too long."""


def score(task: Task, example: Example, completions: list[str]) -> Scores:
    """Rewards and verdict of each completion of one prompt, in this process. A bool counts as 0 or 1.

    Raises:
        ValueError: for what is not a finite number for each of the task's components, or not a bool as the verdict.
    """
    return [_score(task, example, completion, f"completion {i}") for i, completion in enumerate(completions)]


def _score(task: Task, example: Example, completion: str, which: str) -> Score:
    found = task.rewards(example, completion)
    if not isinstance(found, Mapping) or set(found) != set(task.components):
        raise ValueError(
            f"rewards of {which} are {reprlib.repr(found)}; return a number for each of {', '.join(task.components)}"
        )
    rewards = {name: _number(found[name], f"reward {name!r} of {which}") for name in task.components}
    total = _number(task.reward(rewards), f"the weighted reward of {which}")
    correct = task.correct(example, completion)
    if not isinstance(correct, bool | np.bool_):
        raise ValueError(f"correct of {which} is {reprlib.repr(correct)}; return True or False")
    return Score({**rewards, "reward": total}, bool(correct))


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real | np.bool_):
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a number; mend the reward function")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, which is not finite; mend the reward function")
    return number


def score_apart(task: Task, example: Example, completions: list[str], config: RolloutConfig) -> Scores:
    """As `score`, but in a reward process of its own unless the task is trusted. Raises RewardError too."""
    if task.trusted:
        return score(task, example, completions)
    pool, outcome = RewardPool(task, config), SimpleQueue[Scores | Exception]()
    try:
        pool.submit(example, completions, outcome.put)
        found = outcome.get()
    finally:
        pool.close()
    if isinstance(found, Exception):
        raise found
    return found


class RewardPool:
    """Owned by one rollout actor or evaluator; runs until `close`."""

    ready = True

    def __init__(self, task: Task, config: RolloutConfig) -> None:
        """Raises ValueError for a task that cannot be sent to a process."""
        try:
            self._task = pickle.dumps(task)
        except Exception as error:
            raise ValueError(
                f"task {type(task).__qualname__} cannot be sent to a reward process ({error}); define it at the top of "
                "a module that can be imported"
            ) from error
        self._config = config
        self._jobs: SimpleQueue[tuple[Example, list[str], Done] | None] = SimpleQueue()
        self._processes: set[_Process] = set()
        self._closed = False
        self._lock = Lock()  # a process is started before `close` looks, or not at all
        self._threads = [Thread(target=self._run, daemon=True, name="rewards") for _ in range(config.reward_workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, example: Example, completions: list[str], done: Done) -> None:
        """Score a group; `done` is called from another thread with the scores or the failure, unless closed first.

        Raises:
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed; open another")
        self._jobs.put((example, completions, done))

    def score_each(self, pairs: Sequence[tuple[Example, str]], told: Callable[[int], None]) -> list[Score | Exception]:
        """What each of these completions got, in order; `told` is called with the number of those that are done.

        Raises:
            RunError: when one after the other takes too long.
        """
        arrived: SimpleQueue[tuple[int, Scores | Exception]] = SimpleQueue()
        for index, (example, completion) in enumerate(pairs):
            self.submit(example, [completion], lambda found, index=index: arrived.put((index, found)))
        outcomes: dict[int, Score | Exception] = {}
        late = 0
        while len(outcomes) < len(pairs):
            index, found = arrived.get()
            outcomes[index] = found if isinstance(found, Exception) else found[0]
            told(len(outcomes))
            if not isinstance(found, RewardTimeout):
                late = 0
                continue
            late += 1
            if late == HOPELESS:
                raise RunError(
                    f"{HOPELESS} rewards in a row took too long, {len(outcomes)} of {len(pairs)} completions were "
                    f"scored; the last: {one_line(found)}"
                )
        return [outcomes[index] for index in range(len(pairs))]

    def close(self) -> None:
        """Stop the processes at once."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        """One process after the other, each until it fails."""
        process: _Process | None = None
        while (job := self._jobs.get()) is not None and not self._closed:
            example, completions, done = job
            try:
                if process is None or not process.alive:
                    self._discard(process)
                    process = self._start()
                outcome = process.score(example, completions)
            except Exception as error:  # also what the system refuses; a thread that ends would stall its owner
                outcome = error
            if not self._closed:
                done(outcome)
        self._discard(process)

    def _start(self) -> "_Process":
        with self._lock:
            if self._closed:
                raise RewardError("the reward pool was closed")
            process = _Process(self._task, self._config)
            self._processes.add(process)
        return process

    def _discard(self, process: "_Process | None") -> None:
        if process is not None:
            process.end()
            with self._lock:
                self._processes.discard(process)


class _Process:
    """A reward process, seen from its owner."""

    def __init__(self, task: bytes, config: RolloutConfig) -> None:
        self._config = config
        self._ready = False
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._dumps, dumps = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(theirs, dumps, task, config), name="reward")
        self._process.start()
        theirs.close()
        dumps.close()

    @property
    def alive(self) -> bool:
        return not self._connection.closed and self._process.is_alive()

    def score(self, example: Example, completions: list[str]) -> Scores:
        """Raises RewardError for whatever went wrong; where the process cannot go on, it is ended."""
        if not self._ready:
            self._receive(START_SECONDS, f"building the task took more than {START_SECONDS:g} seconds")
            self._ready = True
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, as `_receive` will find
            self._connection.send((example, completions))
        seconds = self._config.reward_timeout
        way_out = "raise it, or bound the time of the reward function"
        answer = self._receive(seconds, f"reward exceeded rollout.reward_timeout={seconds:g} seconds; {way_out}")
        return [Score(*found) for found in answer]

    def kill(self) -> None:
        """End the process and what it started; whoever reads from it is told."""
        self._process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)

    def end(self) -> None:
        """Kill it and let go of it. May be repeated."""
        if not self._connection.closed:
            self.kill()
            self._process.join()
            self._connection.close()
            self._dumps.close()

    def _receive(self, seconds: float, too_late: str) -> Any:
        started = time.monotonic()
        answer: dict[str, Any] | None = None
        with suppress(EOFError, ConnectionResetError):
            if self._connection.poll(seconds + GRACE_SECONDS):
                answer = json.loads(self._connection.recv_bytes())
        if answer is None:
            late = time.monotonic() - started >= seconds
            if not late:
                self._process.join(GRACE_SECONDS)  # it is about to end by itself
            self.kill()
            self._process.join()
            failure = RewardTimeout(too_late) if late else RewardError(f"reward process died: {self._ending()}")
            trace = _read(self._dumps)
            self.end()
        elif "error" in answer:
            failure, trace = RewardError(answer["error"]), answer["trace"]
            if answer["ends"]:
                self.end()
        else:
            return answer["value"]
        if trace:
            failure.add_note(trace)
        raise failure

    def _ending(self) -> str:
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        limit = f"rollout.reward_memory_bytes={self._config.reward_memory_bytes}"
        return f"signal {signal.Signals(-code).name} (a crash, a kill, or a library that cannot bear {limit})"


def _read(dumps: Connection) -> str:
    """What a dead process left there."""
    os.set_blocking(dumps.fileno(), False)
    with suppress(BlockingIOError):
        return os.read(dumps.fileno(), TRACE_CHARACTERS).decode(errors="replace")
    return ""


# -- in the reward process -----------------------------------------------------------------------------------------


def _serve(connection: Connection, dumps: Connection, pickled: bytes, config: RolloutConfig) -> None:
    """Build the task, then score groups until the owner is gone."""
    os.setsid()  # so that what the reward starts can be ended with it; Ctrl-C is the owner's to handle
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore  # a process that is killed flushes nothing
    faulthandler.enable(dumps.fileno())
    try:
        task: Task = pickle.loads(pickled)
        task.prepare()
    except BaseException as error:
        _send(connection, _failure(error, config) | {"ends": True})
        return
    _send(connection, {"value": None})
    # its thread takes address space of its own (stack, 64 MiB of heap), which is not the reward's
    faulthandler.dump_traceback_later(config.reward_timeout, file=dumps.fileno())
    faulthandler.cancel_dump_traceback_later()
    ceiling = _address_space() + config.reward_memory_bytes
    while True:
        try:
            example, completions = connection.recv()
        except (EOFError, OSError):
            return
        # ends a hanging process from a thread of its own, also when its owner is gone
        faulthandler.dump_traceback_later(config.reward_timeout, exit=True, file=dumps.fileno())
        try:
            with _memory_limited(ceiling):
                answer: dict[str, Any] = {"value": score(task, example, completions)}
        except BaseException as error:
            answer = _failure(error, config)
        faulthandler.cancel_dump_traceback_later()
        _send(connection, answer)
        if answer.get("ends"):
            return


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _failure(error: BaseException, config: RolloutConfig) -> dict[str, Any]:
    """An exception as plain text; after one for want of memory the process ends, since it may hold what it took."""
    out_of_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    cause = f"reward raised {' '.join(''.join(traceback.format_exception_only(error)).split())[:1000]}"
    if out_of_memory:
        limit = f"rollout.reward_memory_bytes={config.reward_memory_bytes}"
        cause = f"reward exceeded {limit}; raise it, or let the reward function take less"
    trace = "".join(traceback.format_exception(error))[-TRACE_CHARACTERS:]
    return {"error": cause, "trace": trace, "ends": out_of_memory}


def _address_space() -> int:
    """Bytes of address space that this process holds; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _memory_limited(ceiling: int) -> Iterator[None]:
    """Allocations beyond `ceiling` bytes of address space fail inside; Linux only, others do not enforce it.

    Outside it is lifted, so that a failure can be told.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
