"""Saved group: where a run's files hold a group, and which weights on disk come nearest to those that drew it.

    segments/                     groups that are not trained yet
    set_aside/NAME/               a policy in HF layout, `why.json`, and in groups/ the batch that it failed on
    checkpoints/step-N/groups/    groups that were not trained yet when the checkpoint was written

Nothing is written. Files may vanish or be half-written while the run goes on: a file that cannot be read is skipped,
and named if the group is nowhere else.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.checkpoint_store import MANIFEST
from common.errors import RunError, UserError
from common.lease import FinishedGroup
from common.segment_folder import SegmentFolder
from common.trajectory import NOT_DRAWN
from learner.run_directory import RunDirectory

WHY = "why.json"


@dataclass(frozen=True)
class SavedGroup:
    """A group as it was found."""

    group: FinishedGroup
    place: Path
    """Folder of the segment file."""
    set_aside: Path | None
    """Folder with the policy that was set aside with it; None for other places."""
    also: list[Path]
    """Other folders that hold a group of this number."""


@dataclass(frozen=True)
class Weights:
    """A policy's folder."""

    folder: Path
    version: int | None
    """Of this run; None where that is not known, as with weights from elsewhere."""
    why: str
    """Why these were chosen."""


def find_group(run: RunDirectory, number: int) -> SavedGroup:
    """The group of this number; one of `set_aside` first, since the policy lies beside it.

    Raises:
        UserError: when it is nowhere; lists which numbers are where.
    """
    places = sorted(run.path.glob("set_aside/*/groups"), reverse=True)
    places += [run.segments, *sorted(run.path.glob("checkpoints/step-*/groups"), reverse=True)]
    found: list[tuple[Path, FinishedGroup]] = []
    numbers: dict[Path, list[int]] = {}
    unreadable: list[str] = []
    for place in filter(Path.is_dir, places):
        groups = list(_groups(place, unreadable))
        numbers[place] = [group.number for group in groups]
        mine = [group for group in groups if group.number == number]
        if mine:
            found.append((place, max(mine, key=lambda group: group.attempt)))
    if not found:
        where = [f"{place.relative_to(run.path)}: {_ranges(held)}" for place, held in numbers.items()]
        damaged = f"; not readable: {'; '.join(unreadable)}" if unreadable else ""
        raise UserError(
            f"group {number} is not in the files of {run.path}; groups that are: {'; '.join(where) or 'none'}"
            f"{damaged}; give one of these (a group's file is removed once it is trained)"
        )
    (place, group), *others = found
    set_aside = place.parent if place.parent.parent.name == "set_aside" else None
    return SavedGroup(group, place, set_aside, [other for other, _ in others])


def _groups(place: Path, unreadable: list[str]) -> Iterator[FinishedGroup]:
    """Groups of all sound segments of a folder; what is wrong with the others is added to `unreadable`."""
    folder = SegmentFolder(place)
    for number in folder.numbers():
        try:
            yield from folder.read(number)
        except RunError as error:
            unreadable.append(str(error))


def _ranges(numbers: list[int]) -> str:
    """`3, 5-8` for 3, 5, 6, 7, 8."""
    ordered = sorted(set(numbers))
    if not ordered:
        return "none"
    gaps = [(a, b) for a, b in pairwise(ordered) if b > a + 1]
    firsts, lasts = [ordered[0], *(b for _, b in gaps)], [*(a for a, _ in gaps), ordered[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def choose_weights(run: RunDirectory, saved: SavedGroup, table: pa.Table, given: Path | None) -> Weights:
    """The weights to replay a group with.

    `given`, else those that were set aside with the group, else of the run's checkpoints and its warm start (version 0)
    those that drew most of the tokens; if none drew any, those next after the oldest token's, or the newest.

    Args:
        run: the run that the group is of.
        saved: where the group was found.
        table: the group.
        given: a folder in HF layout that a person chose.

    Raises:
        UserError: when the run has no weights on disk.
    """
    if given is not None:
        known = {weights.folder.resolve(): weights for weights in _on_disk(run)}.get(given.resolve())
        return Weights(given, None if known is None else known.version, "given")
    if saved.set_aside is not None:
        return Weights(saved.set_aside, _version(saved.set_aside / WHY), "set aside with the group")
    versions = np.concatenate([np.empty(0, np.int32), *table["token_version"].to_numpy()])
    versions = versions[versions != NOT_DRAWN]
    oldest = int(versions.min(initial=np.iinfo(np.int32).max))

    def rank(weights: Weights) -> tuple[int, bool, int]:
        version = -1 if weights.version is None else weights.version
        return -int((versions == version).sum()), version < oldest, abs(version - oldest)

    candidates = [weights for weights in _on_disk(run) if weights.version is not None]
    if not candidates:
        raise UserError(f"{run.path} has neither checkpoints nor a warm start; give the weights with --weights FOLDER")
    best = min(candidates, key=rank)
    return Weights(best.folder, best.version, "drew tokens" if rank(best)[0] else "nearest to the tokens' versions")


def _on_disk(run: RunDirectory) -> list[Weights]:
    """Every policy of a run, with its version."""
    manifests = run.path.glob(f"checkpoints/step-*/{MANIFEST}")
    found = [Weights(file.parent, _version(file), "") for file in manifests]
    found += [Weights(file.parent, _version(file), "") for file in run.path.glob(f"set_aside/*/{WHY}")]
    warm_start = [Weights(run.warm_start, 0, "")] if (run.warm_start / "config.json").is_file() else []
    return [*(weights for weights in found if (weights.folder / "config.json").is_file()), *warm_start]


def _version(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
