"""Errors that decide how a run ends.

- `UserError`: something the user gave is wrong. One line: the value, the limit, the way out. Exit code 2.
- `RunError`: the run itself failed. One line with the cause. Exit code 1.
- `Stopped`: a signal ended it.
"""

import os
import re

# a / has no place in a password there, but AWS makes such keys, and people paste them
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]*:[^\s@'\"]*(?=@)")
_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:secret|password|token|account_key|sas|sig)[\w-]*=)[^&\s'\"]*", re.IGNORECASE)


class UserError(Exception):
    """A mistake that the user can mend; shown as one line without a traceback."""


class RunError(Exception):
    """A run that could not go on; shown as one line with the cause, logged with its traceback."""


def without_secrets(text: str) -> str:
    """A text with the credentials of the URIs in it as `***`; unchanged where there are none."""
    return _QUERY.sub(r"\1***", _USER_INFO.sub("***", text))


def shown(error: BaseException) -> str:
    """An error's message as a command prints it: one line, no credentials."""
    return without_secrets(" ".join(str(error).split()))


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut to what a person reads."""
    return " ".join(str(error).split())[:300]


def cause(error: BaseException) -> str:
    """Why a file operation failed. Short: pyarrow repeats the path, and what follows the cause must still be read."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return one_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room, on the CPU or a GPU: torch does not tell it by a MemoryError."""
    torch_said = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return torch_said or isinstance(error, MemoryError)


class Stopped(Exception):
    """A signal ended the command early; its message is the signal's name. Exit code 128 + the signal's number."""
