import numpy as np

from xlm_hf.metrics.edit_distance.edit_distance import distance
from xlm_hf.modeling.edit_flow.collator_edit_flow import columns_of
from xlm_hf.objectives.alignment import BLANK, aligned


def test_alignments_have_the_fewest_edits():
    """Of pairs of all lengths, in any batch: the columns hold both sequences, and cost what a plain loop finds."""
    rng = np.random.default_rng(0)
    for num in (1, 7, 60):
        pairs = [[rng.integers(0, 3, size=rng.integers(0, 8)).tolist() for _ in range(2)] for _ in range(num)]
        flat = [np.array([token for pair in pairs for token in pair[side]], dtype=np.int64) for side in (0, 1)]
        lengths = [np.array([len(pair[side]) for pair in pairs]) for side in (0, 1)]
        arguments = (flat[0], lengths[0], flat[1], lengths[1])
        moves, num_columns = aligned(*arguments)
        columns = columns_of(moves, *flat)
        start = 0
        for pair, number in zip(pairs, num_columns, strict=True):
            before, after = (x[start : start + number].tolist() for x in columns)
            start += number
            assert [[token for token in side if token != BLANK] for side in (before, after)] == pair
            assert sum(a != b for a, b in zip(before, after, strict=True)) == distance(*pair)
            assert (BLANK, BLANK) not in zip(before, after, strict=True)
        assert start == len(moves)


def test_nothing_to_align():
    nothing = np.zeros(0, dtype=np.int64)
    moves, lengths = aligned(nothing, np.zeros(2, np.int64), nothing, np.zeros(2, np.int64))
    assert len(moves) == 0
    assert lengths.tolist() == [0, 0]
