"""Warm starts: kept as `.npy` files, for all arms with a seed and for other studies; a damaged one is made again."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from common.errors import one_line
from learner.study.grid import Planned
from learner.study.single_run import start_size


class WarmStarts:
    """The folder of warm starts, which studies share."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console

    def _path(self, run: Planned) -> Path:
        return self._folder / f"warm_start-{run.warm_start_digest}.npy"

    def kept(self, run: Planned) -> np.ndarray | None:
        """The weights that a run begins with; None where they are to be made."""
        path = self._path(run)
        if not path.is_file():
            return None
        try:
            found: Any = np.load(path, allow_pickle=False)
            wrong = _wrong(found, start_size(run.config))
        except (OSError, ValueError, EOFError) as error:
            found, wrong = None, one_line(error)
        if wrong:
            self._console.print(f"{path}: damaged ({wrong}); the warm start is made again")
            return None
        return found

    def keep(self, run: Planned, weights: np.ndarray) -> None:
        """Write them as a whole or not at all; without room they are made again by the next call."""
        path = self._path(run)
        partial = path.with_name(f"partial-{run.warm_start_digest}-{os.getpid()}.npy")
        try:
            np.save(partial, weights)
            os.replace(partial, path)
        except OSError as error:
            self._console.print(f"{path}: cannot be written ({error}); another study will make this warm start again")
            partial.unlink(missing_ok=True)


def _wrong(found: Any, size: int | None) -> str | None:
    """What is wrong with kept weights."""
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "f":
        return "no vector of numbers"
    if size is not None and found.size != size:
        return f"{found.size} numbers for a model of {size}"
    return None if np.isfinite(found).all() else "not all numbers are finite"
