import random

import pytest
import torch

from xlm_hf.commands.common import build_collator
from xlm_hf.hub import families
from xlm_hf.modules.collation import Documents, Rows, ranks
from xlm_hf.testing import FamilyCase, check_packing

PAD = 0


def documents_of(sizes, segments=None):
    examples = [{"example_id": 100 + i, "epoch": 3, "position": i} for i in range(len(sizes))]
    for i, ids in (segments or {}).items():
        examples[i]["segment_ids"] = ids
    return Documents(examples, [[9]] * len(sizes), [list(range(10, 10 + size)) for size in sizes])


def first_fit(sizes, capacity):
    """Rows as lists of (example, start), by the definition."""
    rows, used = [], []
    for example, size in enumerate(sizes):
        row = next((r for r in range(len(rows)) if used[r] + size <= capacity), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append((example, used[row]))
        used[row] += size
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_filled_by_first_fit(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 14) for _ in range(40)]
    documents = documents_of(sizes)
    rows = Rows(documents.target_lengths, documents, packing=12)
    expected = first_fit(sizes, 12)
    assert rows.shape == (len(expected), max(s + sizes[e] for row in expected for e, s in row))
    for number, row in enumerate(expected):
        for example, start in row:
            assert (rows.row[example], rows.first[example]) == (number, number * rows.shape[1] + start)


def test_a_batch_says_which_document_and_position_every_token_has():
    documents = documents_of([5, 2, 3], segments={0: [0, 0, 0, 1, 1], 2: [0, 1, 2]})
    assert documents.example.tolist() == [0, 0, 1, 2, 2, 2]
    assert documents.number.tolist() == [0, 1, 0, 0, 1, 2]
    assert documents.target_lengths.tolist() == [3, 2, 2, 1, 1, 1]
    assert documents.prompt_lengths.tolist() == [1, 0, 1, 1, 0, 0]
    lengths = documents.target_lengths
    apart, packed = (Rows(lengths, documents, packing).batch(documents, PAD) for packing in (None, 7))
    assert apart["segment_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 2, 2]]
    assert apart["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert apart["attention_mask"].sum(dim=-1).tolist() == [5, 2, 3]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0] * 7]
    one_each = Rows(lengths[:0].new_tensor([2, 2, 2]), documents_of([2, 2, 2])).batch(documents_of([2, 2, 2]), PAD)
    assert "segment_ids" not in one_each


def test_documents_draw_apart_and_evenly():
    """The first document of an example draws as the example alone would; the others by themselves, evenly as well."""
    num = 500
    documents = documents_of([4] * num, segments={i: [0, 1, 2, 3] for i in range(num)})
    single = documents_of([4] * num)
    assert torch.equal(documents.key[::4], single.key)
    assert torch.equal(documents.even_draws(1)[::4], single.even_draws(1))
    assert len(documents.key.unique()) == 4 * num
    for draws in (documents.even_draws(1), documents.even_draws(1)[3::4]):
        gap = (draws.sort().values - (torch.arange(len(draws)) + 0.5) / len(draws)).abs().max()
        assert gap < 6 / len(draws)


def test_ranks_are_those_of_each_part():
    parts = [[5, 1, 3], [], [2, 9, 4, 7]]
    part = torch.tensor([0] * 3 + [2] * 4)
    place = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    rank, ordered = ranks(torch.tensor([x for row in parts for x in row]), part, place)
    assert rank.tolist() == [sorted(row).index(x) for row in parts for x in row]
    assert ordered.tolist() == [x for row in parts for x in sorted(row)]


def test_segment_ids_of_another_length_are_refused():
    with pytest.raises(ValueError, match="Example 101 has 3 segment_ids for 2 tokens: give one for each token"):
        documents_of([5, 2], segments={1: [0, 0, 1]})


@pytest.mark.parametrize("family", families())
def test_a_document_is_corrupted_by_its_example_and_number_alone(family):
    case = FamilyCase(family)
    tokenizer, model = case.task.tokenizer, case.model()
    example = {**case.examples()[0], "segment_ids": [0, 0, 0, 0, 1, 1, 1, 1]}
    collator = build_collator(case.cfg, "lm", tokenizer, model, packing=True)
    alone = collator([example])
    among = collator([example, *case.examples()[1:]])
    width = alone["input_ids"].shape[1]
    assert torch.equal(alone["input_ids"][0], among["input_ids"][0, :width])
    assert alone["segment_ids"][0].tolist() == among["segment_ids"][0, :width].tolist()


@pytest.mark.parametrize("family", families())
def test_packing_with_a_short_convolution_and_learned_positions(family, tmp_path):
    check_packing(FamilyCase(family, "++model.conv_kernel_size=3", "++model.learned_positions=true"), tmp_path)
