"""The 288 solved 4x4 Sudoku grids, and which puzzles have only one of them as a solution.

- A grid is `uint8[16]` or its 16 characters, row by row; a puzzle is 16 characters with 0 for an empty cell.
- Everything is decided by comparing with the list of all grids, so nothing searches and nothing can run away.
"""

from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

CELLS = 16
GRID_COUNT = 288


@cache
def solution_grids() -> NDArray[np.uint8]:
    """All 288 solved grids, `uint8[288, 16]`, in lexicographic order."""
    rows = list(permutations(range(1, 5)))
    grids: list[tuple[int, ...]] = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _fits(grid, row)]
    return np.array(grids, dtype=np.uint8)


def _fits(grid: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether `row` can stand below the rows of `grid`, which is valid so far."""
    if any(digit in grid[column::4] for column, digit in enumerate(row)):
        return False
    upper = grid[-4:] if len(grid) % 8 == 4 else ()
    return not upper or not (set(upper[:2]) & set(row[:2]) or set(upper[2:]) & set(row[2:]))


@cache
def _agreement() -> NDArray[np.uint16]:
    """For each pair of grids, one bit per cell that they share: `uint16[288, 288]`."""
    grids = solution_grids()
    same = grids[:, None, :] == grids[None, :, :]
    return (same * (1 << np.arange(CELLS))).sum(axis=-1).astype(np.uint16)


@cache
def positions() -> dict[str, int]:
    """Index of each solved grid by its 16 characters."""
    return {text(grid): position for position, grid in enumerate(solution_grids())}


def is_solved(grid: str) -> bool:
    """Whether 16 characters are a valid complete grid."""
    return grid in positions()


def count_solutions(puzzle: str) -> int:
    """How many of the 288 grids agree with a puzzle's givens."""
    cells = np.array([int(character) for character in puzzle], dtype=np.uint8)
    return int(((solution_grids() == cells) | (cells == 0)).all(axis=1).sum())


def unique_givens(position: int, givens: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which sets of givens (bit masks, `uint16[n]`) leave grid `position` as the only solution: `bool[n]`."""
    contradicted = (_agreement()[position] & givens[:, None]) != givens[:, None]
    return contradicted.sum(axis=1) == GRID_COUNT - 1


def text(grid: NDArray[np.uint8]) -> str:
    """A grid's 16 characters."""
    return "".join(map(str, grid))
