"""Config file: YAML and dotted overrides in, a validated `Config` out, and back.

- Every mistake becomes one `UserError` line with the key, the value and the way out; unknown keys name the nearest
  valid one.
- YAML is read without tags that construct anything, and aliases and interpolations are few, so no file grows as it is
  read.
- No credentials: what is read is written to `config.yaml` and shown in messages.
"""

import difflib
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from common.config import Config
from common.errors import UserError, shown, without_secrets
from common.spelling import IN_WORDS
from common.tasks import TASK_CONFIGS

MOST_REFERENCES = 30  # aliases and `${...}` of a file: ten levels of three are 59,049 copies
# what yaml raises for `!!int`, `!!bool x`, `!!timestamp x` is not its own error
UNREADABLE: tuple[type[Exception], ...] = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError)
UNREADABLE += (LookupError, AttributeError, ArithmeticError, RecursionError)


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, *, text: bytes | None = None
) -> Config:
    """Read a YAML file, apply dotted overrides, validate.

    Args:
        path: YAML file; None starts from the defaults (then `task.name` must come from the overrides).
        overrides: `key.sub=value` strings; values are YAML.
        text: content of the file, where it is in no local file system; `path` is then its name in messages.

    Raises:
        UserError: on a missing or malformed file, a malformed override, an unknown key, or a value out of limits.
    """
    tree = OmegaConf.create({})
    try:
        if path is not None:
            if text is None and not Path(path).is_file():
                known = sorted(p.name for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
                raise UserError(f"config {path}: no such file; in that folder: {', '.join(known) or 'no YAML files'}")
            tree = _read(path, text)
        for item in overrides or []:
            key = item.partition("=")[0]
            if "=" not in item or item.startswith("-") or not all(key.split(".")):
                raise UserError(f"override {item!r} is not of the form key.sub=value, e.g. learner.steps=20")
            _check_override(item)
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides or [])))
        data = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except UNREADABLE as error:
        where = without_secrets(f"config {path or ''} {overrides or ''}")
        raise UserError(f"{where}: {shown(error)}") from error
    return parse_config(data)


def _check_override(item: str) -> None:
    """Name the one that is no YAML: a command line may have dozens."""
    try:
        OmegaConf.from_dotlist([item])
    except UNREADABLE as error:
        raise UserError(
            f"override {without_secrets(item)[:200]!r} of the config is no YAML ({shown(error)[:300]}); quote text "
            "that has characters of YAML's own"
        ) from error


def _read(path: str | Path, text: bytes | None) -> Any:
    sections = ", ".join(Config.model_fields)
    try:
        tree = read_yaml(path, text)
    except OSError as error:  # omegaconf's error for a scalar, and the system's
        raise UserError(f"config {path}: {error}; the top level must be a mapping of sections ({sections})") from error
    if not OmegaConf.is_dict(tree):
        raise UserError(f"config {path}: the top level must be a mapping of sections ({sections})")
    return tree


def read_yaml(path: str | Path, content: bytes | None = None) -> Any:
    """The tree of a file, or of its content that was read elsewhere.

    Raises:
        UserError: when it refers to itself too often.
        OSError, `UNREADABLE`: when it is not readable, or no such YAML.
    """
    text = (Path(path).read_bytes() if content is None else content).decode()
    aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    references = aliases + text.count("${")
    if references > MOST_REFERENCES:
        raise UserError(
            f"{path}: {references} aliases and ${{...}} exceed {MOST_REFERENCES}, with which a file can grow without "
            "end; write values out"
        )
    return OmegaConf.load(StringIO(text))


def parse_config(data: Any) -> Config:
    """Validate a plain mapping; mistakes become one `UserError` line each."""
    _check_texts(data, "")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError("; ".join(" ".join(_explain(item).split()) for item in error.errors())) from error


def _check_texts(value: Any, key: str) -> None:
    """Refuse texts that cannot be the name of a file, and those that must not be written down."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, key)
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}: {value[:60]!r} holds a NUL, which no file's name can; leave it out")
    elif isinstance(value, str) and (hidden := without_secrets(value)) != value:
        raise UserError(
            f"{key}: {hidden} holds credentials, which config.yaml would keep; leave them out of it, and set the "
            "environment variables of the store, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


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
    if item["type"] == "literal_error":
        return f"{key}: {repr(item['input'])[:200]} is unknown; known: {item['ctx']['expected']}"
    if item["type"] == "string_pattern_mismatch":
        return f"{key}: {repr(item['input'])[:200]} is refused; it {IN_WORDS[item['ctx']['pattern']]}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (given {repr(item['input'])[:200]})"
    return f"{key}: {message}{shown}"


def _task_names() -> list[str]:
    return sorted(TASK_CONFIGS)


def _siblings(location: tuple[Any, ...]) -> list[str]:
    """Valid key names of the section at `location`."""
    section: Any = Config
    for part in location:
        if part in TASK_CONFIGS:
            section = TASK_CONFIGS[part]
        elif part != "task":
            annotation = section.model_fields[part].annotation
            section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    return list(section.model_fields)
