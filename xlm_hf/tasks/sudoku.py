"""Sudoku in the published form: 81 digits in, 81 digits out, 0 for an empty cell (Ye et al., arXiv 2410.14157)."""

from random import Random

from xlm_hf.tasks.puzzles import Puzzle, puzzle

DIGITS = "123456789"
_ALL = (1 << 9) - 1
# The cells of rows, columns and boxes, and the three units of each cell.
_CELLS = [
    *([9 * row + column for column in range(9)] for row in range(9)),
    *([9 * row + column for row in range(9)] for column in range(9)),
    *([9 * (3 * (box // 3) + n // 3) + 3 * (box % 3) + n % 3 for n in range(9)] for box in range(9)),
]
_UNITS = [tuple(unit for unit in range(27) if cell in _CELLS[unit]) for cell in range(81)]


@puzzle(symbols=lambda **_: "0123456789")
def sudoku(random: Random, min_givens: int = 30, max_givens: int = 40, blank: str = "0") -> Puzzle:
    """A 9 x 9 grid to be filled so that every row, column and box holds 1 to 9, which can be done in one way.

    A full grid loses cells in random order for as long as its solution stays the only one, down to a number of givens
    that is drawn between the bounds. If more than `max_givens` are left, another grid is drawn.

    Args:
        min_givens: the fewest digits of a puzzle: the fewer, the harder. Few grids can lose all but 22.
        max_givens: the most.
        blank: an empty cell; "[MASK]" makes it infilling.
    """
    if not 20 <= min_givens <= max_givens <= 81:
        raise ValueError(f"min_givens={min_givens} and max_givens={max_givens} must be in order, from 20 to 81.")
    while True:
        grid = _Grid(random)
        full, wanted = grid.bits.copy(), random.randint(min_givens, max_givens)
        for cell in random.sample(range(81), 81):
            if len(grid.empty) == 81 - wanted:
                break
            grid.remove_if_unique(cell)
        if len(grid.empty) >= 81 - max_givens:
            given, answer = ([DIGITS[b.bit_length() - 1] if b else blank for b in bits] for bits in (grid.bits, full))
            return given, answer


class _Grid:
    """A solved grid that loses cells. A digit is a bit, an empty cell 0; `used` holds the digits of each unit."""

    def __init__(self, random: Random):
        self.bits, self.used, self.empty = [0] * 81, [0] * 27, list(range(81))
        # The boxes of the diagonal do not see each other.
        for cells in (_CELLS[18], _CELLS[22], _CELLS[26]):
            for cell, number in zip(cells, random.sample(range(9), 9), strict=True):
                self._put(cell, 1 << number)
                self.empty.remove(cell)
        self._solve(random)

    def _put(self, cell: int, bit: int) -> None:
        """Write a digit into an empty cell, or take it out again."""
        self.bits[cell] ^= bit
        for unit in _UNITS[cell]:
            self.used[unit] ^= bit

    def _seen(self, cell: int) -> int:
        a, b, c = _UNITS[cell]
        return self.used[a] | self.used[b] | self.used[c]

    def remove_if_unique(self, cell: int) -> None:
        """Empty a cell if no other digit could stand there."""
        bit = self.bits[cell]
        self._put(cell, bit)
        seen = self._seen(cell)
        # Only this digit is left for the cell, or only this cell for the digit: then nothing need be searched.
        is_unique = seen | bit == _ALL or any(
            all(self.bits[other] or self._seen(other) & bit for other in _CELLS[unit] if other != cell)
            for unit in _UNITS[cell]
        )
        if is_unique or not any(self._can_hold(cell, 1 << n) for n in range(9) if not 1 << n & (seen | bit)):
            self.empty.append(cell)
        else:
            self._put(cell, bit)

    def _can_hold(self, cell: int, bit: int) -> bool:
        """Whether the grid has a solution with this digit in an empty cell; leaves the grid as it is."""
        state = self.bits, self.used, self.empty
        self.bits, self.used, self.empty = (part.copy() for part in state)
        self._put(cell, bit)
        is_solved, (self.bits, self.used, self.empty) = self._solve(), state
        return is_solved

    def _solve(self, random: Random | None = None) -> bool:
        """Fill the empty cells, the one with the fewest candidates first; False if that cannot be done."""
        most, best, digits = -1, -1, 0
        for index, cell in enumerate(self.empty):
            seen = self._seen(cell)
            if (count := seen.bit_count()) > most:
                most, best, digits = count, index, _ALL & ~seen
                if count >= 8:
                    break
        if best < 0:
            return True
        cell, self.empty[best] = self.empty[best], self.empty[-1]
        self.empty.pop()
        choices = [1 << number for number in range(9) if digits >> number & 1]
        if random is not None:
            random.shuffle(choices)
        for bit in choices:
            self._put(cell, bit)
            if self._solve(random):
                return True
            self._put(cell, bit)
        self.empty.append(cell)
        return False


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`violations`: digits that a row, column or box lacks, givens that changed, and cells too many."""
    missing = sum(9 - len({answer[cell] for cell in unit if cell < len(answer)} & set(DIGITS)) for unit in _CELLS)
    changed = sum(given in DIGITS and given != digit for given, digit in zip(prompt, answer, strict=False))
    violations = missing + changed + max(0, len(answer) - 81)
    return {"solved": float(not violations), "violations": violations}
