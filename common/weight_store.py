"""WeightStore: the last few published snapshots of the learner's weights.

Contract:
- Versions strictly increase; the newest is what an actor starts from and adopts.
- The last `keep` versions can be had; an older one is refused with the versions that are kept.
- A reader verifies the digest before it adopts.
- A snapshot's payload is an opaque handle (in production `[ObjectRef]`: a reference inside a list, so that Ray passes
  the reference on and does not fetch what it stands for). Dropping a snapshot drops the handle, and with it the bytes.
- Weights that are frozen beside an adapter are not in the buffer. Each snapshot names them by digest, with a second
  handle in its payload: who has them already does not fetch them again.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import xxhash

from common.errors import UserError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One policy version: what an actor needs to fetch it and to check what it fetched."""

    version: int
    digest: str
    payload: object
    base: str = ""
    """Digest of the frozen weights; empty where everything learns."""


def digest(*arrays: np.ndarray) -> str:
    """128-bit xxh3 of the arrays' bytes; a guard against corruption, not against an attacker."""
    found = xxhash.xxh3_128()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


UNPUBLISHED = Snapshot(version=-1, digest="", payload=None)
"""What stands in for the newest snapshot before the first publication: older than any version, so nobody adopts it."""


class WeightStore:
    """Starts empty and holds the last `keep` publications."""

    def __init__(self, *, keep: int) -> None:
        """Raises `UserError` when `keep` is below 1."""
        if keep < 1:
            raise UserError(f"keep_versions is {keep}; at least the newest version must be kept, give 1 or more")
        self._kept: deque[Snapshot] = deque(maxlen=keep)

    @property
    def latest(self) -> Snapshot:
        """The newest snapshot; `UNPUBLISHED` before the first publication."""
        return self._kept[-1] if self._kept else UNPUBLISHED

    def publish(self, snapshot: Snapshot) -> None:
        """Makes `snapshot` the newest. Raises RuntimeError when its version is not above every earlier one."""
        if snapshot.version <= self.latest.version:
            raise RuntimeError(f"version {snapshot.version} published after {self.latest.version}; it must be greater")
        self._kept.append(snapshot)
