"""A task whose reward does what the completion, or the prompt, says; for a reward process to build."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from common.tasks import Example, Split, SudokuTask

ON_PROMPTS = {2: "hang", 4: "exit 0", 5: "memory", 7: "raise"}
ALPHABET = "01234"


class UnpicklableError(Exception):
    """Neither pickled nor built again from its arguments."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")
        self.lock = threading.Lock()


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class MisbehavingTask(SudokuTask):
    """Sudoku, but for what is asked of it."""

    def example(self, split: Split, index: int) -> Example:
        found = super().example(split, index)
        return replace(found, fields=found.fields | {"do": ON_PROMPTS.get(index) if split == "test" else None})

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        return act(example.fields["do"] or completion) or super().rewards(example, completion)

    def correct(self, example: Example, completion: str) -> bool:
        return "perhaps" if completion == "verdict" else super().correct(example, completion)


class HangingTask(SudokuTask):
    """Every reward hangs."""

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        time.sleep(600)
        return super().rewards(example, completion)


class LockedTask(SudokuTask):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a lock")


class BrokenTask(SudokuTask):
    """Cannot be built in another process."""

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise LookupError("no data set")


held = []  # what a careless reward keeps


def act(what: str) -> Any:
    """Misbehave, or return what the reward returns; None leaves it to sudoku."""
    returned = {
        "string": {"cells": "much", "exact": 1.0},
        "none": {"cells": 1.0, "exact": None},
        "nan": {"cells": float("nan"), "exact": 1.0},
        "huge": {"cells": 10**400, "exact": 1.0},
        "array": {"cells": np.ones(3), "exact": 1.0},
        "list": [1.0, 1.0],
        "short": {"cells": 1.0},
        "bool": {"cells": True, "exact": np.bool_(False)},
        "numpy": {"cells": np.float32(0.5), "exact": Fraction(1, 4)},
    }
    if what in returned:
        return returned[what]
    if what == "hang":
        time.sleep(600)
    elif what == "hang deaf":  # deaf to SIGTERM, with the interpreter's lock held, and a child of its own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stdout.write(f"child {child.pid}\n")
        ctypes.PyDLL(None).sleep(600)
    elif what.startswith("exit"):
        os._exit(int(what.split()[1]))
    elif what == "segfault":
        faulthandler._sigsegv()
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "leave":
        sys.exit(3)
    elif what == "memory":
        while True:
            held.append(bytearray(2**24))
    elif what == "objects":
        while True:
            held.append(bytes(400))  # from Python's own allocator
    elif what == "one array":
        np.ones(2**30)
    elif what == "raise":
        raise UnpicklableError(1, 2)
    elif what == "silent":
        raise SilentError
    elif what == "print":
        sys.stdout.write("said by the reward\n")
        sys.stderr.write("complained of\n")
        os._exit(1)
    elif what == "pid":
        return {"cells": float(os.getpid()), "exact": 0.0}
    return None
