"""Addition of two numbers, digit by digit, one of the two smallest puzzles."""

from random import Random

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle


@puzzle(symbols=lambda **_: "0123456789+")
def addition(random: Random, num_digits: PositiveInt = 4) -> Puzzle:
    """Two numbers of `num_digits` digits; the answer is their sum with one digit more, leading zeros included.

    Args:
        num_digits: of each number.
    """
    a, b = (random.randrange(10**num_digits) for _ in range(2))
    return list(f"{a:0{num_digits}}+{b:0{num_digits}}"), list(f"{a + b:0{num_digits + 1}}")


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`violations`: digits that are wrong, missing or too many."""
    a, b = "".join(prompt).split("+")
    wanted = list(f"{int(a) + int(b):0{len(a) + 1}}")
    wrong = sum(given != digit for given, digit in zip(answer, wanted, strict=False))
    violations = wrong + abs(len(answer) - len(wanted))
    return {"solved": float(not violations), "violations": violations}
