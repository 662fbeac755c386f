"""Sorting, one of the two smallest puzzles."""

from collections import Counter
from itertools import pairwise
from random import Random

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle


@puzzle(symbols=lambda num_labels, **_: map(str, range(num_labels)))
def sorting(random: Random, length: PositiveInt = 8, num_labels: PositiveInt = 20) -> Puzzle:
    """Numbers below `num_labels`, repeats included; the answer is the same numbers in order.

    Args:
        length: how many there are.
        num_labels: numbers are 0 .. num_labels - 1.
    """
    numbers = [random.randrange(num_labels) for _ in range(length)]
    return list(map(str, numbers)), list(map(str, sorted(numbers)))


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`violations`: neighbours out of order, and numbers that are missing or too many."""
    wanted, given = Counter(prompt), Counter(answer)
    numbers = [int(word) for word in answer if word in wanted]
    violations = sum(a > b for a, b in pairwise(numbers)) + (wanted - given).total() + (given - wanted).total()
    return {"solved": float(not violations), "violations": violations}
