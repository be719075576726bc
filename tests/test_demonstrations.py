"""Demonstrations: rows of files, chat templates, what is too long, what is held out, and one-line errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from learner_fixtures import tiny_policy

import learner.demonstrations
from common.config import Config
from common.config_file import load_config
from common.errors import UserError
from common.policy import Policy
from common.tasks import Task, build_task
from learner.chat import chat_ids
from learner.demonstration_file import DemonstrationFile
from learner.demonstrations import FIRST_EXAMPLE, Demonstration, Demonstrations

LENGTH = 20
TEMPLATE = (
    "{% for m in messages %}{{ '3' if m['role'] == 'user' else '4' }}{{ m['content'] }}0{% endfor %}"
    "{% if add_generation_prompt %}4{% endif %}"
)


def settings(*overrides: str) -> Config:
    given = ["task.name=sudoku", "task.blanks_max=4", f"sampler.max_completion_tokens={LENGTH}", *overrides]
    return load_config(None, given)


@pytest.fixture(scope="module")
def task() -> Task:
    return build_task(settings().task)


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_lines(*lines: str) -> str:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write_lines


def pair(prompt: str, completion: str) -> str:
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)


def said(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def chat(*contents: str) -> str:
    return json.dumps({"messages": said(*contents)})


def texts(policy: Policy, found: Demonstration | None) -> tuple[str, str]:
    assert found is not None
    return str(policy.tokenizer.decode(found.prompt)), policy.decode(found.completion)


def test_the_tasks_demonstrations_are_padded_with_eos(policy: Policy, task: Task) -> None:
    stream = Demonstrations(settings(), task, policy.tokenizer)
    assert stream.count is None
    for position in range(5):
        example = task.example("train", FIRST_EXAMPLE + position)
        found = stream.at(position)
        assert texts(policy, found) == (example.prompt, example.fields["solution"])
        assert found is not None
        assert found.completion[16:] == [policy.vocabulary.eos_id] * 4


def test_a_file_gives_every_pair_once_per_epoch_in_an_order_by_seed(
    policy: Policy, task: Task, write: Callable[..., str]
) -> None:
    prompts = ["0", "01", "012", "0123", "1", "12", "123", "2"]
    path = write(*(pair(prompt, prompt[::-1]) for prompt in prompts), "", "  ")

    def epochs(seed: int) -> list[list[str]]:
        stream = Demonstrations(settings(f"warm_start.file={path}", f"run.seed={seed}"), task, policy.tokenizer)
        assert stream.count == len(prompts)
        found = [texts(policy, stream.at(position)) for position in range(2 * len(prompts))]
        assert all(answer == prompt[::-1] for prompt, answer in found)
        assert stream.at(3) == stream.at(3)  # back in the first epoch
        names = [prompt for prompt, _ in found]
        return [names[: len(prompts)], names[len(prompts) :]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == sorted(prompts)
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


def test_held_out_rows_are_never_among_the_others(policy: Policy, task: Task, write: Callable[..., str]) -> None:
    prompts = [f"{n // 5}{n % 5}" for n in range(12)]
    path = write(*(pair(prompt, "1") for prompt in prompts))
    stream = Demonstrations(settings(f"warm_start.file={path}", "warm_start.held_out=4"), task, policy.tokenizer)
    held = {texts(policy, found)[0] for found in stream.held_out()}
    trained = {texts(policy, stream.at(position))[0] for position in range(24)}
    assert len(held) == 4
    assert held | trained == set(prompts)
    assert not held & trained


def test_a_parquet_file_is_the_same_as_its_jsonl(
    policy: Policy, task: Task, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = [said("1", "2"), said("3", "4", "1", "0")]
    path = write(*(json.dumps({"messages": row}) for row in rows))
    pq.write_table(pa.table({"id": [7, 8], "messages": rows}), tmp_path / "rows.parquet")
    found = DemonstrationFile(str(tmp_path / "rows.parquet"))
    assert [found[row] for row in range(len(found))] == rows == [DemonstrationFile(path)[row] for row in range(2)]
    assert found.name(1).endswith("rows.parquet, row 2")


def test_bytes_of_a_parquet_file_are_their_text(tmp_path: Path) -> None:
    def written(completion: object, kind: pa.DataType) -> DemonstrationFile:
        table = pa.table({"prompt": pa.array([b"1"], pa.binary()), "completion": pa.array([completion], kind)})
        pq.write_table(table, tmp_path / "rows.parquet")
        return DemonstrationFile(str(tmp_path / "rows.parquet"))

    assert written("é".encode(), pa.binary())[0] == said("1", "é")
    for wrong, kind in ((b"\xff", pa.binary()), (0, pa.timestamp("s"))):
        with pytest.raises(UserError, match=r"rows.parquet, row 1: .* holds a value that is no text"):
            written(wrong, kind)


def test_a_template_is_applied_and_the_end_of_the_turn_is_learned(policy: Policy) -> None:
    policy.tokenizer.chat_template = TEMPLATE
    prompt, answer = chat_ids(policy.tokenizer, said("1", "2", "11", "22"), "row")
    assert policy.tokenizer.decode(prompt) == "31042031104"
    assert policy.tokenizer.decode(answer) == "220"
    given: Any = policy.tokenizer
    assert prompt == given.apply_chat_template(said("1", "2", "11"), add_generation_prompt=True, return_dict=False)


def test_what_follows_an_answer_is_learned_where_the_template_knows_no_end_of_turn(policy: Policy) -> None:
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}0{% endfor %}"
    prompt, answer = chat_ids(policy.tokenizer, said("1", "2"), "row")
    assert (policy.tokenizer.decode(prompt), policy.tokenizer.decode(answer)) == ("10", "20")


def test_of_several_answers_one_is_learned_drawn_for_each_epoch(
    policy: Policy, task: Task, write: Callable[..., str]
) -> None:
    policy.tokenizer.chat_template = TEMPLATE
    path = write(chat("1", "2", "11", "22"))
    stream = Demonstrations(settings(f"warm_start.file={path}", "warm_start.max_tokens=40"), task, policy.tokenizer)
    found = {texts(policy, stream.at(epoch)) for epoch in range(30)}
    assert found == {("3104", "20"), ("31042031104", "220")}


def test_templates_that_cannot_be_used_are_named(policy: Policy) -> None:
    with pytest.raises(UserError, match="row: the tokenizer has no chat template"):
        chat_ids(policy.tokenizer, said("1", "2", "3", "4"), "row")
    policy.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"row: the chat template refuses it .*roles must alternate"):
        chat_ids(policy.tokenizer, said("1", "2"), "row")
    policy.tokenizer.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="row: the chat template writes the messages before the answer differently"):
        chat_ids(policy.tokenizer, said("1", "2"), "row")


def test_what_is_too_long_is_skipped_cut_or_refused(policy: Policy, task: Task, write: Callable[..., str]) -> None:
    path = write(pair("1" * 4, "2" * 8))

    def found(too_long: str, limit: int, path: str = path) -> Demonstration | None:
        given = (f"warm_start.file={path}", f"warm_start.max_tokens={limit}", f"warm_start.too_long={too_long}")
        return Demonstrations(settings(*given), task, policy.tokenizer).at(0)

    assert found("skip", 12) is None  # an EOS has to follow
    whole = found("skip", 13)
    assert whole is not None
    assert whole.completion[-1] == policy.vocabulary.eos_id
    cut = found("truncate", 10)
    assert cut is not None
    assert len(cut.completion) == 6
    assert policy.vocabulary.eos_id not in cut.completion
    assert found("truncate", 4) is None
    with pytest.raises(UserError, match=r"line 1: 12 tokens and an EOS exceed warm_start\.max_tokens=12; raise it"):
        found("refuse", 12)


def test_the_first_that_fits_is_found_wherever_two_epochs_put_it(
    policy: Policy, task: Task, write: Callable[..., str]
) -> None:
    """Between the only one of an epoch and that of the next there may be more than the file has."""
    path = write(pair("1", "2"), *(pair("1" * 20, "2") for _ in range(5)))
    stream = Demonstrations(settings(f"warm_start.file={path}", "warm_start.max_tokens=10"), task, policy.tokenizer)
    position, gaps = 0, []
    for _ in range(50):
        found, place = stream.fitting(position)
        assert texts(policy, found)[0] == "1"
        gaps.append(place - position)
        position = place + 1
    assert max(gaps) > 6


def test_where_none_fits_it_is_told_and_before_anything_starts(
    policy: Policy, task: Task, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner.demonstrations, "MOST_LEFT_OUT", 100)
    path = write(pair("1" * 20, "2"), pair("1" * 9, "2"))
    for given, count in (([f"warm_start.file={path}"], 2), ([], 100)):
        stream = Demonstrations(settings("warm_start.max_tokens=10", *given), task, policy.tokenizer)
        message = rf"none of {count} demonstrations fits warm_start\.max_tokens=10; raise it, or set"
        with pytest.raises(UserError, match=message):
            stream.fitting(3)
        with pytest.raises(UserError, match=message):
            stream.check(10)
        none = settings("warm_start.max_tokens=10", "warm_start.steps=0", *given)
        Demonstrations(none, task, policy.tokenizer).check(10)


def test_demonstrations_of_a_task_are_looked_at_before_anything_starts(policy: Policy, task: Task) -> None:
    given = ["warm_start.max_tokens=32", "warm_start.too_long=refuse"]  # one too few: prompt and completion are 16 each
    with pytest.raises(UserError, match=r"demonstration 1: 32 tokens and an EOS exceed warm_start\.max_tokens=32"):
        Demonstrations(settings(*given), task, policy.tokenizer).check(10)
    Demonstrations(settings("warm_start.max_tokens=33", given[1]), task, policy.tokenizer).check(10)


@pytest.mark.parametrize("limits", [[], ["warm_start.max_tokens=5", "warm_start.too_long=skip"]], ids=["none", "skip"])
def test_mask_in_a_completion_is_named_with_its_row(
    policy: Policy, task: Task, write: Callable[..., str], limits: list[str]
) -> None:
    mask = policy.tokenizer.mask_token
    path = write(pair(f"1{mask}", "2"), pair("1", f"2{mask}210"))
    stream = Demonstrations(settings(f"warm_start.file={path}", *limits), task, policy.tokenizer)
    message = rf"pairs\.jsonl, line 2: completion '2{mask}210' holds '{mask}', the MASK token"
    with pytest.raises(UserError, match=message):
        stream.check(10)
    with pytest.raises(UserError, match=message):
        [stream.at(position) for position in range(2)]


def test_eos_is_padded_up_to_a_limit(policy: Policy, task: Task, write: Callable[..., str]) -> None:
    path = write(pair("1", "2" * 5))

    def count(*overrides: str) -> int:
        given = (f"warm_start.file={path}", *overrides)
        found = Demonstrations(settings(*given), task, policy.tokenizer).at(0)
        assert found is not None
        return found.completion.count(policy.vocabulary.eos_id)

    assert count() == LENGTH - 5
    assert count("warm_start.max_tokens=50") == LENGTH - 5
    assert count("warm_start.max_tokens=50", "warm_start.eos_padding=3") == 3
    assert count("warm_start.max_tokens=10") == 4
    assert count("warm_start.max_tokens=50", "sampler.max_completion_tokens=4") == 1


GOOD = pair("1", "2")
BAD_LINES = [
    "not json",
    '{"prompt": "1"}',
    '{"completion": "1"}',
    '["1", "2"]',
    "17",
    "null",
    '"text"',
    '{"prompt": "1", "completion": "2"',
    '{"messages": 3}',
    '{"messages": ["1"]}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": ["1"]}, {"role": "assistant", "content": "2"}]}',
    '{"messages": [{"role": "assistant", "content": "2"}]}',
    '{"messages": []}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_with_its_file(write: Callable[..., str], line: str) -> None:
    path = write(GOOD, "", line, GOOD)
    with pytest.raises(UserError) as caught:
        DemonstrationFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert "`prompt` and `completion`" in message
    assert "\n" not in message


@pytest.mark.parametrize("lines", [(), ("",), ("  ", "")])
def test_an_empty_file_is_refused(write: Callable[..., str], lines: tuple[str, ...]) -> None:
    path = write(*lines)
    with pytest.raises(UserError, match="holds no demonstrations"):
        DemonstrationFile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"warm_start\.file=.*/nothing\.jsonl cannot be read"):
        DemonstrationFile(str(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(("prompt", "completion", "kind"), [("0" * 33, "1", "prompt"), ("0", "1" * 21, "completion")])
def test_a_pair_beyond_the_samplers_limits_names_line_and_limit(
    policy: Policy, task: Task, write: Callable[..., str], prompt: str, completion: str, kind: str
) -> None:
    config = settings(f"warm_start.file={write(pair(prompt, completion))}")
    limit = {"prompt": 32, "completion": LENGTH}[kind]
    with pytest.raises(UserError, match=f"line 1: {kind} of {limit + 1} tokens exceeds .*={limit};"):
        Demonstrations(config, task, policy.tokenizer).check(10)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        DemonstrationFile(str(path))


def test_a_line_separator_inside_a_text_does_not_split_the_line(write: Callable[..., str]) -> None:
    assert DemonstrationFile(write(pair("1\u2028", "2")))[0] == said("1\u2028", "2")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert DemonstrationFile(str(path))[0] == said("1", "2")


@pytest.mark.parametrize("value", [None, ["1", "2"], {"text": "1"}])
def test_a_value_that_is_no_text_is_refused(write: Callable[..., str], value: object) -> None:
    path = write(json.dumps({"prompt": "1", "completion": value}))
    with pytest.raises(UserError, match="line 1"):
        DemonstrationFile(path)
