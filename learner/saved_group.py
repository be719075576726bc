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

import numpy as np
import pyarrow as pa

from common.checkpoint_manifest import MANIFEST
from common.errors import RunError, UserError
from common.lease import FinishedGroup
from common.place import FAILURES, Place
from common.segment_folder import SegmentFolder
from common.trajectory import NOT_DRAWN
from learner.run_directory import WHY, RunDirectory


@dataclass(frozen=True)
class SavedGroup:
    """A group as it was found."""

    group: FinishedGroup
    place: Place
    """Folder of the segment file."""
    set_aside: Place | None
    """Folder with the policy that was set aside with it; None for other places."""
    also: list[Place]
    """Other folders that hold a group of this number."""


@dataclass(frozen=True)
class Weights:
    """A policy's folder."""

    folder: Place
    version: int | None
    """Of this run; None where that is not known, as with weights from elsewhere."""
    why: str
    """Why these were chosen."""


def find_group(run: RunDirectory, number: int) -> SavedGroup:
    """The group of this number; one of `set_aside` first, since the policy lies beside it.

    Raises:
        UserError: when it is nowhere; lists which numbers are where.
    """
    places = [one / "groups" for one in reversed(_inside(run.set_aside))]
    places += [Place(run.segments), *(one / "groups" for one in reversed(_inside(_checkpoints(run))))]
    found: list[tuple[Place, FinishedGroup]] = []
    numbers: dict[Place, list[int]] = {}
    unreadable: list[str] = []
    for place in filter(Place.exists, places):
        groups = list(_groups(place, unreadable))
        numbers[place] = [group.number for group in groups]
        mine = [group for group in groups if group.number == number]
        if mine:
            found.append((place, max(mine, key=lambda group: group.attempt)))
    if not found:
        where = [f"{place.name.removeprefix(f'{run.name}/')}: {_ranges(held)}" for place, held in numbers.items()]
        damaged = f"; not readable: {'; '.join(unreadable)}" if unreadable else ""
        raise UserError(
            f"group {number} is not in the files of {run.name}; groups that are: {'; '.join(where) or 'none'}"
            f"{damaged}; give one of these (a group's bytes go once the oldest checkpoint contains its training)"
        )
    (place, group), *others = found
    set_aside = place.parent if place.parent.parent.last == "set_aside" else None
    return SavedGroup(group, place, set_aside, [other for other, _ in others])


def _inside(place: Place) -> list[Place]:
    return [place / name for name in place.folders()]


def _checkpoints(run: RunDirectory) -> Place:
    return Place(run.checkpoint_store(run.config()).name)


def _groups(place: Place, unreadable: list[str]) -> Iterator[FinishedGroup]:
    """Groups of all sound segments of a folder; what is wrong with the others is added to `unreadable`."""
    folder = SegmentFolder(place.name)
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


def choose_weights(run: RunDirectory, saved: SavedGroup, table: pa.Table, given: str | None) -> Weights:
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
        same = (one for one in _on_disk(run) if _resolved(one.folder) == _resolved(Place(given)))
        known = next(same, None)
        return Weights(Place(given), None if known is None else known.version, "given")
    if saved.set_aside is not None:
        return Weights(saved.set_aside, _version(saved.set_aside, WHY), "set aside with the group")
    versions = np.concatenate([np.empty(0, np.int32), *table["token_version"].to_numpy()])
    versions = versions[versions != NOT_DRAWN]
    oldest = int(versions.min(initial=np.iinfo(np.int32).max))

    def rank(weights: Weights) -> tuple[int, bool, int]:
        version = -1 if weights.version is None else weights.version
        return -int((versions == version).sum()), version < oldest, abs(version - oldest)

    candidates = [weights for weights in _on_disk(run) if weights.version is not None]
    if not candidates:
        raise UserError(f"{run.name} has neither checkpoints nor a warm start; give the weights with --weights FOLDER")
    best = min(candidates, key=rank)
    return Weights(best.folder, best.version, "drew tokens" if rank(best)[0] else "nearest to the tokens' versions")


def _resolved(place: Place) -> str:
    """The same for all paths that lead to one folder."""
    return place.name if place.folder is None else str(place.folder.resolve())


def _on_disk(run: RunDirectory) -> list[Weights]:
    """Every policy of a run, with its version."""
    folders = [(one, MANIFEST) for one in _inside(_checkpoints(run))]
    folders += [(one, WHY) for one in _inside(run.set_aside)]
    found = [Weights(one, _version(one, file), "") for one, file in folders if one.holds(file)]
    return [one for one in [*found, Weights(run.warm_start, 0, "")] if one.folder.holds("config.json")]


def _version(folder: Place, file: str) -> int | None:
    try:
        return int(json.loads(folder.read(file))["version"])
    except (*FAILURES, ValueError, KeyError, TypeError):
        return None
