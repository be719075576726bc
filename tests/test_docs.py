"""Docs that are made from code say what the code says."""

from pathlib import Path

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
