"""Tasks with verifiable rewards: prompts by cursor, warm-start demonstrations, reward components, exact verdicts.

- A task is built from its configuration section by `build_task`; `TASKS` maps a section's `name` to the task's class.
- Everything here is text in, numbers out: neither torch nor transformers is imported, so a reward process starts fast.
- `Task.example` is a pure function of (task seed, split, index), so any process gets the same prompt for an index.
"""

from common.errors import UserError
from common.tasks.countdown import CountdownConfig, CountdownTask
from common.tasks.sudoku import SudokuConfig, SudokuTask
from common.tasks.task import SPLITS, Example, Split, Task

__all__ = [
    "SPLITS",
    "TASKS",
    "CountdownConfig",
    "CountdownTask",
    "Example",
    "Split",
    "SudokuConfig",
    "SudokuTask",
    "Task",
    "TaskConfig",
    "build_task",
]

TaskConfig = SudokuConfig | CountdownConfig

TASKS: dict[str, type[Task]] = {"countdown": CountdownTask, "sudoku": SudokuTask}


def build_task(config: TaskConfig) -> Task:
    """The task that `config` describes. Raises UserError for an unknown name or an unusable benchmark file."""
    if config.name not in TASKS:
        raise UserError(f"task {config.name!r} is unknown; give one of {', '.join(sorted(TASKS))}")
    return TASKS[config.name](config)
