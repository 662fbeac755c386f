"""n queens: place one queen in every row of an n x n board so that none attacks another; some are given."""

from itertools import combinations
from random import Random

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle


@puzzle(symbols=lambda size, **_: [*map(str, range(size)), "."])
def n_queens(random: Random, size: PositiveInt = 10, max_givens: PositiveInt = 4, blank: str = ".") -> Puzzle:
    """The column of the queen of every row, or a blank; the answer is all columns.

    A board is filled row by row, in a random order of columns. Then 1 to `max_givens` of its queens are given, so that
    a puzzle has at least one solution and mostly several.

    Args:
        size: rows and columns of the board.
        max_givens: the most queens that are given.
        blank: a row without a given queen; "[MASK]" makes it infilling.
    """
    if size < 4 or not 1 <= max_givens <= size:
        raise ValueError(f"size={size} must be at least 4, and max_givens={max_givens} from 1 to size.")
    columns: list[int] = []
    while len(columns) < size:
        # A random placement gets stuck now and then: begin again.
        free = [c for c in range(size) if not any(_attack(len(columns), c, r, k) for r, k in enumerate(columns))]
        columns = [*columns, random.choice(free)] if free else []
    given = random.sample(range(size), random.randint(1, max_givens))
    answer = list(map(str, columns))
    return [answer[row] if row in given else blank for row in range(size)], answer


def _attack(row: int, column: int, other_row: int, other_column: int) -> bool:
    return column == other_column or abs(column - other_column) == abs(row - other_row)


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`violations`: pairs of queens that attack each other, givens that moved, and rows with no queen or too many."""
    size = len(prompt)
    placed = {row: int(word) for row, word in enumerate(answer[:size]) if word.isdigit()}
    attacks = sum(_attack(a, placed[a], b, placed[b]) for a, b in combinations(placed, 2))
    moved = sum(given.isdigit() and given != word for given, word in zip(prompt, answer, strict=False))
    violations = attacks + moved + size - len(placed) + max(0, len(answer) - size)
    return {"solved": float(not violations), "violations": violations}
