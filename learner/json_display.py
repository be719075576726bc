"""JsonDisplay: `--json`. One object per event on standard output, and nothing else there.

Each has `kind` and `time` (Unix seconds). The last is of kind `summary`, or `failed` with the `error` that standard
error names too. Numbers that are not finite are null. What others print meanwhile goes to standard error.
"""

import json
import math
import sys
import threading
import time
from contextlib import redirect_stdout
from typing import Any, Self, TextIO

from common.errors import RunError, UserError, is_out_of_memory, shown


class JsonDisplay:
    """Holds standard output from `with` on."""

    def __init__(self) -> None:
        self._out: TextIO = sys.stdout
        self._others = redirect_stdout(sys.stderr)
        self._writing = threading.RLock()  # warnings may come from other threads

    def __enter__(self) -> Self:
        self._others.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._others.__exit__(None, None, None)
        if error is not None and not isinstance(error, BrokenPipeError):
            self._write("failed", {"error": _told(error)})

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller; its own summary is a part of the command's."""
        if kind != "summary":
            self._write(kind, values)

    def finish(self, summary: dict[str, Any]) -> None:
        """The last line."""
        self._write("summary", summary)

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        row = {"kind": kind, "time": round(time.time(), 3), **_finite(values)}
        with self._writing:
            self._out.write(json.dumps(row, allow_nan=False) + "\n")
            self._out.flush()


def _told(error: BaseException) -> str:
    """As the last line of standard error names it; of what was not foreseen that is the last of a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    name, message = type(error).__name__, shown(error)
    if isinstance(error, UserError | RunError | OSError) or is_out_of_memory(error):
        return message or name
    return f"{name}: {message}" if message else name


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
