"""4x4 Sudoku: fill 16 cells so that every row, column and 2x2 box holds 1 to 4 once.

- A puzzle is 16 characters, row by row, 0 = empty. Difficulty is the number of blanks.
- Generated puzzles have exactly one solution, and splits are disjoint by *solution grid*: of all 288 grids,
  `holdout_grids` are drawn by seed, a third of them for validation and the rest for test; the others train.
- d1's benchmark does not keep either promise (124 of its 500 puzzles have several solutions; its grids are in any train
  split). Its puzzles are never generated when it is given as `file`, and any valid completion of them is exact;
  `overlap_report` counts what is shared.
- Component `cells` (d1, arXiv 2504.12216): share of the *empty* cells that hold the digit of the stored solution. The
  digits of the answer are read in order, padded with 0 or cut to 16; givens are not looked at, as in d1.
- Component `exact`: 1 if the answer is exactly 16 digits, a valid grid, and keeps the givens.
"""

import re
from itertools import combinations
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.errors import UserError
from common.tasks.generated_task import GeneratedTask, GeneratedTaskConfig, holdout_generator, read_benchmark, row_error
from common.tasks.grid import (
    CELLS,
    GRID_COUNT,
    count_solutions,
    is_solved,
    positions,
    solution_grids,
    text,
    unique_givens,
)
from common.tasks.task import Example, Split, tagged_completion

# No 4x4 puzzle with three givens has one solution, so 12 blanks is the most that a generated puzzle can have.
MOST_BLANKS = 12
_FILE_FORMAT = "a CSV with the header Puzzle,Solution and 16 digits (leading zeros kept) in each column"
_ROW_FORMAT = "a puzzle of 16 characters 0 to 4, at least one of them 0, and a valid solution that keeps its givens"
# Sets of givens tried at once; with 12 blanks 0.7 to 7 % of them are unique, with 8 most.
_DRAWS = 64
_FENCED = re.compile(r"```\s*([0-9\s]+)```")
_GRID_ALONE = re.compile(r"\b[0-9]{16}\b")
_GRID_AT_END = re.compile(r"[0-9]{16}(?=\s*$)")

_D1_PROMPT = """\
Solve this 4x4 Sudoku puzzle. It is given as a string of 16 characters that lists the cells row by row, from the top \
left to the bottom right. A 0 marks an empty cell; every other digit is fixed and must stay.

Rules:
- Put a digit from 1 to 4 into every empty cell.
- Every row, every column and every 2x2 box must contain each of the digits 1 to 4 exactly once.

Write the completed grid as one string of 16 digits in the same order. Give your reasoning first and then only the \
completed grid, in this form:
<reasoning>
your reasoning
</reasoning>
<answer>
the 16 digits
</answer>

Puzzle: {puzzle}
"""


class SudokuConfig(GeneratedTaskConfig):
    """4x4 Sudoku with one solution per puzzle."""

    components: ClassVar[tuple[str, ...]] = ("cells", "exact")

    name: Literal["sudoku"] = "sudoku"
    """Selects this task."""
    blanks_min: int = 4
    """Fewest empty cells of a generated puzzle."""
    blanks_max: int = 12
    """Most empty cells of a generated puzzle; the number is drawn uniformly. With 13 no puzzle has one solution."""
    reward_weights: dict[str, float] = Field(default={"cells": 1.0})
    """Weight of each component: cells (share of empty cells filled right), exact (a valid grid with the givens)."""
    holdout_grids: int = 48
    """Solution grids of 288 kept out of training: a third of them validation, the rest test."""

    @model_validator(mode="after")
    def _ranges_are_usable(self) -> Self:
        if self.blanks_min < 1:
            raise ValueError(f"blanks_min {self.blanks_min} is below 1: nothing would be asked; raise it to 1 or more")
        if self.blanks_max > MOST_BLANKS:
            raise ValueError(
                f"blanks_max {self.blanks_max} is above {MOST_BLANKS}: no such puzzle has one solution; "
                f"lower it to {MOST_BLANKS} or less"
            )
        if self.blanks_min > self.blanks_max:
            raise ValueError(
                f"blanks_min {self.blanks_min} is above blanks_max {self.blanks_max}; lower the one or raise the other"
            )
        if not 3 <= self.holdout_grids < GRID_COUNT:
            raise ValueError(
                f"holdout_grids {self.holdout_grids} is outside 3 to {GRID_COUNT - 1}: "
                f"every split needs a grid; the default is 48"
            )
        return self


def splits_by_seed(seed: int, holdout_grids: int) -> dict[Split, NDArray[np.intp]]:
    """Positions in `solution_grids()` of each generated split; disjoint, together all 288."""
    shuffled = holdout_generator(seed).permutation(GRID_COUNT)
    validation = holdout_grids // 3
    return {
        "validation": shuffled[:validation],
        "test": shuffled[validation:holdout_grids],
        "train": shuffled[holdout_grids:],
    }


class SudokuTask(GeneratedTask):
    """See the module's docstring."""

    name = "sudoku"
    alphabet = "01234"
    trusted = True

    def __init__(self, config: SudokuConfig) -> None:
        rows = None if config.file is None else read_puzzles(config.file)
        examples = None if rows is None else [_example(*row, config.prompt_style) for row in rows]
        super().__init__(config, examples)
        self._blanks = (config.blanks_min, config.blanks_max)
        self._style = config.prompt_style
        self._positions = splits_by_seed(config.seed, config.holdout_grids)
        # A train prompt must not be a test prompt, although their grids have to be shared.
        self._excluded = frozenset(puzzle for puzzle, _ in rows or ())

    def answer(self, completion: str) -> str:
        """The digits of a code block in the tagged answer, else the tagged answer.

        Without the tag the whole completion in compact style; in d1 style what d1's evaluation reads then: the text
        after a stray `</answer>`, else 16 digits before it, else the first 16 digits that stand alone.
        """
        found = super().answer(completion)
        if found:
            fenced = _FENCED.search(found)
            return fenced.group(1) if fenced else found
        before, closed, after = completion.partition("</answer>")
        ending = _GRID_AT_END.search(before) if closed else None
        alone = ending or _GRID_ALONE.search(completion)
        return (after.strip() if closed else "") or (alone.group() if alone else "")

    def posed(self, question: str, truth: Any) -> Example:
        """The question's first 16 digits are the puzzle; the truth is its solution as 16 digits."""
        puzzle, solution = _GRID_ALONE.search(question), str(truth)
        if puzzle is None or not _is_problem(puzzle.group(), solution):
            raise ValueError(
                f"question {question[:60]!r} with ground truth {solution[:40]!r} is no puzzle and its solution: the "
                "question names 16 digits 0 to 4, the truth is a valid grid of 16 that keeps the givens"
            )
        return _example(puzzle.group(), solution, self._style)

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """`cells` in 0..1 and `exact` in {0, 1}."""
        puzzle, solution = example.fields["puzzle"], example.fields["solution"]
        digits = _digits(self.answer(completion))
        return {
            "cells": _cells(puzzle, solution, digits),
            "exact": float(is_solved(digits) and _keeps_givens(puzzle, digits)),
        }

    def correct(self, example: Example, completion: str) -> bool:
        """Whether the answer is a valid grid that keeps the givens, also where the puzzle has several such."""
        return self.rewards(example, completion)["exact"] == 1.0

    def _generate(self, split: Split, rng: np.random.Generator) -> Example:
        position = int(rng.choice(self._positions[split]))
        blanks = int(rng.integers(self._blanks[0], self._blanks[1] + 1))
        solution = text(solution_grids()[position])
        return _example(self._draw_puzzle(position, blanks, rng), solution, self._style)

    def _draw_puzzle(self, position: int, blanks: int, rng: np.random.Generator) -> str:
        """A puzzle with one solution, uniform over those of this grid that have this many blanks."""
        order = rng.random((_DRAWS, CELLS)).argsort(axis=1)
        puzzle = self._first_unique(position, order[:, blanks:])
        if puzzle is None:
            # Rejection has failed (common with 12 blanks): list every choice of cells, so that the search ends.
            every = np.array(list(combinations(range(CELLS), CELLS - blanks)))
            puzzle = self._first_unique(position, rng.permutation(every))
        if puzzle is None:
            raise UserError(
                f"{self._generated.file} holds every puzzle of grid {text(solution_grids()[position])} "
                f"with {blanks} blanks; widen blanks_min..blanks_max or leave `file` out"
            )
        return puzzle

    def _first_unique(self, position: int, given_cells: NDArray[np.integer]) -> str | None:
        """The first of the given-cell lists `[n, givens]` that leaves one solution and is no test puzzle."""
        masks = (1 << given_cells).sum(axis=1).astype(np.uint16)
        puzzles = (_blank(solution_grids()[position], mask) for mask in masks[unique_givens(position, masks)].tolist())
        return next((puzzle for puzzle in puzzles if puzzle not in self._excluded), None)

    def _demonstrate(self, example: Example, careful: bool, rng: np.random.Generator) -> str:
        grid = example.fields["solution"] if careful else _careless(example.fields["puzzle"], rng)
        if self._style == "compact":
            return grid
        rows = "\n".join(f"Row {row + 1}: {grid[4 * row : 4 * row + 4]}" for row in range(4))
        return tagged_completion(f"I fill the empty cells of each row.\n{rows}", grid)


def _blank(cells: NDArray[np.uint8], givens: int) -> str:
    return "".join(str(digit) if givens >> cell & 1 else "0" for cell, digit in enumerate(cells))


def _example(puzzle: str, solution: str, style: str) -> Example:
    prompt = puzzle if style == "compact" else _D1_PROMPT.format(puzzle=puzzle)
    return Example(prompt, {"puzzle": puzzle, "solution": solution}, float(puzzle.count("0")))


def _careless(puzzle: str, rng: np.random.Generator) -> str:
    """Each row's blanks filled with the digits that the row lacks, in random order; columns and boxes are ignored."""
    grid = ""
    for row in (puzzle[start : start + 4] for start in range(0, CELLS, 4)):
        missing = iter(rng.permutation([digit for digit in "1234" if digit not in row]))
        grid += "".join(str(next(missing)) if cell == "0" else cell for cell in row)
    return grid


def _digits(answer: str) -> str:
    # Not str.isdigit: it takes other scripts' digits and superscripts too.
    return "".join(character for character in answer if character in "0123456789")


def _cells(puzzle: str, solution: str, digits: str) -> float:
    empty = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    return sum(digits[cell : cell + 1] == solution[cell] for cell in empty) / len(empty)


def _keeps_givens(puzzle: str, grid: str) -> bool:
    return all(given in ("0", digit) for given, digit in zip(puzzle, grid, strict=True))


def read_puzzles(path: str) -> list[tuple[str, str]]:
    """(puzzle, solution) of each row of a d1 evaluation CSV. Raises UserError for a file or row that is not one."""
    puzzles: list[tuple[str, str]] = []
    for row, line in enumerate(read_benchmark(path, _FILE_FORMAT), start=1):
        columns = [column.strip().strip('"') for column in line.split(",")]
        if row == 1:
            if columns != ["Puzzle", "Solution"]:
                raise row_error(path, row, line, _FILE_FORMAT)
        elif line.strip():
            if len(columns) != 2 or not _is_problem(*columns):
                raise row_error(path, row, line, _ROW_FORMAT)
            puzzles.append((columns[0], columns[1]))
    if not puzzles:
        raise row_error(path, 2, "", _FILE_FORMAT)
    return puzzles


def _is_problem(puzzle: str, solution: str) -> bool:
    well_formed = len(puzzle) == CELLS and set(puzzle) <= set("01234") and "0" in puzzle
    return well_formed and is_solved(solution) and _keeps_givens(puzzle, solution)


def overlap_report(path: str, config: SudokuConfig) -> dict[str, int]:
    """What a benchmark file shares with the train split of `config`, and how many of its puzzles are ambiguous."""
    puzzles = read_puzzles(path)
    grids = {positions()[solution] for _, solution in puzzles}
    train = set(splits_by_seed(config.seed, config.holdout_grids)["train"].tolist())
    return {
        "puzzles": len(puzzles),
        "distinct_grids": len(grids),
        "several_solutions": sum(count_solutions(puzzle) > 1 for puzzle, _ in puzzles),
        "grids_in_train": len(grids & train),
    }
