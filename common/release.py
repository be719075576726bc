"""Release: the version of DiFFPO that runs here."""

import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def release() -> str:
    """Of the installed package, else of the checkout that this is (the working directory of a Ray job)."""
    try:
        return version("diffpo")
    except PackageNotFoundError:
        return str(tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"])
