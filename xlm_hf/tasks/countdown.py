"""Countdown: reach a number from others by arithmetic, each used once (Gandhi et al., arXiv 2404.03683)."""

import operator
import re
from collections import Counter
from random import Random

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@puzzle(symbols=lambda **_: "0123456789+-*/=,:")
def countdown(
    random: Random, num_numbers: PositiveInt = 4, max_number: PositiveInt = 50, max_target: PositiveInt = 100
) -> Puzzle:
    """Numbers and a goal, `7,3,12:33`; the answer is steps, `12-3=9,...`, that use every number and end with the goal.

    All are written digit by digit. Two of the numbers at a time are replaced by a result, which is a positive integer;
    the last result is the goal.

    Args:
        num_numbers: how many there are.
        max_number: the largest of them.
        max_target: the largest goal.
    """
    while True:
        numbers = [random.randint(1, max_number) for _ in range(num_numbers)]
        left, steps = numbers.copy(), []
        while len(left) > 1:
            random.shuffle(left)
            b, a = sorted((left.pop(), left.pop()))
            sign = random.choice([sign for sign in _OPERATIONS if _result(a, sign, b) is not None])
            left.append(_result(a, sign, b) or 0)
            steps.append(f"{a}{sign}{b}={left[-1]}")
        if left[0] <= max_target:
            return list(f"{','.join(map(str, numbers))}:{left[0]}"), list(",".join(steps))


def _result(a: int, sign: str, b: int) -> int | None:
    """The result of a step, if it is a positive integer."""
    if sign == "/" and (b == 0 or a % b):
        return None
    result = _OPERATIONS[sign](a, b)
    return result if result > 0 else None


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`violations`: wrong steps and steps that use what is not there, numbers left over, a missed goal."""
    given, goal = "".join(prompt).split(":")
    left, violations, result = Counter(map(int, given.split(","))), 0, 0
    for step in "".join(answer).split(","):
        match = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step)
        # No number is 0, so a step that is none is wrong.
        a, b, result = (int(match[i]) for i in (1, 3, 4)) if match else (0, 0, 0)
        if match is None or _result(a, match[2], b) != result or Counter([a, b]) - left:
            violations += 1
        left = left - Counter([a, b]) + Counter([result])
    violations += max(0, left.total() - 1) + (result != int(goal))
    return {"solved": float(not violations), "violations": violations}
