"""Grid: what a study compares, read from `deploy/studies/NAME.yaml`.

- An arm is a list of dotted overrides on one run configuration; a run is an arm with a seed.
- All runs with a seed see the same prompts and start from the same warm start, so comparisons are paired by seed.
- Everything is built and checked before anything starts.
"""

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from common.config import Config
from common.config_file import load_config
from common.errors import UserError
from common.section import Section

FOLDER = Path("deploy/studies")
BEFORE = "before"
WITH_BEFORE = ("test.after.", "last.")  # measures that the warm start of the same run has too
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


class Arm(Section):
    """One way to train."""

    about: str
    """What it is, for the report."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides on the study's configuration."""
    seeds: int | None = Field(default=None, ge=1)
    """Seeds of this arm, where fewer than the study's are enough."""


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
    seeds: int = Field(default=3, ge=1)
    """Runs per arm, with run.seed 0, 1, ..."""
    run_minutes: float = Field(default=120.0, gt=0)
    """Longest time of one run, or of one warm start; one that hangs is ended then, named, and the others go on."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Arms by name, in the order in which they run."""
    comparisons: tuple[Comparison, ...] = ()
    """The claims."""
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
            if comparison.baseline == BEFORE and not comparison.measure.startswith(WITH_BEFORE):
                raise ValueError(
                    f"comparison {comparison.claim!r}: {comparison.measure} is not known of the warm start; measures "
                    f"against {BEFORE!r} begin with {' or '.join(WITH_BEFORE)}, or give an arm as baseline"
                )
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

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """Changes whenever study or run configuration say something else; a key that is added later does not count."""
        return _digest(self.config.task.name, self.config.model_dump_json(exclude_defaults=True))

    @property
    def warm_start_digest(self) -> str:
        """Equal for runs that begin with the same weights."""
        config = self.config
        sections = (config.task, config.model, config.warm_start)
        said = [section.model_dump_json(exclude_defaults=True) for section in sections]
        return _digest(config.task.name, *said, config.sampler.max_completion_tokens, self.seed)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_study(name: str) -> tuple[str, Study]:
    """The study of that name, or in that YAML file; its short name and itself.

    Raises:
        UserError: when there is none, or it is malformed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise UserError(
            f"study {name!r}: no file {path}; known studies: {', '.join(known) or 'none'}, or give a YAML file"
        )
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return path.stem, Study.model_validate(data)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"study {path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise UserError("; ".join(f"study {path}: {_explain(item)}" for item in error.errors())) from error


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "study"
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    kind = Comparison if item["loc"][0] == "comparisons" else Arm if item["loc"][0] == "arms" else Study
    names = list(kind.model_fields)
    near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
    return f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(names)}")


def plan(study: Study, *, seeds: int | None = None) -> list[Planned]:
    """All runs, every configuration built: seed by seed, in each the arms in order.

    Raises:
        UserError: naming the arm whose configuration is wrong.
    """
    runs = []
    for seed in range(seeds or study.seeds):
        for name, arm in study.arms.items():
            if seed >= (arm.seeds or study.seeds) and seeds is None:
                continue
            try:
                overrides = [*study.overrides, *arm.overrides, f"run.seed={seed}", f"run.name={name}-seed{seed}"]
                runs.append(Planned(name, seed, load_config(study.config, overrides), tuple(overrides)))
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error
    return runs
