"""Alignments of pairs of sequences with the fewest edits, for a batch at once.

The table of edit distances (Wagner and Fischer, 1974) is filled one anti-diagonal after the other. All cells of one, in
all pairs, are independent of each other.
"""

import numpy as np

from xlm_hf.objectives.collation import segment_ranges

PAIR, DELETE, INSERT = range(3)  # what a column of an alignment holds: a token of both, of the source, of the target
BLANK = -1


def aligned(
    sources: np.ndarray,
    source_lengths: np.ndarray,
    targets: np.ndarray,
    target_lengths: np.ndarray,
    substitutions: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Alignments in which an insertion, a deletion and a pair of different tokens cost 1 each.

    Args:
        sources: tokens of the sources, one after the other.
        source_lengths: (D,) how many each has.
        targets: tokens of the targets, likewise.
        target_lengths: (D,).
        substitutions: whether there are pairs of different tokens; without them all pairs of an alignment are a longest
            common subsequence.

    Returns:
        columns (C,) uint8, PAIR, DELETE or INSERT, of all pairs one after the other, and how many each has (D,). Of
        alignments that cost the same it is the one whose last columns are pairs, or else deletions; without
        substitutions the one whose last columns are insertions, or else deletions.
    """
    D, n, m = len(source_lengths), int(source_lengths.max(initial=0)), int(target_lengths.max(initial=0))
    moves = _moves(_padded(sources, source_lengths, n), _padded(targets, target_lengths, m), substitutions)
    i, j, row = source_lengths.copy(), target_lengths.copy(), np.arange(D)
    found = np.full((D, n + m), 255, dtype=np.uint8)
    for column in range(n + m - 1, -1, -1):
        move = moves[i + j, row, i]
        is_open = i + j > 0
        found[is_open, column] = move[is_open]
        i -= is_open & (move != INSERT)
        j -= is_open & (move != DELETE)
    exists = found != 255
    return found[exists], exists.sum(axis=1)


def _padded(ids: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    rows = np.full(len(lengths) * width, BLANK)
    rows[segment_ranges(np.arange(len(lengths)) * width, lengths)] = ids
    return rows.reshape(len(lengths), width)


def _moves(sources: np.ndarray, targets: np.ndarray, substitutions: bool) -> np.ndarray:
    """(n + m + 1, D, n + 1): how the cell (i, j), at [i + j, :, i], of the tables of sources (D, n), targets (D, m)."""
    (D, n), m = sources.shape, targets.shape[1]
    moves = np.zeros((n + m + 1, D, n + 1), dtype=np.uint8)
    # On the diagonal d, source token i - 1 meets target token d - i - 1: a window of the targets, read backwards.
    backwards = np.pad(targets[:, ::-1], ((0, 0), (n, n)), constant_values=BLANK)
    before, last, costs = np.zeros((3, D, n + 1), dtype=np.int32)
    # A pair of different tokens that costs as much as both of its tokens alone loses every tie, as all pairs then do.
    tie = int(not substitutions)
    for d in range(1, n + m + 1):
        # Where no token of one side is left there is one way; elsewhere three, of which the first that is cheapest.
        if d <= m:
            costs[:, 0], moves[d, :, 0] = d, INSERT
        if d <= n:
            costs[:, d], moves[d, :, d] = d, DELETE
        a, b = max(1, d - m), min(n, d - 1)
        if a <= b:
            differs = sources[:, a - 1 : b] != backwards[:, n + m - d + a : n + m - d + b + 1]
            pair, delete, insert = (
                before[:, a - 1 : b] + differs * (1 + tie),
                last[:, a - 1 : b] + 1,
                last[:, a : b + 1] + 1,
            )
            other = np.minimum(delete, insert)
            np.minimum(pair, other, out=costs[:, a : b + 1])
            moves[d, :, a : b + 1] = (pair + tie > other) * (1 + (delete + tie > insert).astype(np.uint8))
        before, last, costs = last, costs, before
    return moves
