"""Config file: YAML and dotted overrides in, a validated `Config` out, and back.

Every mistake becomes one `UserError` line with the key, the value and the way out; unknown keys name the nearest valid
one.
"""

import difflib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from common.config import Config
from common.errors import UserError
from common.tasks import TASKS, CountdownConfig, SudokuConfig


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides, validate.

    Args:
        path: YAML file; None starts from the defaults (then `task.name` must come from the overrides).
        overrides: `key.sub=value` strings; values are YAML.

    Raises:
        UserError: on a missing or malformed file, a malformed override, an unknown key, or a value out of limits.
    """
    tree = OmegaConf.create({})
    try:
        if path is not None:
            if not Path(path).is_file():
                known = sorted(p.name for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
                raise UserError(f"config {path}: no such file; in that folder: {', '.join(known) or 'no YAML files'}")
            tree = _read(path)
        for item in overrides or []:
            key = item.partition("=")[0]
            if "=" not in item or item.startswith("-") or not all(key.split(".")):
                raise UserError(f"override {item!r} is not of the form key.sub=value, e.g. learner.steps=20")
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides or [])))
        data = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"config {path or ''} {overrides or ''}: {' '.join(str(error).split())}") from error
    return parse_config(data)


def _read(path: str | Path) -> Any:
    sections = ", ".join(Config.model_fields)
    try:
        tree = OmegaConf.load(path)
    except OSError as error:  # omegaconf's error for a scalar, and the system's
        raise UserError(f"config {path}: {error}; the top level must be a mapping of sections ({sections})") from error
    if not OmegaConf.is_dict(tree):
        raise UserError(f"config {path}: the top level must be a mapping of sections ({sections})")
    return tree


def parse_config(data: Any) -> Config:
    """Validate a plain mapping; mistakes become one `UserError` line each."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError("; ".join(_explain(item) for item in error.errors())) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every key shown."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _explain(item: Any) -> str:
    """One validation error as `key: what is wrong and the way out`."""
    # pydantic puts the tag of a discriminated union ("sudoku") into the location; users never wrote it
    path = [str(part) for part in item["loc"]]
    if len(path) > 1 and path[0] == "task":
        path.pop(1)
    key = ".".join(path) or "config"
    if item["type"] == "extra_forbidden":
        names = _siblings(item["loc"][:-1])
        sections = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
        elsewhere = [f"{name}.{path[-1]}" for name in sections if path[-1] in _siblings((name,))]
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.4)
        likely = elsewhere if len(path) == 1 and elsewhere else [".".join([*path[:-1], name]) for name in near]
        way = f"did you mean {' or '.join(likely)}?" if likely else f"valid keys: {', '.join(names)}"
        return f"unknown key {key}; {way}"
    if item["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        known = ", ".join(_task_names())
        given = item["ctx"].get("tag")
        return f"unknown task {given!r}; known tasks: {known}" if given else f"task.name is missing; one of: {known}"
    if item["type"] == "missing" and key == "task":
        return f"task is missing; give --config FILE or task.name=NAME ({', '.join(_task_names())})"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (given {item['input']!r})"
    return f"{key}: {message}{shown}"


def _task_names() -> list[str]:
    return sorted(TASKS)


def _siblings(location: tuple[Any, ...]) -> list[str]:
    """Valid key names of the section at `location`."""
    section: Any = Config
    tasks = {kind.model_construct().name: kind for kind in (SudokuConfig, CountdownConfig)}
    for part in location:
        if part in tasks:
            section = tasks[part]
        elif part != "task":
            section = section.model_fields[part].annotation
    return list(section.model_fields)
