"""Help: every command explains itself with right examples, the shell completes, and nothing heavy is loaded."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import Diffpo, diffpo  # noqa: F401

from learner.cli import EXIT_CODES, app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
HEAVY = ("torch", "ray", "transformers", "pyarrow", "numpy")
AS_DIFFPO = "import sys; sys.argv[0] = 'diffpo'; from learner.cli import main; main()"


def fresh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`diffpo` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", AS_DIFFPO, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def examples(name: str) -> list[str]:
    return re.findall(r"^ *Example: (.*)$", COMMANDS[name].help, re.MULTILINE)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_one_style_of_help(name: str) -> None:
    first, *_ = COMMANDS[name].help.splitlines()
    assert first[0].isupper()
    assert examples(name), "at least one example"
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help.endswith("."), f"{parameter.name} says what it is"


@pytest.mark.parametrize(("name", "example"), [(name, text) for name in COMMANDS for text in examples(name)])
def test_examples_are_commands_that_there_are(name: str, example: str) -> None:
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("diffpo", name)
    COMMANDS[name].make_context(name, arguments)  # raises what a bad command line raises


def test_the_readme_has_every_command() -> None:
    table = README.split("| command | does |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `diffpo ([a-z]+)", table, re.MULTILINE)) == set(COMMANDS)


def test_help_and_readme_name_the_same_exit_codes(diffpo: Diffpo) -> None:  # noqa: F811
    table = README.split("| exit code | means |")[1].split("\n\n")[0]
    codes = set(re.findall(r"\b\d+\b", " ".join(re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE))))
    assert codes == set(re.findall(r"\b\d+\b", EXIT_CODES)) == {"0", "1", "2", "130", "143"}
    said = " ".join(diffpo("--help").out.split())
    assert " ".join(EXIT_CODES.split()) in said


def test_the_version_is_the_packages(diffpo: Diffpo) -> None:  # noqa: F811
    ended = diffpo("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"diffpo {version('diffpo')}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_that_takes_time(arguments: list[str]) -> None:
    code = f"""
import sys
from learner.cli import main
sys.argv = ["diffpo", *{arguments!r}]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(("typed", "offered"), [("diffpo do", "doctor"), ("diffpo train --res", "--resume")])
def test_the_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    words = len(typed.split()) - 1
    done = fresh(_DIFFPO_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(words))
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_installed(shell: str, tmp_path: Path) -> None:
    known = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "True"}
    shown = fresh("--show-completion", shell, **known)
    assert (shown.returncode, "_DIFFPO_COMPLETE=complete_" in shown.stdout) == (0, True)
    assert fresh("--install-completion", shell, **known).returncode == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_DIFFPO_COMPLETE" in path.read_text() for path in written)


@pytest.mark.parametrize("flags", [["--quiet", "--json"], ["--json", "--dry-run"]])
@pytest.mark.parametrize("command", ["train", "sft"])
def test_flags_that_contradict_each_other_end_with_two(diffpo: Diffpo, command: str, flags: list[str]) -> None:  # noqa: F811
    ended = diffpo(command, *flags, "task.name=sudoku")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
