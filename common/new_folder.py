"""New folder: written under another name beside it, there when it is complete, readable as others are."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.errors import RunError, UserError, cause


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `target` at the end, and is removed where anything fails.

    Raises:
        UserError: when it cannot be made.
        RunError: as `writing`.
    """
    above = target.absolute().parent
    try:
        above.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=above))
    except OSError as error:
        raise UserError(f"{target} cannot be made ({cause(error)}); choose another folder") from error
    try:
        with writing(target):
            partial.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
            yield partial
            open_to_all(partial)
            os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """As long as this lasts, files are written into the folder. Raises RunError, naming it, when there is no room."""
    try:
        yield
    except Exception as error:
        # safetensors and torch's zip writer have errors of their own for a full disk, tokenizers raises the bare class
        of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if not (isinstance(error, OSError | SafetensorError) or of_torch or type(error) is Exception):
            raise
        raise RunError(f"{folder} cannot be written ({cause(error)}); make room there") from error


def open_to_all(folder: Path) -> None:
    """Files as the umask has them: safetensors makes its own for their owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~_umask())


def sync(path: str | Path) -> None:
    """Make a file or a folder survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
