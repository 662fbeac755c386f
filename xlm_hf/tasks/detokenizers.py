"""From the tokenised text of a published corpus back to running text, by the rules that the field uses."""

import re
from collections.abc import Callable

# Of the One Billion Word benchmark, in this order: the rules published with arXiv 2310.16834 and 2406.07524.
_LM1B = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        *((rf" \{mark}{end}", f"{mark}{space}") for mark in "?!" for end, space in ((" ", " "), ("$", ""))),
        *((f" {mark} ", f"{mark} ") for mark in ",:;"),
        (" / ", "/"),
        *((f"{quote} ([^{quote}]+) {quote}", rf"{quote}\1{quote}") for quote in "\"'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"\$ ", "$"),
        ("£ ", "£"),
    )
]


def lm1b(text: str) -> str:
    """Running text from a sentence of the One Billion Word benchmark."""
    for pattern, replacement in _LM1B:
        text = pattern.sub(replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b}
