"""Docs that are made from code say what the code says."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from learner_fixtures import tiny_policy

from common.metrics import markdown_table

ROOT = Path(__file__).parents[1]


def test_metrics_page_holds_the_catalogue() -> None:
    """`docs/metrics.md` ends with what `diffpo metrics` prints."""
    assert (ROOT / "docs" / "metrics.md").read_text().endswith("\n\n" + markdown_table())


def test_ci_runs_the_readme_test_command() -> None:
    """The command under "Run the tests" stands in `.ci/run` as it is."""
    section = (ROOT / "README.md").read_text().split("## Run the tests")[1]
    command = section.split("```")[1].removeprefix("bash\n").strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_code_of_the_evaluation_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness gets completions, cut where it says; `from_pretrained` gives logits for MASK tokens."""
    policy = tiny_policy(double=False)
    policy.save(tmp_path / "runs/sudoku/warm_start")
    monkeypatch.chdir(tmp_path)
    plain, harness = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    Path("plain.py").write_text(plain)
    Path("harness.py").write_text(harness)

    found = runpy.run_path("plain.py")
    assert found["logits"].shape == (1, 4 + 8, len(policy.tokenizer))

    model = runpy.run_path("harness.py")["DiffpoModel"]("runs/sudoku/warm_start", prompt_tokens=8, tokens=8)
    asked = [("0123", {"until": []}), ("44", {"until": ["0", "1", "2", "3", "4", "<"]}), ("0123", {})]
    texts = model.generate_until([SimpleNamespace(args=one) for one in asked])
    assert texts[0] == texts[2] != ""
    assert texts[1] == ""
    assert texts[0] == model.complete(["0123"])[0]
