"""Checkpoints: what was committed comes back as it was, damage is named and passed over, half of one is none."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pytest
from checkpoint_fixtures import Died, faulty_store
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from common.checkpoint_manifest import Checkpoint
from common.checkpoint_store import CheckpointDamaged, CheckpointStore, Found
from common.errors import RunError, UserError

FILES = {"model.bin": bytes(range(256)) * 9, "head/weights.gz": b"not really compressed", "empty": b""}
STORES = ["local", "remote"]


def store_in(folder: Path, kind: str = "local") -> CheckpointStore:
    """A remote store is one whose file system is not the local one."""
    if kind == "local":
        return CheckpointStore(folder / "checkpoints")
    return CheckpointStore("checkpoints", _filesystem=fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()))


def write(store: CheckpointStore, step: int, *, version: int | None = None, commit: bool = True) -> Checkpoint | None:
    draft = store.begin(step)
    for name, content in FILES.items():
        (draft.path / name).parent.mkdir(exist_ok=True)
        (draft.path / name).write_bytes(content)
    facts = {"step": step, "reward": 0.1, "name": "grüße"}
    return draft.commit(version=version or step, journal_index=step + 5, facts=facts) if commit else None


def on_disk(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def newest(store: CheckpointStore) -> Found:
    found = store.newest_sound()
    assert found
    return found


# -- writing and reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_a_checkpoint_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    store = store_in(tmp_path, kind)
    assert (store.checkpoints(), store.damaged(), store.newest_sound()) == ([], [], None)
    assert os.listdir(tmp_path) == []  # nothing made so far
    written = write(store, 120, version=7)
    assert written
    assert (written.step, written.version, written.journal_index, written.name) == (120, 7, 125, "step-000120")
    assert written.facts == {"step": 120, "reward": 0.1, "name": "grüße"}
    reader = pickle.loads(pickle.dumps(store))
    assert reader.checkpoints() == [written]
    assert newest(reader) == Found(written, [], [])
    assert {name: reader.read(written, name) for name in written.files} == FILES
    with reader.fetch(written) as folder:
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert folder.exists() == (kind == "local")
    manifest = json.loads((tmp_path / "checkpoints/step-000120/manifest.json").read_text())
    assert (manifest["schema"], manifest["files"]["model.bin"]["bytes"]) == ("1", 2304)
    with pytest.raises(LookupError, match=r"has no file nothing; it has empty, head/weights.gz, model.bin"):
        reader.read(written, "nothing")


def test_a_file_uri_is_a_local_store_and_others_are_the_users_mistake(tmp_path: Path) -> None:
    written = write(CheckpointStore(f"file://{tmp_path}/checkpoints/"), 1)
    assert store_in(tmp_path).checkpoints() == [written]
    with pytest.raises(UserError, match=r"checkpoint folder nowhere://x/y cannot be opened: .*give a local folder"):
        CheckpointStore("nowhere://x/y")


@pytest.mark.parametrize("kind", STORES)
def test_a_draft_is_no_checkpoint_and_leaves_nothing_when_abandoned(kind: str, tmp_path: Path) -> None:
    store = store_in(tmp_path, kind)
    draft = store.begin(1)
    (draft.path / "manifest.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"manifest.json is the store's own"):
        draft.commit(version=1, journal_index=0)
    draft.abandon()
    with pytest.raises(RuntimeError, match="step 1 was abandoned before"):
        draft.commit(version=1, journal_index=0)
    assert (on_disk(tmp_path), draft.path.exists(), store.newest_sound()) == ([], False, None)
    draft = store.begin(2)
    for facts in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            draft.commit(version=1, journal_index=0, facts=facts)
        assert store.checkpoints() == []
    written = draft.commit(version=1, journal_index=0)
    draft.abandon()  # too late, and harmless
    assert store.checkpoints() == [written]


@pytest.mark.parametrize("kind", STORES)
def test_beginning_a_step_again_replaces_it(kind: str, tmp_path: Path) -> None:
    store = store_in(tmp_path, kind)
    write(store, 1)
    (tmp_path / "checkpoints/step-000001/left_over").write_text("")
    draft = store.begin(1)
    assert (store.checkpoints(), list(draft.path.iterdir())) == ([], [])
    (draft.path / "new").write_text("x")
    draft.commit(version=2, journal_index=0)
    assert sorted(os.listdir(tmp_path / "checkpoints/step-000001")) == ["manifest.json", "new"]


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, never written to: tests copy it."""
    folder = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        write(store_in(folder), step)
    return folder


def damage(path: Path, how: str, at: int, mask: int) -> None:
    """`at` is taken modulo the size, so that any number hits."""
    content = bytearray(path.read_bytes())
    if how == "removed":
        return path.unlink()
    if how == "extended":
        content += bytes([mask])
    elif how == "cut":
        del content[at % len(content) :]
    else:
        content[at % len(content)] ^= mask
    path.write_bytes(content)


SIZE = "bytes instead of"
WHAT_IS_WRONG = {"removed": "is missing", "extended": SIZE, "cut": SIZE, "flipped": "digest"}


@settings(max_examples=150)
@given(
    name=st.sampled_from([*FILES, "manifest.json"]),
    how=st.sampled_from(list(WHAT_IS_WRONG)),
    at=st.integers(0, 2**20),
    mask=st.integers(1, 255),
    kind=st.sampled_from(STORES),
)
def test_any_damage_is_found_and_named_and_the_checkpoint_before_is_used(
    name: str, how: str, at: int, mask: int, kind: str, pristine: Path
) -> None:
    if name == "empty" and how in ("cut", "flipped"):
        how = "extended"
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        shutil.copytree(pristine, folder, dirs_exist_ok=True)
        store = store_in(folder, kind)
        before, after = store.checkpoints()
        damage(folder / "checkpoints/step-000002" / name, how, at, mask)
        found = newest(store)
        (warning,) = found.warnings
        assert found.checkpoint == before
        assert warning.endswith("; step-000001 is used in its place")
        if name == "manifest.json":
            assert store.checkpoints() == [before]
            assert len(store.damaged()) == (how != "removed")
            assert ("step-000002 is half-written" if how == "removed" else "step-000002/manifest.json is") in warning
        else:
            named = f"step-000002/{name} "
            assert named in warning
            assert WHAT_IS_WRONG[how] in warning
            for call in (lambda: store.verify(after), lambda: store.read(after, name)):
                with pytest.raises(CheckpointDamaged, match=f"{named}.*{WHAT_IS_WRONG[how]}.*restore it from a copy"):
                    call()
            if kind == "remote":
                with pytest.raises(CheckpointDamaged, match=named), store.fetch(after):
                    pass


def test_every_single_byte_of_the_manifest_counts(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints/step-000002/manifest.json"
    whole = manifest.read_bytes()
    store = store_in(tmp_path)
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            manifest.write_bytes(damaged)
            assert len(store.damaged()) == 1
    manifest.write_bytes(whole + b" ")  # means the same, and is not what was written
    assert len(store.damaged()) == 1


def test_when_no_checkpoint_is_sound_all_are_named(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints/step-000001/model.bin", "cut", 9, 1)
    damage(tmp_path / "checkpoints/step-000002/manifest.json", "cut", 9, 1)
    named = "step-000001/model.bin has 9 bytes instead of 2304; .*step-000002/manifest.json is damaged: it is cut"
    with pytest.raises(CheckpointDamaged, match=f"no sound checkpoint: .*{named}.*; restore one of them") as raised:
        store_in(tmp_path).newest_sound()
    again = pickle.loads(pickle.dumps(raised.value))  # as Ray passes it on
    assert (str(again), again.fault) == (str(raised.value), raised.value.fault)
    shutil.rmtree(tmp_path / "checkpoints/step-000001")
    with pytest.raises(CheckpointDamaged, match=r"no sound checkpoint: .*step-000002/manifest.json is damaged"):
        store_in(tmp_path).newest_sound()


def test_a_folder_that_was_renamed_and_a_later_schema_are_named(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, 1)
    (tmp_path / "checkpoints/step-000001").rename(tmp_path / "checkpoints/step-000003")
    (tmp_path / "checkpoints/step-5").mkdir()  # not a name of ours
    assert "step-000003/manifest.json is damaged: it is that of step 1" in "".join(store.damaged())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.checkpoint_manifest.SCHEMA_VERSION", "2")
        write(store, 3)
    assert "schema version 2, this code reads 1; use the code that wrote it" in "".join(store.damaged())


# -- warnings and age -----------------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_highest_version(tmp_path: Path) -> None:
    """A run went to step 5, and was then resumed from step 2."""
    store = store_in(tmp_path)
    for step, version in ((2, 20), (4, 40), (5, 50), (3, 60)):
        write(store, step, version=version)
    assert [one.step for one in store.checkpoints()] == [2, 3, 4, 5]
    assert newest(store).checkpoint.step == 3
    damage(tmp_path / "checkpoints/step-000003/model.bin", "removed", 0, 0)
    damage(tmp_path / "checkpoints/step-000005/model.bin", "removed", 0, 0)
    found = newest(store)
    assert found.checkpoint.step == 4
    assert ["step-000003/model.bin is missing" in one for one in found.warnings] == [True, False]
    assert ["step-000005/model.bin is missing" in one for one in found.warnings] == [False, True]
    assert [one.step for one in store.prune(2)] == [3, 5]


def test_half_written_folders_are_mentioned_and_alone_are_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, 3, commit=False)
    assert (store.checkpoints(), store.damaged(), store.newest_sound(), store.prune(1)) == ([], [], None, [])
    write(store, 2)
    (warning,) = newest(store).warnings
    assert "step-000003 is half-written, it has no manifest.json; step-000002 is used in its place" in warning


@pytest.mark.parametrize("kind", STORES)
def test_pruning_keeps_the_newest_and_what_may_still_be_written(kind: str, tmp_path: Path) -> None:
    store = store_in(tmp_path, kind)
    for step in range(1, 9):
        write(store, step, commit=step not in (3, 6, 8))
    for step in (1, 5):
        damage(tmp_path / f"checkpoints/step-{step:06d}/manifest.json", "cut", 9, 1)
    assert store.prune(2) == store.checkpoints()
    assert on_disk(tmp_path) == [f"step-00000{step}" for step in (4, 5, 7, 8)]  # 5 is damaged, but not older than 4
    with pytest.raises(UserError, match=r"prune keeps 0 checkpoints; .*give 1 or more"):
        store.prune(0)


# -- full disks and death -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_a_full_disk_leaves_no_manifest_and_the_draft_can_go_on(kind: str, tmp_path: Path) -> None:
    """A limit on file size stands in for it: the write of the manifest, or the upload, really fails in its middle."""
    store = store_in(tmp_path, kind)
    draft = store.begin(1)
    (draft.path / "model.bin").write_bytes(FILES["model.bin"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    file = "manifest.json" if kind == "local" else "model.bin"
    try:
        with pytest.raises(RunError, match=f"step-000001: file {file} cannot be committed: File too large; make room"):
            draft.commit(version=1, journal_index=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "checkpoints/step-000001/manifest.json").exists()
    written = draft.commit(version=1, journal_index=0)
    assert newest(store).checkpoint == written


def test_all_is_fsynced_the_manifest_last_and_a_failing_fsync_fails_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    failing: set[int] = set()

    def fsync(opened: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path / "checkpoints/step-000001"))
        if len(synced) in failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    store = store_in(tmp_path)
    write(store, 1)
    assert (set(synced[:-2]), synced[-2:]) == ({*FILES, ".", "head", "..", "../.."}, ["manifest.json", "."])
    for number in range(1, len(synced) + 1):
        synced.clear()
        failing.clear()
        failing.add(number)
        with pytest.raises(RunError, match=r"step-000001: .* cannot be committed: Input/output error; make room"):
            write(store, 1)
        assert store.checkpoints() == []


def test_a_store_that_is_full_after_any_number_of_bytes_keeps_what_it_had(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    needed = sum(map(len, FILES.values())) + (tmp_path / "checkpoints/step-000002/manifest.json").stat().st_size
    for room in [*range(0, needed, 97), needed - 1]:
        with pytest.raises(RunError, match=r"step-000003: file \S+ cannot be committed: No space left on device; make"):
            write(faulty_store(tmp_path, room=room), 3)
        assert "step-000003 is half-written" in newest(store_in(tmp_path)).warnings[0]
    write(faulty_store(tmp_path, room=needed), 3)
    assert newest(store_in(tmp_path)).checkpoint.step == 3


def test_a_process_that_dies_at_any_change_leaves_a_sound_checkpoint(pristine: Path, tmp_path: Path) -> None:
    """Beginning a step that is there, uploading, committing, pruning."""
    steps = []
    for death in range(100):
        folder = tmp_path / str(death)
        shutil.copytree(pristine, folder)
        store = faulty_store(folder, death=death)
        try:
            write(store, 2, version=9)
            write(store, 3, version=10)
            store.prune(1)
        except Died:
            found = newest(store_in(folder))
            assert all("half-written" in one or "manifest.json is damaged" in one for one in found.warnings)
            steps.append(found.checkpoint.step)
            continue
        assert on_disk(folder) == ["step-000003"]
        break
    assert [step for step, _ in groupby(steps)] == [2, 1, 2, 3]


def test_a_prune_killed_between_manifest_and_files_is_finished_by_the_next(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    code = "import sys, pathlib; from checkpoint_fixtures import faulty_store; "
    code += "faulty_store(pathlib.Path(sys.argv[1]), death=1, by_signal=True).prune(1)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "checkpoints/step-000001")) == ["empty", "head", "model.bin"]
    store = store_in(tmp_path)
    assert [one.step for one in store.checkpoints()] == [2]
    assert "step-000001 is half-written" in newest(store).warnings[0]
    store.prune(1)
    assert on_disk(tmp_path) == ["step-000002"]


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    store = store_in(tmp_path)
    with pytest.raises(RunError, match=f"folder {tmp_path}/checkpoints cannot be listed: Not a directory; mend"):
        store.checkpoints()
    with pytest.raises(RunError, match=f"{tmp_path}/checkpoints/step-000001 cannot be removed: Not a directory; mend"):
        store.begin(1)
    (tmp_path / "checkpoints").unlink()
    draft = store.begin(1)
    shutil.rmtree(draft.path)
    with pytest.raises(RunError, match="step-000001 cannot be listed: No such file or directory; make room"):
        draft.commit(version=1, journal_index=0)
