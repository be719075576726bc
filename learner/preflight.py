"""Preflight: everything a user can have got wrong, checked before anything expensive starts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from traceback import extract_tb

import torch

from actors.reward_pool import RewardPool, Score
from common.config import Config
from common.errors import RunError, UserError, one_line
from common.policy_loading import (
    check_cache_of_folder,
    check_threshold_of_folder,
    on_cpu,
    open_rollout_policy,
    open_tokenizer,
)
from common.tasks import CustomConfig, Split, Task, build_task
from learner.demonstrations import Demonstrations, checked_ids

SAMPLED_PROMPTS = 64  # of a task that makes them without end
CHECKED_ROWS = 10_000  # of a split, or a file of demonstrations; a bad one among more ends the run when it comes


def preflight(config: Config, *, trains: bool = True, evaluates: bool = True, here: bool = True) -> Task:
    """Check device, task, data, model folder, special tokens and lengths.

    Args:
        config: the configuration.
        trains: whether the task's training questions are needed.
        evaluates: whether its held-out ones are.
        here: whether the device must be this machine's; else that of nodes which only their actors can look at.

    Raises:
        UserError: naming the value, the limit and the way out.
    """
    check_device(config.model.device, here=here)
    task = build_task(config.task)
    if isinstance(config.task, CustomConfig):
        with errors_of(config.task):
            check_task(config, task, trains=trains, evaluates=evaluates)
            if trains or evaluates:
                check_reward(config, task, "train" if trains else config.evaluation.split)
    else:
        check_task(config, task, trains=trains, evaluates=evaluates)
    if evaluates:
        check_cache_of_folder(config)
    if trains or not evaluates:  # supervised training from a file needs no question
        check_threshold_of_folder(config)
    if config.model.lora is not None:  # targets that its layers do not have; on the CPU, its memory is not touched
        open_rollout_policy(on_cpu(config), task)
    return task


@contextmanager
def errors_of(task: CustomConfig) -> Iterator[None]:
    """Whatever a user's own task raises becomes a UserError with the place where it was raised."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        at = extract_tb(error.__traceback__)[-1]
        key = f"task.factory={task.factory}" if task.factory else f"task.reward={task.reward}"
        raise UserError(
            f"{key} failed at {at.filename}:{at.lineno} ({type(error).__name__}: {one_line(error)}); mend it"
        ) from error


def check_task(config: Config, task: Task, *, trains: bool, evaluates: bool) -> None:
    """Sizes of the splits and texts of the examples. Raises UserError."""
    chosen = config.evaluation
    asked: dict[Split, int] = {}
    if trains:
        check_size(task, "train", "learner.steps", 0)
        asked["train"] = CHECKED_ROWS
        if chosen.drift_every and evaluates:
            check_size(task, "validation", "evaluation.drift_prompts", chosen.drift_prompts)
            asked["validation"] = chosen.drift_prompts
    if evaluates:
        check_size(task, chosen.split, "evaluation.prompts", chosen.prompts)
        asked[chosen.split] = max(chosen.prompts, asked.get(chosen.split, 0))
    learns = config.model.path is None or not evaluates  # a given model too, where nothing but its warm start is asked
    check_texts(config, task, asked=asked, learns=learns)


def check_size(task: Task, split: Split, key: str, prompts: int) -> None:
    """Refuse more prompts than a split has."""
    size = task.size(split)
    if size == 0:
        task.example(split, 0)  # says what is missing
    if size is not None and prompts > size:
        raise UserError(f"{key}={prompts} exceeds the {size} rows of the {split} split; set {key}={size} or less")


def check_reward(config: Config, task: Task, split: Split) -> None:
    """Score one example as training will, so that a reward that cannot work is known before it starts."""
    outcome: SimpleQueue[list[Score] | Exception] = SimpleQueue()
    pool = RewardPool(task, config.rollout)
    try:
        example = task.example(split, 0)
        pool.submit(example, [task.demonstration(example, 0)], outcome.put)
        found = outcome.get()
    finally:
        pool.close()
    if isinstance(found, Exception):
        raise UserError(f"the reward of {split} example 0 cannot be computed: {one_line(found)}")


def check_device(name: str, *, here: bool = True) -> None:
    """Refuse a device that torch does not know or, where it must be `here`, this machine does not have.

    Nothing is put on a GPU: what does so keeps some of its memory as long as it lives.
    """
    if name.partition(":")[0] in ("meta", "privateuseone"):
        raise UserError(f"model.device={name!r} computes nothing; use cpu, or cuda with a CUDA build")
    try:
        device = torch.device(name)
        if device.type == "cuda" and here and (count := torch.cuda.device_count()) <= (device.index or 0):
            raise RuntimeError(f"this machine has {count} CUDA devices for this build of torch")
        if device.type != "cuda" and here:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two: a build without it
        reason = str(error).split(". ")[0].splitlines()[0][:160]
        raise UserError(
            f"model.device={name!r} cannot be used here ({reason}); use cpu, or cuda with a CUDA build"
        ) from error


def check_texts(config: Config, task: Task, *, asked: Mapping[Split, int], learns: bool) -> None:
    """Tokenise the prompts that are `asked` of each split (of those that are made without end, some) and, where it
    `learns` from demonstrations, these (a file's: all, or many), and check them."""
    tokenizer, positions = open_tokenizer(config, task)
    sampler, file = config.sampler, config.warm_start.file
    total = sampler.max_prompt_tokens + sampler.max_completion_tokens
    if total > positions:
        raise UserError(
            f"sampler.max_prompt_tokens + sampler.max_completion_tokens = {total} exceeds the model's {positions} "
            "positions; shorten one of them"
        )
    for split, count in asked.items():
        there = task.distinct(split)
        for index in range(min(count, SAMPLED_PROMPTS if there is None else there, CHECKED_ROWS)):
            example = task.example(split, index)
            checked_ids(tokenizer, example.prompt, "prompt", config, f"{split} example {index}")
            if split == "train" and index < SAMPLED_PROMPTS and file is None and config.model.path is None:
                text = task.demonstration(example, index)
                checked_ids(tokenizer, text, "completion", config, f"demonstration {index}")
    if not learns:
        return
    longest = config.warm_start.max_tokens
    if longest is not None and longest > positions:
        raise UserError(
            f"warm_start.max_tokens={longest} exceeds the model's {positions} positions; give {positions} or less"
        )
    if file is None and config.warm_start.steps and config.warm_start.held_out:
        check_size(task, "validation", "warm_start.held_out", config.warm_start.held_out)
    Demonstrations(config, task, tokenizer).check(CHECKED_ROWS)
