import random

import pytest
import torch

from tests.host_reads import HostReads, as_on_an_accelerator
from xlm_hf.modules.edits import EDIT_KINDS, EditBuffer, EditLog, slots_of_counts

PAD = 0


def slow_step(row, capacity, deleted, substitutes, insertions):
    """One step on a list of (token, step) pairs: insertions is a list of (slot, token) in the order given."""
    step = insertions["step"]
    free = capacity - sum(not gone for gone in deleted[: len(row)])
    made = {}
    for slot in range(len(row) + 1):
        for at, token in insertions["made"]:
            if at == slot and free > 0:
                made.setdefault(slot, []).append((token, step))
                free -= 1
    new = []
    for slot in range(len(row) + 1):
        new += made.get(slot, [])
        if slot < len(row) and not deleted[slot]:
            new.append((substitutes[slot], step) if substitutes[slot] >= 0 else row[slot])
    return new


def replay(events, rows):
    """Apply logged edits to lists of tokens."""
    for row, _, kind, position, token in events:
        kind = EDIT_KINDS[kind]
        if kind == "insert":
            rows[row].insert(position, token)
        elif kind == "delete":
            assert rows[row].pop(position) == token
        else:
            rows[row][position] = token
    return rows


def random_batch(rng):
    B, P = rng.randint(1, 4), rng.randint(1, 3)
    lengths = [rng.randint(1, P) for _ in range(B)]
    prompt = [[PAD] * (P - n) + [90 + i for i in range(n)] for n in lengths]
    capacity = [rng.randint(1, 7) for _ in range(B)]
    start = [[rng.randint(1, 9) for _ in range(rng.randint(0, c))] for c in capacity]
    return torch.tensor(prompt), torch.tensor(prompt) != PAD, capacity, start


def random_edits(rng, lengths, width):
    """Deleted, substitutes, slots, tokens and inserted for rows of these lengths."""
    num = rng.randint(1, 5)
    return (
        [[rng.random() < 0.3 for _ in range(width)] for _ in lengths],
        [[rng.choice((-1, -1, rng.randint(10, 19))) for _ in range(width)] for _ in lengths],
        [[rng.randint(0, length) for _ in range(num)] for length in lengths],
        [[rng.randint(20, 99) for _ in range(num)] for _ in lengths],
        [[rng.random() < 0.7 for _ in range(num)] for _ in lengths],
    )


@pytest.mark.parametrize("seed", range(25))
def test_steps_equal_a_loop_and_the_log_replays_them(seed):
    rng = random.Random(seed)
    prompt, mask, capacity, start = random_batch(rng)
    B, W, log = len(prompt), max(capacity), EditLog()
    padded = torch.tensor([row + [PAD] * (W - len(row)) for row in start])
    sizes = torch.tensor([len(row) for row in start])
    buffer = EditBuffer(prompt, mask, torch.tensor(capacity), PAD, log, padded, sizes)
    buffer.extra["flag"] = padded.double() * 2
    slow = [[(token, -1) for token in row] for row in start]
    latest = []
    for step in range(rng.randint(1, 5)):
        rows = sorted(rng.sample(range(B), rng.randint(1, B)))
        deleted, substitutes, slots, tokens, inserted = random_edits(rng, [len(slow[row]) for row in rows], W)
        if rng.random() < 0.2:
            buffer.finish(torch.tensor(rows[:1]), torch.tensor([True]))
        extra = (
            {} if rng.random() < 0.3 else {"deleted": torch.tensor(deleted), "substitutes": torch.tensor(substitutes)}
        )
        given = (torch.tensor(x) for x in (slots, tokens, inserted))
        was_finished = buffer.finished.tolist()
        buffer.apply(torch.tensor(rows), step, *given, **extra)
        for i, row in enumerate(rows):
            if was_finished[row]:
                continue
            made = [(s, t) for s, t, yes in zip(slots[i], tokens[i], inserted[i], strict=True) if yes]
            of_row = (deleted[i], substitutes[i]) if extra else ([False] * W, [-1] * W)
            slow[row] = slow_step(slow[row], capacity[row], *of_row, {"made": made, "step": step})
            was_finished[row] = not extra and len(slow[row]) == capacity[row]
        assert buffer.finished.tolist() == was_finished
        latest += log.latest().tolist()
        for row, n in enumerate(buffer.lengths.tolist()):
            assert list(zip(buffer.tokens[row, :n].tolist(), buffer.steps[row, :n].tolist(), strict=True)) == slow[row]
            assert buffer.tokens[row, n:].tolist() == [PAD] * (W - n)
            assert buffer.steps[row, n:].tolist() == [-1] * (W - n)
            kept = buffer.steps[row, :n] < 0
            assert torch.equal(buffer.extra["flag"][row, :n][kept], buffer.tokens[row, :n][kept].double() * 2)
            assert n <= capacity[row]
    at_first = [prompt[row][mask[row]].tolist() + start[row] for row in range(B)]
    at_last = [prompt[row][mask[row]].tolist() + [token for token, _ in slow[row]] for row in range(B)]
    assert replay(log.events().tolist(), [list(row) for row in at_first]) == at_last
    assert sorted(latest) == sorted(log.events().tolist())
    output = buffer.output(return_history=True)
    widest = max(len(row) for row in slow)
    assert output.history[:, prompt.shape[1] :].shape[1] == widest == buffer.written().shape[1]
    assert torch.equal(buffer.whole(), output.sequences)


def test_one_position_left_and_two_gaps_fire():
    buffer = EditBuffer(torch.tensor([[9]]), torch.tensor([[True]]), torch.tensor([3]), PAD)
    rows = torch.tensor([0])
    buffer.apply(rows, 0, torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), torch.tensor([[True, True]]))
    none = torch.zeros(1, 3, dtype=torch.bool)
    buffer.apply(rows, 1, torch.tensor([[2, 0]]), torch.tensor([[3, 4]]), torch.tensor([[True, True]]), none)
    # The first in reading order gets the position, not the first that was given.
    assert buffer.tokens.tolist() == [[4, 1, 2]]
    assert buffer.finished.tolist() == [False]
    # A deletion makes way for an insertion of the same step.
    deleted = torch.tensor([[True, False, False]])
    buffer.apply(rows, 2, torch.tensor([[3]]), torch.tensor([[5]]), torch.tensor([[True]]), deleted)
    assert buffer.tokens.tolist() == [[1, 2, 5]]


@pytest.mark.parametrize(("capacity", "reason"), [(2, "length"), (3, "stop")])
def test_a_full_row_ends_by_its_length(capacity, reason):
    buffer = EditBuffer(torch.tensor([[9]]), torch.tensor([[True]]), torch.tensor([capacity]), PAD)
    rows, both = torch.tensor([0]), torch.tensor([[True, True]])
    buffer.apply(
        rows, 0, torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), both, substitutes=torch.full((1, capacity), -1)
    )
    assert not buffer.finished.any()
    buffer.finish(rows, torch.tensor([True]))
    assert buffer.output(return_history=False).finish_reason == [reason]


def test_a_step_reads_nothing_from_the_device_but_its_shape():
    prompt = torch.tensor([[9], [9]])
    buffer = EditBuffer(prompt, prompt > 0, torch.tensor([4, 6]), PAD, EditLog())
    with as_on_an_accelerator(), HostReads() as reads:
        rows, num_slots, width, others = buffer.shape_of_step(buffer.nfe.sum())
        before = len(reads.found)
        buffer.view(rows, width)
        slots, exists = slots_of_counts(torch.ones(2, 7, dtype=torch.int64), 3)
        deleted, substitutes = torch.zeros(2, 6, dtype=torch.bool), torch.full((2, 6), -1)
        buffer.apply(rows, 0, slots, torch.full_like(slots, 5), exists, deleted, substitutes)
        buffer.finish(rows, buffer.lengths[rows] == buffer.capacity[rows])
        assert len(reads.found) == before == 1
    assert (num_slots, width, others) == (2, 0, [0])


def test_counts_become_single_insertions_in_reading_order():
    slots, exists = slots_of_counts(torch.tensor([[0, 2, 0, 1], [0, 0, 0, 0], [3, 3, 0, 0]]), 4)
    assert [
        [s for s, e in zip(*row, strict=True) if e] for row in zip(slots.tolist(), exists.tolist(), strict=True)
    ] == [[1, 1, 3], [], [0, 0, 0, 1]]
