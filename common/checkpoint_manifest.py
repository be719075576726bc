"""Checkpoint manifest: what a checkpoint is and which files it has, as `manifest.json` says it.

It names every file with its bytes and its sha256, and carries a digest of itself: damage is found, an attacker is not.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import cause

SCHEMA_VERSION = "1"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What the manifest knows of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it."""

    step: int
    version: int
    journal_index: int
    facts: Mapping[str, Any]
    files: Mapping[str, StoredFile]

    @property
    def name(self) -> str:
        """Of its folder inside the store."""
        return folder_name(self.step)


def folder_name(step: int) -> str:
    """Of a checkpoint, inside its store."""
    return f"step-{step:06d}"


def canonical(value: Any) -> str:
    """One text for each value that JSON can express. Raises TypeError, ValueError for others."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(described: Mapping[str, Any]) -> str:
    """Of all that a manifest says but its digest."""
    return hashlib.sha256(canonical(described).encode()).hexdigest()


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of `manifest.json`."""
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def describe(
    *, step: int, version: int, journal_index: int, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """The manifest of a checkpoint, with its digest; `files` are the fields of `StoredFile` by name."""
    described = {
        "schema": SCHEMA_VERSION,
        "step": step,
        "version": version,
        "journal_index": journal_index,
        "facts": facts,
        "files": files,
    }
    return encode({**described, "digest": digest(described)})


def decode(encoded: bytes, step: int) -> Checkpoint:
    """The checkpoint that a manifest describes. Raises ValueError when it is not what was written for `step`."""
    try:
        manifest = json.loads(encoded)
        described = {key: value for key, value in manifest.items() if key != "digest"}
        # the digest is of the meaning; the comparison finds what does not change it, such as other white space
        sound = manifest["digest"] == digest(described) and encoded == encode(manifest)
    except (ValueError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError("it is cut short, or has another digest than it was written with")
    schema = described.get("schema")
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"it has schema version {schema}, this code reads {SCHEMA_VERSION}; use the code that wrote it"
        )
    if described.get("step") != step:
        raise ValueError(f"it is that of step {described.get('step')}, so its folder was renamed or copied")
    try:
        files = {name: StoredFile(**stored) for name, stored in described["files"].items()}
        found = Checkpoint(step, described["version"], described["journal_index"], described["facts"], files)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks a field or has an odd one: {cause(error)}") from error
    if not isinstance(found.version, int) or not isinstance(found.journal_index, int):
        raise ValueError(f"version {found.version!r} or journal index {found.journal_index!r} is no whole number")
    for name in files:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"it names a file outside its folder, {name!r}")
    return found
