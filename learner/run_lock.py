"""RunLock: one driver at a time works on a run.

- In a local file system: a file lock; the system lets go of it when the process dies.
- In an object store, which has no locks *(ours)*: the file `lock` names its owner and carries a number that the owner
  raises every `BEAT_SECONDS`. Whoever wants it watches that number for `DEAD_SECONDS`, unless the owner was a process
  of this machine that is gone: a number that stands still has no owner. Of two that take it at once the later write
  wins; each reads it back after `SETTLE_SECONDS`, and the other one sees that it lost. So does an owner that was cut
  off for longer and replaced meanwhile (`lost`). No clocks are compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import RunError, UserError, cause
from common.place import FAILURES, Place

NAME = "lock"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 45.0
SETTLE_SECONDS = 2.0
WATCH_SECONDS = 1.0
MEND = "mend the permissions of the folder and of `lock` in it, or choose another run.name"


class LockLost(RunError):
    """Another process works on the run now."""


class RunLock:
    """Held from `held` until it ends."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._owner = {"host": socket.gethostname(), "boot": _boot(), "pids": _pids(), "pid": os.getpid()}
        self._owner["token"] = uuid.uuid4().hex
        self._beats = 0
        self._ended = threading.Event()
        self.lost = ""
        """Who else holds it now; empty as long as it is held."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises UserError when another process holds it, or it cannot be taken."""
        if self._place.folder is not None:
            with self._held_locally(self._place.folder):
                yield
            return
        try:
            self._take()
        except FAILURES as error:
            raise UserError(f"run {self._place} cannot be locked ({cause(error)}); {MEND}") from error
        beating = threading.Thread(target=self._beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            self._ended.set()
            beating.join(BEAT_SECONDS)
            with suppress(*FAILURES):
                if not self.lost:
                    self._place.remove(NAME)

    @contextmanager
    def _held_locally(self, folder: Path) -> Iterator[None]:
        lock = FileLock(folder / NAME)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise self._taken("another process") from error
        except OSError as error:
            raise UserError(f"run {self._place} cannot be locked ({cause(error)}); {MEND}") from error
        try:
            yield
        finally:
            lock.release()

    def _taken(self, by: str) -> UserError:
        return UserError(f"run {self._place} is going on in {by}; stop that one first, or choose another run.name")

    def _take(self) -> None:
        there = self._read()
        until = time.monotonic() + DEAD_SECONDS
        while there is not None and not self._is_dead(there) and time.monotonic() < until:
            time.sleep(WATCH_SECONDS)
            now = self._read()
            if now is not None and now != there:
                raise self._taken(_name(now))
            there = now
        self._write()
        time.sleep(SETTLE_SECONDS)
        if (winner := self._read()) is None or winner.get("token") != self._owner["token"]:
            raise self._taken(_name(winner or {}))

    def _is_dead(self, there: dict[str, Any]) -> bool:
        """Whether it is known at once that the owner is gone."""
        if any(there.get(key) != self._owner[key] for key in ("host", "boot", "pids")):  # hosts may share a name
            return False
        try:
            os.kill(int(there["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(*FAILURES):  # a store that cannot be reached shows elsewhere
                there = self._read()
                if there is not None and there.get("token") != self._owner["token"]:
                    self.lost = _name(there)
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._place.read(NAME))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._beats += 1
        self._place.write(NAME, json.dumps(self._owner | {"beats": self._beats}).encode())

    def check(self) -> None:
        """Raises LockLost once another process has taken the lock."""
        if self.lost:
            raise LockLost(
                f"run {self._place} was taken over by {self.lost}, since this process did not reach the store for "
                f"{DEAD_SECONDS:.0f} s; leave it to that one"
            )


def _boot() -> str:
    """Tells this machine from others of its name; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pids() -> str:
    """Tells containers of one machine apart, which number their processes each; empty where the system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _name(owner: dict[str, Any]) -> str:
    if "host" not in owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner['host']}"
