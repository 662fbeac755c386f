"""Work on data by several processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

# Batches that a process works on at a time, with one copy of the function.
_EACH = 16


def in_order(function: Callable, batches: Iterator[Any], num_proc: int | None) -> Iterator[Any]:
    """What a function makes of each batch, by several processes, with few batches in memory."""
    if num_proc is None or num_proc < 2:
        yield from map(function, batches)
        return
    with multiprocessing.Pool(num_proc) as pool:
        while group := [*islice(batches, _EACH * num_proc)]:
            yield from pool.map(function, group, _EACH)
