"""`diffpo generate`: what a person sees of one completion, and what is refused."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.config import ThresholdConfig
from common.config_file import dump_config, load_config
from common.errors import RunError, UserError
from common.policy import Policy
from learner.generation import BLANK, Choice, generate
from learner.run_directory import RUN_CONFIG

CHOICE = Choice(
    prompt="12+3=",
    tokens=8,
    block=None,
    rule="entropy_bound",
    threshold=None,
    temperature=1.0,
    seed=3,
    cache="none",
    device="cpu",
    raw=False,
)


@pytest.fixture(scope="module")
def folder(make_policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_policy(double=False).save(path)
    return path


def shown(folder: Path, choice: Choice, *, show_steps: bool = True) -> tuple[list[str], object]:
    console = Console(file=io.StringIO(), width=200)
    completion = generate(folder, choice, console, show_steps=show_steps)
    return console.file.getvalue().splitlines(), completion


def test_every_step_shows_fewer_blanks_until_none_is_left(folder: Path) -> None:
    lines, completion = shown(folder, replace(CHOICE, threshold=0.5))
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == completion.nfe
    blanks = [line.count(BLANK) for line in steps]
    assert blanks == sorted(blanks, reverse=True)
    assert len(set(blanks)) == len(blanks)
    assert blanks[-1] == 0
    drawn = int((completion.reveal_step <= completion.nfe).sum())
    assert f"NFE {completion.nfe}  TPF {drawn / completion.nfe:.2f}" in lines[-1]


def test_the_threshold_that_was_used_is_told(make_policy, tmp_path: Path) -> None:
    """The policy's own comes with the scale that training gave it."""
    policy = make_policy(double=False)
    policy.calibration.log_gamma_scale.fill_(math.log(3.0))
    policy.save(tmp_path / "scaled")
    lines, completion = shown(tmp_path / "scaled", replace(CHOICE, threshold=None), show_steps=False)
    assert f"threshold {3 * completion.gamma:.3g}  " in lines[-1]
    given, same = shown(tmp_path / "scaled", replace(CHOICE, threshold=3 * completion.gamma), show_steps=False)
    assert (given, same.completion_ids.tolist()) == (lines, completion.completion_ids.tolist())


def test_the_gamma_is_that_of_the_run_that_wrote_the_folder(make_policy, tmp_path: Path) -> None:
    """Where the model alone was trained nothing fitted the head, whose mean is another."""
    policy = make_policy(double=False)
    policy.save(tmp_path / "model")
    gammas = {}
    for learns in ("model", "joint"):
        run = load_config(None, ["task.name=sudoku", f"learner.train={learns}"])
        (tmp_path / "model" / RUN_CONFIG).write_text(dump_config(run))
        _, completion = shown(tmp_path / "model", CHOICE, show_steps=False)
        gammas[learns] = completion.gamma
    assert gammas["model"] == pytest.approx(ThresholdConfig().gamma_init)
    assert gammas["joint"] != pytest.approx(ThresholdConfig().gamma_init, rel=1e-3)


def test_without_steps_only_the_answer_and_its_cost_are_shown(folder: Path) -> None:
    lines, completion = shown(folder, CHOICE, show_steps=False)
    with_steps, again = shown(folder, CHOICE)
    assert lines == with_steps[-2:]
    assert completion.completion_ids.tolist() == again.completion_ids.tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("rule", ["confidence", "top_k"])
def test_other_rules_and_caches(folder: Path, rule: str, cache: str) -> None:
    _, completion = shown(folder, replace(CHOICE, rule=rule, cache=cache, block=4))
    assert completion.gamma == pytest.approx({"confidence": 0.9, "top_k": 1.0}[rule])


def test_a_chat_template_is_applied_unless_the_prompt_is_raw(make_policy, tmp_path: Path) -> None:
    policy: Policy = make_policy(double=False)
    policy.tokenizer.chat_template = "{% for message in messages %}(({{ message.content }})){% endfor %}"
    policy.save(tmp_path)
    for raw, expected in ((False, "((12+3=))"), (True, "12+3=")):
        _, completion = shown(tmp_path, replace(CHOICE, raw=raw))
        assert policy.tokenizer.decode(completion.prompt_ids) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "?"}, "characters that the tokenizer does not know"),
        ({"tokens": 0}, "completion_tokens=0"),
        ({"block": 3}, "block_length=3"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"rule": "best"}, "rule='best' is unknown"),
        ({"cache": "all"}, "cache='all' is unknown"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"device": "tpu9"}, "model.device='tpu9'"),
    ],
)
def test_bad_input_is_refused_by_name(folder: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        shown(folder, replace(CHOICE, **changes))


def test_a_model_that_is_not_finite_fails_with_the_step(make_policy, tmp_path: Path) -> None:
    policy: Policy = make_policy(double=False)
    policy.model.lm_head.weight.data.fill_(float("nan"))
    policy.save(tmp_path)
    with pytest.raises(RunError, match=r"not finite: request 1, version 0, step 1; .*give another policy"):
        shown(tmp_path, CHOICE)
