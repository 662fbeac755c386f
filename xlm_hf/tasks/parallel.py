"""Work on data by several processes."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

_function: Callable  # of a worker


def in_order(function: Callable, batches: Iterator[Any], num_proc: int | None) -> Iterator[Any]:
    """What a function makes of each batch, by several processes, with few batches in memory."""
    if num_proc is None or num_proc < 2:
        yield from map(function, batches)
        return
    with multiprocessing.Pool(num_proc, _become_worker, (function,)) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append(pool.apply_async(_work, (batch,)))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _become_worker(function: Callable) -> None:
    # Sent once, and not with each batch, since it holds a tokenizer.
    global _function
    _function = function


def _work(batch: Any) -> Any:
    return _function(batch)
