"""Docs say what the code says: what is made from it, and the names of files, methods, metrics and keys."""

import ast
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from learner_fixtures import tiny_policy

from common.config_file import load_config
from common.config_reference import markdown_tables
from common.metrics import CATALOGUE, markdown_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("common", "actors", "learner")
KEYS = set(re.findall(r"^\| `([^`]+)`", markdown_tables(), re.MULTILINE))
SECTIONS = {key.partition(".")[0] for key in KEYS}
FILE = re.compile(r"\b(?:common|actors|learner|tests|deploy|docs)/[\w./-]+\.(?:py|yaml|yml|json|txt|md)\b")


def methods() -> dict[str, set[str]]:
    """Every class of the packages and the functions it defines."""
    trees = [ast.parse(path.read_text()) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name: {item.name for item in node.body if hasattr(item, "name")} for node in classes}


def test_metrics_page_holds_the_catalogue() -> None:
    """`docs/metrics.md` ends with what `diffpo metrics` prints."""
    assert (DOCS / "metrics.md").read_text().endswith("\n\n" + markdown_table())


def test_configuration_page_holds_every_key() -> None:
    """`docs/configuration.md` ends with what `diffpo config` prints, and that misses no key of a run."""
    assert (DOCS / "configuration.md").read_text().endswith("\n\n" + markdown_tables())
    run = load_config(None, ["task.name=sudoku", "model.lora.rank=4"]).model_dump()
    assert set(leaves(run, "")) <= KEYS
    for row in re.findall(r"^\| `.*$", markdown_tables(), re.MULTILINE):
        assert len(re.split(r"(?<!\\)\|", row)) == 7, row
        assert re.split(r"(?<!\\)\|", row)[5].strip(), row


def leaves(tree: dict[str, Any], above: str) -> Iterator[str]:
    """Dotted names of everything that is no section; mappings of the user's own names count as one value."""
    for name, value in tree.items():
        key = above + name
        yield from leaves(value, key + ".") if isinstance(value, dict) and key not in KEYS else [key]


@pytest.mark.parametrize("page", ["guide.md", "operations.md"])
def test_every_metric_that_a_page_names_is_exported(page: str) -> None:
    exported = {name for metric in CATALOGUE.values() for name in (metric.exported, *metric.samples)}
    named = set(re.findall(r"`(diffpo_[a-z_]+)", (DOCS / page).read_text()))
    assert len(named) > 20
    assert named <= exported


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_key_that_a_page_names_exists(page: str) -> None:
    """Backticks that begin with a section and hold a dotted name, but for names of files and of Python."""
    text = re.sub(r"```(?:python|math)\n.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", text)
    named = {
        found for span in spans for found in re.findall(rf"(?<![\w./:-])((?:{'|'.join(SECTIONS)})\.[\w.]+\w)", span)
    }
    files = {name for name in named if re.search(r"\.(ya?ml|jsonl?|py|safetensors)$", name)}
    sections = {".".join(key.split(".")[:depth]) for key in KEYS for depth in (2, 3)}
    assert named - files - {"model.generate"} <= KEYS | sections


def test_the_drawing_of_the_architecture_names_files_and_calls_that_exist() -> None:
    drawing = (DOCS / "architecture.svg").read_text()
    files = re.findall(r'class="file"[^>]*>([^<]+)<', drawing)
    calls = {word for label in re.findall(r'class="call"[^>]*>([^<]+)<', drawing) for word in re.findall(r"\w+", label)}
    assert len(files) > 15
    assert [name for name in files if not (ROOT / name).is_file()] == []
    defined = {
        node.name
        for name in files
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    shown = re.findall(r"<text[^>]*>([A-Z]\w+[a-z][A-Z]\w+)\b", drawing)  # names of classes
    assert len(shown) > 8
    assert calls | set(shown) <= defined


def test_the_page_of_the_architecture_names_methods_that_exist() -> None:
    known = methods()
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", (DOCS / "architecture.md").read_text())
    assert len(named) > 15
    assert [f"{owner}.{name}" for owner, name in named if name not in known.get(owner, set())] == []


def test_the_walk_names_what_is_in_the_files() -> None:
    """Every `file: name` of the page of the architecture is defined there, a method by its class."""
    named = re.findall(r"`([\w/]+\.py): (\w+)(?:\.(\w+))?`", (DOCS / "architecture.md").read_text())
    assert len(named) > 35
    for file, owner, method in named:
        body = ast.parse((ROOT / file).read_text()).body
        found = [node for node in body if getattr(node, "name", None) == owner or owner in assigned(node)]
        assert found, f"{file}: {owner}"
        assert not method or method in {getattr(item, "name", "") for item in getattr(found[0], "body", [])}, method


def assigned(node: ast.stmt) -> set[str]:
    """Names that a statement gives values."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", [*(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).is_file()] == []


def test_the_changelog_begins_with_the_version_of_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    entries = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == version


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
