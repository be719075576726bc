"""Result: what a run of a study leaves, as plain JSON, and how it is read back.

- `SingleRun` writes `Trained`, the runner adds what `Result` has more. Which measures a claim may name is read off
  these types (`measures.check`), so a name stands in one place.
- Keys that may be absent are those that the report does without; results of older versions lack some, and have others.
"""

import json
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from common.errors import UserError

STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
AGAIN = "remove it, and the run is done again"
Forwards = Annotated[float, Field(gt=0)]


@with_config(STRICT)
class Spent(TypedDict):
    """What a run had spent at a step."""

    step: int
    seconds: float
    passes: float
    rows_forwarded: float


@with_config(STRICT)
class ValidationPoint(Spent):
    """On validation prompts at a step: at the operating point, greedy and sampled, and at the initial gamma."""

    accuracy: NotRequired[float]
    nfe: NotRequired[float]
    reward_costed: NotRequired[float]
    sampled_accuracy: NotRequired[float]
    sampled_nfe: NotRequired[float]
    sampled_reward_costed: NotRequired[float]
    drift_nfe: NotRequired[float]
    drift_accuracy: NotRequired[float]


@with_config(STRICT)
class CurvePoint(TypedDict):
    """Means of the learner's and the rollout's metrics since the point before."""

    step: int
    rollout_forwards: float


@with_config(STRICT)
class FrontierRow(TypedDict):
    """One setting of the sampler on test prompts."""

    rule: str
    nfe: Forwards
    accuracy: float


@with_config(STRICT)
class Operating(TypedDict):
    """The operating point on test prompts."""

    accuracy: float
    nfe: Forwards
    reward_costed: NotRequired[float]
    sampled_accuracy: NotRequired[float]
    sampled_nfe: NotRequired[float]
    sampled_reward_costed: NotRequired[float]


@with_config(STRICT)
class OnTest(TypedDict):
    """One policy on test prompts."""

    area: float
    operating: Operating
    frontier: Annotated[list[FrontierRow], Field(min_length=1)]
    learned_frontier: NotRequired[list[FrontierRow]]
    learned_area: NotRequired[float]


@with_config(STRICT)
class BeforeAfter(TypedDict):
    """The warm start and the chosen weights."""

    before: OnTest
    after: OnTest


@with_config(STRICT)
class Adaptation(TypedDict):
    """See `single_run.adaptation`."""

    rank_correlation: float
    gamma_ratio: float
    gamma_ratio_prompts: float
    learned_minus_constant: float
    low: float
    high: float
    slack: NotRequired[float]


@with_config(STRICT)
class Trained(TypedDict):
    """What training and evaluating leave."""

    curve: list[CurvePoint]
    validation: Annotated[list[ValidationPoint], Field(min_length=1)]
    selected_step: NotRequired[int]
    test: BeforeAfter
    adaptation: NotRequired[Adaptation | None]
    diagnostics: NotRequired[dict[str, float]]
    train_seconds: NotRequired[float]
    discarded_groups: NotRequired[int]
    seconds: NotRequired[float]


@with_config(STRICT)
class Result(Trained):
    """What is kept: which run it was, and how it was made."""

    arm: str
    seed: int
    digest: str
    overrides: NotRequired[list[str]]
    commit: NotRequired[str]
    cpus: NotRequired[int]
    jobs: NotRequired[int]


ADAPTER: TypeAdapter[Any] = TypeAdapter(Result)


def read_result(path: Path, *, arm: str, seed: int, digest: str) -> dict[str, Any] | None:
    """The result in a file; None if it is of another configuration.

    Raises:
        UserError: when the file is damaged, or another run's.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if isinstance(found, dict) and found.get("digest") != digest:
        return None
    try:
        found = ADAPTER.validate_python(found)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "the file"
        given = "" if item["type"] == "missing" else f" (given {str(item['input'])[:60]})"
        raise UserError(f"{path}: {where}: {item['msg']}{given}; {AGAIN}") from error
    if (found["arm"], found["seed"]) != (arm, seed):
        raise UserError(f"{path}: is of arm {found['arm']} with seed {found['seed']}; {AGAIN}")
    return found
