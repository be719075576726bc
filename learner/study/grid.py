"""Grid: what a study compares, read from `deploy/studies/NAME.yaml`.

- An arm is a list of dotted overrides on one run configuration; a run is an arm with a seed.
- All runs with a seed see the same prompts and start from the same warm start, so comparisons are paired by seed.
- Everything is built and checked before anything starts.
"""

import difflib
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, field_validator, model_validator

from common.config import Config
from common.config_file import UNREADABLE, load_config, read_yaml
from common.errors import UserError, shown
from common.section import Section
from learner.study.measures import EQUAL, before, check_measure

FOLDER = Path("deploy/studies")
OUT = Path("docs/studies")
BEFORE = "before"
WITH_BEFORE = ("test.after.", "last.")  # measures that the warm start of the same run has too
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
GIVEN = ("run.seed", "run.name")  # a run's own, set by `plan`
REWARDS = ("reward_timeout", "reward_workers", "reward_memory_bytes")  # by its evaluators
HONOURED = {"rollout": ("slots", "precision", "compile", *REWARDS), "replay": ("drop_no_spread",)}  # by `SingleRun`


class Arm(Section):
    """One way to train."""

    about: str
    """What it is, for the report."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides on the study's configuration."""
    seeds: int | None = Field(default=None, ge=1, strict=True)
    """Seeds of this arm, where fewer than the study's are enough."""
    staleness: int = Field(default=0, ge=0, strict=True)
    """Versions that every token is old when it is trained, but for the first steps; 0 is synchronous. It is the worst
    that `replay.max_staleness` allows."""


class Comparison(Section):
    """One claim: a measure of an arm less that of a baseline, paired by seed."""

    claim: str
    """What is claimed, in words."""
    arm: str
    """The arm that the claim is about."""
    baseline: str | None = None
    """Another arm; `before`, the same run's warm start; null compares the measure with 0."""
    measure: str
    """Where the number stands in a run's JSON, e.g. `test.after.area`; `last.NAME` is a validation measure at the last
    step, `NAME at PASSES` one where the learner had spent so many forward passes, `NAME at equal AXIS` one where both
    had spent the same (passes, rows_forwarded, seconds, or forwards: the rows of rollout and learner)."""
    expected: Literal["positive", "negative", "any", "none"] = "positive"
    """Which sign the claim says; any: that there is a difference; none: that there is none."""

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        check_measure(self.measure)
        if self.baseline == BEFORE:
            if not self.measure.startswith(WITH_BEFORE):
                raise ValueError(
                    f"comparison {self.claim!r}: {self.measure} is not known of the warm start; measures against "
                    f"{BEFORE!r} begin with {' or '.join(WITH_BEFORE)}, or give an arm as baseline"
                )
            check_measure(before(self.measure))
        if EQUAL in self.measure and self.baseline is None:
            raise ValueError(f"comparison {self.claim!r}: {self.measure} compares two arms; give one as baseline")
        if self.arm == self.baseline:
            raise ValueError(f"comparison {self.claim!r}: arm and baseline are both {self.arm!r}; name two arms")
        return self


class Study(Section):
    """A named grid."""

    title: str
    """Heading of the report."""
    question: str
    """What the study asks, and how; printed in the report."""
    config: str
    """Run configuration that all arms share, a YAML file."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides for all arms."""
    seeds: int = Field(default=3, ge=1, strict=True)
    """Runs per arm, with run.seed 0, 1, ..."""
    run_minutes: float = Field(default=120.0, gt=0, strict=True)
    """Longest time of one run, or of one warm start; one that hangs is ended then, named, and the others go on."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Arms by name, in the order in which they run."""
    comparisons: tuple[Comparison, ...] = ()
    """The claims."""
    withdrawn: tuple[str, ...] = ()
    """Claims that were made before the first run and cannot be tested any more, each with its reason. They count among
    those that p is adjusted for, so that what is left becomes no surer by their going."""
    findings: str = ""
    """What was learned, written by people who read the tables; printed behind the claims."""

    @field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not NAME.fullmatch(name) or name == BEFORE:
                raise ValueError(f"arm {name!r}: use small letters, digits and _, and not {BEFORE!r}")
        return arms

    @model_validator(mode="after")
    def _seeds_are_the_studys(self) -> Self:
        for name, arm in self.arms.items():
            if (arm.seeds or 0) > self.seeds:
                raise ValueError(f"arms.{name}.seeds={arm.seeds} exceeds seeds={self.seeds}; raise seeds, or lower it")
        return self

    @model_validator(mode="after")
    def _arms_exist(self) -> Self:
        for comparison in self.comparisons:
            for name in (comparison.arm, comparison.baseline):
                if name not in (*self.arms, BEFORE, None) or comparison.arm == BEFORE:
                    raise ValueError(f"comparison {comparison.claim!r}: no arm {name!r}; arms: {', '.join(self.arms)}")
        return self


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    arm: str
    seed: int
    config: Config
    overrides: tuple[str, ...]
    contents: tuple[str, ...] = ()
    """Digests of the files and folders that the configuration names."""
    staleness: int = 0
    """Of its arm."""

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """Changes whenever study or run configuration say something else; a key that is added later does not count."""
        stale = (f"staleness {self.staleness}",) if self.staleness else ()
        said = self.config.model_dump_json(exclude_defaults=True)
        return _digest(self.config.task.name, said, *self.contents, *stale)

    @property
    def warm_start_digest(self) -> str:
        """Equal for runs that begin with the same weights."""
        config = self.config
        sections = (config.task, config.model, config.warm_start)
        said = [section.model_dump_json(exclude_defaults=True) for section in sections]
        return _digest(config.task.name, *said, config.sampler.max_completion_tokens, self.seed, *self.contents)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_study(name: str, *, out: Path = OUT) -> tuple[str, Study]:
    """The study of that name, or in that YAML file; its short name and itself.

    Args:
        name: of a study of the repository, or a YAML file.
        out: folder of the reports; a file of one's own does not write over the report of the repository's.

    Raises:
        UserError: when there is none, or it is malformed.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise UserError(
            f"study {name!r}: no file {path}; known studies: {', '.join(known) or 'none'}, or give a YAML file"
        )
    taken = FOLDER / f"{path.stem}.yaml"
    if taken.is_file() and not taken.samefile(path) and out.resolve() == OUT.resolve():
        raise UserError(
            f"study {path}: {path.stem} is the name of {taken}, whose report in {out} it would write over; give "
            "another --out, or rename the file"
        )
    try:
        data = OmegaConf.to_container(read_yaml(path), resolve=True, throw_on_missing=True)
        return path.stem, Study.model_validate(data)
    except ValidationError as error:
        lines = (" ".join(_explain(item).split()) for item in error.errors())
        raise UserError("; ".join(f"study {path}: {line}" for line in lines)) from error
    except (*UNREADABLE, OSError) as error:
        raise UserError(f"study {path}: {shown(error)}") from error


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) if item["loc"] else "study"
    if item["type"] != "extra_forbidden":
        given = "" if item["type"] in ("value_error", "missing") else f" (given {str(item['input'])[:80]})"
        return f"{key}: {item['msg'].removeprefix('Value error, ')}{given}"
    kind = Comparison if item["loc"][0] == "comparisons" else Arm if item["loc"][0] == "arms" else Study
    names = list(kind.model_fields)
    near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
    return f"unknown key {key or repr(key)}; " + (
        f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(names)}"
    )


def plan(study: Study, *, seeds: int | None = None) -> list[Planned]:
    """All runs, every configuration built: seed by seed, in each the arms in order.

    Raises:
        UserError: naming the arm whose configuration is wrong.
    """
    runs = []
    digest_of = cache(_content)
    for seed in range(seeds or study.seeds):
        for name, arm in study.arms.items():
            if seed >= (arm.seeds or study.seeds) and seeds is None:
                continue
            try:
                said = [*study.overrides, *arm.overrides]
                overrides = [*said, f"run.seed={seed}", f"run.name={name}-seed{seed}"]
                config = load_config(study.config, overrides)
                _check_is_a_studys(config, said)
                named = (*config.task.files, config.warm_start.file, config.model.path)
                contents = tuple(digest_of(Path(path)) for path in named if path is not None)
                runs.append(Planned(name, seed, config, tuple(overrides), contents, arm.staleness))
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error
    return runs


def _check_is_a_studys(config: Config, overrides: list[str]) -> None:
    """Refuse what a run of a study would pass over: it is synchronous, in one process, and has its own seed."""
    said = OmegaConf.from_dotlist(overrides)
    for key in GIVEN:
        if (value := OmegaConf.select(said, key)) is not None:
            raise UserError(f"{key}={value}: a study sets it for every run; leave it out, and say how many with seeds")
    for section, honoured in HONOURED.items():
        given = getattr(config, section)
        for key, field in type(given).model_fields.items():
            value, usual = getattr(given, key), field.get_default(call_default_factory=True)
            synchronous = key == "max_staleness" and value == 0
            if key not in honoured and value != usual and not synchronous:
                raise UserError(
                    f"{section}.{key}={value}: a study's runs are synchronous and in one process, so it would change "
                    f"nothing; leave it out, or set {section}.{key}={usual} among the overrides"
                )


def _content(path: Path) -> str:
    """Digest of a file, or of all files of a folder; of nothing where there is none: a report needs no files."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        digest.update(str(file.relative_to(path)).encode())
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error}); its content is part of what a run is") from error
    return digest.hexdigest()
