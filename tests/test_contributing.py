"""CONTRIBUTING.md: its examples work in the files that they are for, and what it names exists."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from learner_fixtures import generate_batch, tiny_policy

from common.metrics import CATALOGUE
from common.tasks import SPLITS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
FILES = re.findall(r"`((?:common|actors|learner|tests|docs|deploy)/[\w./-]+\.\w+|pyproject\.toml|CHANGELOG\.md)`", TEXT)


def run(file: str, *, new: bool = False) -> dict[str, Any]:
    """What a block defines when it stands at the end of its file, or is a file."""
    base = ModuleType("new") if new else import_module(file.removesuffix(".py").replace("/", "."))
    names = dict(vars(base))
    exec(BLOCKS[file], names)  # noqa: S102 - the page's own code
    return names


def test_every_part_that_is_added_has_an_example() -> None:
    headings = re.findall(r"^## Add a (.+)$", TEXT, re.MULTILINE)
    assert headings == ["surrogate", "reveal rule", "task", "metric"]
    assert [file for file in BLOCKS if not (ROOT / file).exists()] == ["common/tasks/reverse.py"]
    assert len(BLOCKS) == len(headings)


def test_the_surrogate_scores_each_token_once_on_a_latent_that_masks_it() -> None:
    batch = generate_batch(tiny_policy(), sizes=(4, 6, 3))
    latents = run("learner/surrogate.py")["halves"](batch)
    assert (latents.scores.sum(1) == batch.scored).all()
    assert not (latents.scores & latents.shown).any()
    assert latents.scores[:, 1].any()


@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0])
def test_the_reveal_rule_reveals_at_least_one_active_position(limit: float) -> None:
    calm = run("actors/reveal_rules.py")["calm"]
    entropy = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    active = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen = calm(entropy, 1 - entropy, active, torch.full((50,), limit))
    assert not (chosen & ~active).any()
    assert (chosen.any(-1) == active.any(-1)).all()
    assert (chosen >= (active & (entropy <= limit))).all()


def test_the_task_keeps_its_splits_apart_and_scores() -> None:
    names = run("common/tasks/reverse.py", new=True)
    task = names["ReverseTask"](names["ReverseConfig"]())
    words = {split: {task.example(split, index).prompt for index in range(100)} for split in SPLITS}
    assert len(set.union(*words.values())) == sum(map(len, words.values()))
    example = task.example("train", 0)
    assert task.rewards(example, task.demonstration(example, 0)) == {"letters": 1.0, "exact": 1.0}
    assert task.rewards(example, "") == {"letters": 0.0, "exact": 0.0}


def test_the_metric_is_one_that_the_catalogue_could_have() -> None:
    names = run("common/metrics.py")
    metric = eval(BLOCKS["common/metrics.py"], names)  # noqa: S307 - the page's own code
    assert metric.name not in CATALOGUE


def test_what_the_page_names_stands_in_the_files_that_it_names() -> None:
    """Identifiers in backticks, but for those of the examples."""
    assert len(set(FILES)) > 25
    assert [name for name in FILES if not (ROOT / name).is_file()] == []
    known = "".join((ROOT / name).read_text() for name in set(FILES)) + "".join(BLOCKS.values())
    named = re.findall(r"`([A-Za-z_][\w.]*)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    words = {name.rpartition(".")[2] for name in named} - {"utils", "MINOR", "PATCH", "build"}
    assert len(words) > 25
    assert [word for word in words if not re.search(rf"\b{word}\b", known)] == []
