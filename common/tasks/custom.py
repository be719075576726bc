"""A user's own task: a reward function over a data file, or a whole Task, named in the configuration as module:object.

- `task.reward`: a function of `completion` and, where it names them, `question` and `ground_truth`; it returns a
  number. Component `reward` is that number, and an answer is correct from `correct_from` on.
- `task.factory`: a subclass of `Task` (or of `QuestionTask`, which reads data files), or a function that returns one;
  it is called with the `CustomConfig`, whose `options` hold whatever else it takes.
- Modules are found as Python finds them, the current folder included, which is where Ray puts its `working_dir`. They
  run as you (docs/security.md), rewards in processes of their own.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.errors import UserError, one_line
from common.spelling import OBJECT
from common.tasks.question_task import QuestionTask, QuestionTaskConfig
from common.tasks.rows import Row
from common.tasks.task import Example, Task, check_weights, kept

_SHOWN = "a function such as def reward(question, completion, ground_truth): return 1.0"
TAKEN = ("completion", "question", "ground_truth")


class CustomConfig(QuestionTaskConfig):
    """A task or a reward function of your own."""

    components: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["custom"] = "custom"
    """Selects this task."""
    reward: str | None = Field(default=None, pattern=OBJECT)
    """module:function that scores a completion of a question of `data`; see docs/tasks.md."""
    factory: str | None = Field(default=None, pattern=OBJECT)
    """module:object that builds a Task from this section: a subclass of Task, or a function; in place of `reward`."""
    options: dict[str, Any] = Field(default={})
    """Whatever else the factory takes."""
    prompt: str = "{question}"
    """Prompt of a question, in place of `prompt_style`; {question} stands for it."""
    correct_from: float = 1.0
    """Smallest return value of `reward` that evaluation counts as correct."""
    reward_weights: dict[str, float] = Field(default={"reward": 1.0})
    """Weight of each component: reward, or those of the factory's task."""

    @model_validator(mode="after")
    def _weights_are_usable(self) -> Self:
        if self.factory is None:  # a factory's components are known once it has built the task
            check_weights(self.reward_weights, self.components)
        return self

    @model_validator(mode="after")
    def _one_object(self) -> Self:
        if (self.reward is None) == (self.factory is None):
            raise ValueError(
                f"reward={self.reward} with factory={self.factory}: name one of them, as module:object; reward is a "
                "function over task.data, factory builds a whole task"
            )
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt[:60]!r} does not say where the question goes; put {{question}} in")
        return self


class CustomTask(QuestionTask):
    """A reward function over questions from data."""

    name = "custom"

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self._custom = config
        self._reward, self._names = find_reward(str(config.reward))

    def answer(self, completion: str) -> str:
        """The completion as it is; what counts in it is the reward's to say."""
        return completion

    def pose(self, question: str, truth: object, solution: str | None = None) -> Example:
        """See `QuestionTask.pose`."""
        prompt = self._custom.prompt.replace("{question}", question)
        return Example(prompt, {"question": question, "answer": truth, "solution": solution}, float(len(question)))

    def posed(self, question: str, truth: Any) -> Example:
        """Any question, any ground truth."""
        return self.pose(question, truth)

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """What the function returns. Raises ValueError where that is no number."""
        return {"reward": self._returned(example, completion)}

    @kept
    def _returned(self, example: Example, completion: str) -> float:
        fields = example.fields
        given = {"completion": completion, "question": fields["question"], "ground_truth": fields["answer"]}
        found = self._reward(**{name: given[name] for name in self._names})
        if isinstance(found, bool | int | float) or (hasattr(found, "__float__") and not isinstance(found, str)):
            return float(found)
        raise ValueError(
            f"task.reward={self._custom.reward} returned {found!r:.60}, a {type(found).__name__}; return a number "
            "(for several components write a Task, see docs/tasks.md)"
        )

    def correct(self, example: Example, completion: str) -> bool:
        """Whether the function returns `correct_from` or more."""
        return self._returned(example, completion) >= self._custom.correct_from

    def read_answer(self, row: Row) -> tuple[object, str | None]:
        """The value of the answer's field, whatever it is, and the solution's text."""
        config = self._custom
        truth = row.value(config.answer_field, "name the answer's field in task.answer_field")
        if config.solution_field is None:
            return truth, None
        return truth, row.text(config.solution_field, "name the solution's field in task.solution_field")

    def shown_answer(self, example: Example) -> str:
        """The ground truth as text."""
        return str(example.fields["answer"])

    def demonstration(self, example: Example, key: int) -> str:
        """The row's worked solution, else its answer."""
        return example.fields["solution"] or self.shown_answer(example)


def build_custom(config: CustomConfig) -> Task:
    """The task of `task.factory`, or the one around `task.reward`. Raises UserError, one line, for what is no such."""
    if config.factory is None:
        return CustomTask(config)
    key = f"task.factory={config.factory}"
    factory = _find_factory(config.factory)
    try:
        task = factory(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} failed ({type(error).__name__}: {one_line(error)}); mend it") from error
    if not isinstance(task, Task):
        raise UserError(f"{key} returned a {type(task).__name__}; return an instance of common.tasks.task.Task")
    try:
        check_weights(config.reward_weights, task.components)
    except ValueError as error:
        raise UserError(f"task.reward_weights: {one_line(error)} (`components` of the factory's task)") from error
    return task


def check_custom(config: CustomConfig) -> None:
    """Whether the object that is named exists and can be called as it will be; builds nothing. Raises UserError."""
    if config.factory is None:
        find_reward(str(config.reward))
    else:
        _find_factory(config.factory)


def find_reward(path: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A reward function and the names that it is called with. Raises UserError for what is none."""
    key = f"task.reward={path}"
    function = _find(path, key)
    parameters = _parameters(function, key, _SHOWN).values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function, TAKEN
    for parameter in parameters:
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.default is parameter.empty and not (by_name and parameter.name in TAKEN):
            raise UserError(f"{key} takes {str(parameter)!r}, which is none of {', '.join(TAKEN)}; give {_SHOWN}")
    names = tuple(parameter.name for parameter in parameters if parameter.name in TAKEN)
    if "completion" not in names:
        raise UserError(f"{key} does not take the completion; give {_SHOWN}")
    return function, names


def _find_factory(path: str) -> Callable[..., Any]:
    key, way_out = f"task.factory={path}", "give a subclass of Task, or a function of the configuration"
    factory = _find(path, key)
    if isinstance(factory, type):
        if not issubclass(factory, Task):
            raise UserError(f"{key} is no subclass of common.tasks.task.Task; {way_out}")
        if inspect.isabstract(factory):
            missing = ", ".join(sorted(factory.__abstractmethods__))
            raise UserError(f"{key} does not define {missing}; see docs/tasks.md")
    signature = _parameters(factory, key, way_out)
    try:
        inspect.Signature(list(signature.values())).bind(object())
    except TypeError as error:
        raise UserError(f"{key} cannot be called with the configuration alone ({error}); {way_out}") from error
    return factory


def _parameters(function: Any, key: str, way_out: str) -> dict[str, inspect.Parameter]:
    if not callable(function):
        raise UserError(f"{key} is a {type(function).__name__} and cannot be called; {way_out}")
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key} does not say what it takes; {way_out}") from error


def _find(path: str, key: str) -> Any:
    """The object at module:object. Raises UserError where there is none."""
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            way_out = f"put {error.name.partition('.')[0]}.py there, or give the module that has it"
            raise UserError(f"{key}: no module {error.name!r} in {here} or where Python looks; {way_out}") from error
        raise UserError(f"{key}: importing {module_name} failed ({one_line(error)}); install what it needs") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{key}: importing {module_name} failed ({cause}); mend it") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [known for known in dir(found) if known[0] != "_"], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "define it there, or name another"
            where = getattr(found, "__file__", None) or module_name
            raise UserError(f"{key}: {where} has no {name!r}; {hint}")
        found = getattr(found, name)
    return found
