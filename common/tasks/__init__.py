"""Tasks with verifiable rewards: prompts by cursor, warm-start demonstrations, reward components, exact verdicts.

- A task is built from its configuration section by `build_task`; `TASKS` maps a section's `name` to the task's class.
- Everything here is text in, numbers out: neither torch nor transformers is imported, so a reward process starts fast.
- `Task.example` is a pure function of (task seed, split, index), so any process gets the same prompt for an index.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from common.tasks.countdown import CountdownConfig, CountdownTask
from common.tasks.custom import CustomConfig, build_custom, check_custom
from common.tasks.gsm8k import Gsm8kConfig, Gsm8kTask
from common.tasks.math500 import Math500Config, Math500Task
from common.tasks.sudoku import SudokuConfig, SudokuTask
from common.tasks.task import SPLITS, BaseTaskConfig, Example, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "TASK_CONFIGS",
    "BaseTaskConfig",
    "CountdownConfig",
    "CountdownTask",
    "CustomConfig",
    "Example",
    "Gsm8kConfig",
    "Gsm8kTask",
    "Math500Config",
    "Math500Task",
    "Split",
    "SudokuConfig",
    "SudokuTask",
    "Task",
    "TaskConfig",
    "build_task",
    "check_task",
]

TaskConfig = Annotated[
    SudokuConfig | CountdownConfig | Gsm8kConfig | Math500Config | CustomConfig, Field(discriminator="name")
]
TASK_CONFIGS: dict[str, type[BaseTaskConfig]] = {
    "sudoku": SudokuConfig,
    "countdown": CountdownConfig,
    "gsm8k": Gsm8kConfig,
    "math500": Math500Config,
    "custom": CustomConfig,
}
TASKS: dict[str, Callable[[Any], Task]] = {
    "countdown": CountdownTask,
    "custom": build_custom,
    "gsm8k": Gsm8kTask,
    "math500": Math500Task,
    "sudoku": SudokuTask,
}


def build_task(config: TaskConfig) -> Task:
    """The task that `config` describes. Raises UserError for an unusable benchmark file or object."""
    return TASKS[config.name](config)


def check_task(config: TaskConfig) -> None:
    """Whether the object that a custom task names exists; reads no data, builds nothing. Raises UserError."""
    if isinstance(config, CustomConfig):
        check_custom(config)
