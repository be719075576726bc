"""New folder: there when it is complete, not at all where something fails; a full disk is named whoever meets it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from new_folder_fixtures import no_more_than
from safetensors.torch import save_file

from common.errors import RunError, UserError
from common.new_folder import new_folder, writing
from common.tokenizer import character_tokenizer

WRITERS: dict[str, Callable[[Path], object]] = {
    "plain": lambda folder: (folder / "a").write_text("x" * 1000),
    "safetensors": lambda folder: save_file({"a": torch.zeros(1000)}, folder / "a"),
    "torch": lambda folder: torch.save({"a": torch.zeros(1000)}, folder / "a"),
    "tokenizers": lambda folder: character_tokenizer("0123456789").save_pretrained(folder),
    "tokenizer.json": lambda folder: character_tokenizer("0123456789").backend_tokenizer.save(str(folder / "a")),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_error_whichever_library_meets_it(write: Callable[[Path], object], tmp_path: Path) -> None:
    with (
        no_more_than(100),
        pytest.raises(
            RunError, match=rf"^{tmp_path} cannot be written \(.*(File too large|unexpected pos).*\); make room there$"
        ),
        writing(tmp_path),
    ):
        write(tmp_path)
    with writing(tmp_path):
        write(tmp_path)


def test_a_folder_is_there_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "above/target"
    with new_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    beside = tmp_path / "beside"
    beside.mkdir()
    assert target.stat().st_mode == beside.stat().st_mode


@pytest.mark.parametrize("error", [ValueError("a mistake"), UserError("what was given"), KeyboardInterrupt()])
def test_other_failures_pass_and_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        (partial / "file").write_text("x")
        raise error

    with pytest.raises(type(error)), new_folder(tmp_path / "target") as partial:
        fill(partial)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_none_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"file/target cannot be made \(.*\); choose another folder"),
        new_folder(tmp_path / "file/target"),
    ):
        pass
