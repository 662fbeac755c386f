import math
import random

import numpy as np
import pytest
import torch

from xlm_hf.families import families
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.objectives.collation import Documents, Rows, random_subset
from xlm_hf.testing import FamilyCase, assert_close, check_packing, loss_and_gradients

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
    rows = Rows(documents.target_lengths, documents, PAD, packing=12)
    expected = first_fit(sizes, 12)
    assert rows.shape == (len(expected), max(s + sizes[e] for row in expected for e, s in row))
    for number, row in enumerate(expected):
        for example, start in row:
            assert rows.first[example] == number * rows.shape[1] + start


def test_a_batch_says_which_document_and_position_every_token_has():
    documents = documents_of([5, 2, 3], segments={0: [0, 0, 0, 1, 1], 2: [0, 1, 2]})
    assert documents.example.tolist() == [0, 0, 1, 2, 2, 2]
    assert documents.number.tolist() == [0, 1, 0, 0, 1, 2]
    assert documents.target_lengths.tolist() == [3, 2, 2, 1, 1, 1]
    assert documents.prompt_lengths.tolist() == [1, 0, 1, 1, 0, 0]
    lengths = documents.target_lengths
    apart, packed = (Rows(lengths, documents, PAD, packing).batch() for packing in (None, 7))
    assert apart["segment_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 2, 2]]
    assert apart["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert apart["attention_mask"].sum(dim=-1).tolist() == [5, 2, 3]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0] * 7]
    assert "segment_ids" not in Rows(np.array([2, 2, 2]), documents_of([2, 2, 2]), PAD).batch()


def test_an_empty_example_has_a_row_of_its_own():
    documents = documents_of([2, 0, 3])
    rows = Rows(documents.target_lengths, documents, PAD)
    assert rows.shape == (3, 3)
    assert rows.index(0, rows.lengths).tolist() == [0, 1, 6, 7, 8]


def test_an_empty_example_is_a_document_beside_others_that_are_several():
    documents = documents_of([0, 3, 0, 2, 0], segments={1: [0, 0, 1], 2: [], 3: [0, 1]})
    assert documents.example.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert documents.number.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert documents.target_lengths.tolist() == [0, 2, 1, 0, 1, 1, 0]
    assert documents.prompt_lengths.tolist() == [1, 1, 0, 1, 1, 0, 1]


def test_documents_draw_apart_and_evenly():
    """The first document of an example draws as the example alone would; the others by themselves, evenly as well."""
    num = 500
    documents = documents_of([4] * num, segments={i: [0, 1, 2, 3] for i in range(num)})
    single = documents_of([4] * num)
    assert np.array_equal(documents.key[::4], single.key)
    assert np.array_equal(documents.low_discrepancy_draws(1)[::4], single.low_discrepancy_draws(1))
    assert len(set(documents.key.tolist())) == 4 * num
    # Each further document of an example by one step of sqrt(2), so that those of one example are spread as well.
    steps = np.diff(documents.low_discrepancy_draws(1).reshape(num, 4)) - math.sqrt(2)
    assert np.abs(steps - steps.round()).max() < 1e-9
    for draws in (documents.low_discrepancy_draws(1), documents.low_discrepancy_draws(1)[3::4]):
        gap = np.abs(np.sort(draws) - (np.arange(len(draws)) + 0.5) / len(draws)).max()
        assert gap < 6 / len(draws)


@pytest.mark.parametrize("sizes", [[6], [3, 0, 4, 1, 0], [2] * 3000], ids=["one part", "empty parts", "many parts"])
def test_the_smallest_of_each_part_are_chosen(sizes):
    rng = random.Random(0)
    lists = [[rng.getrandbits(64) for _ in range(size)] for size in sizes]
    num = [rng.randint(0, size) for size in sizes]
    bits = np.array([x for bits in lists for x in bits], dtype=np.uint64)
    chosen, greatest = random_subset(bits, np.array(sizes), np.array(num))
    assert chosen.tolist() == [sorted(bits).index(x) < n for bits, n in zip(lists, num, strict=True) for x in bits]
    for bits, n, value in zip(lists, num, greatest.tolist(), strict=True):
        assert n == 0 or value == sorted(bits)[n - 1]


def test_bits_of_tokens_are_those_of_their_counters():
    documents = documents_of([3, 0, 4], segments={2: [0, 1, 1, 1]})
    bits = documents.random_bits(5, documents.target_lengths, np.array([0, 7, 0, 2]))
    key = documents.key.astype(np.int64).tolist()
    counters = [(key[0], 0), (key[0], 1), (key[0], 2), (key[2], 0), (key[3], 2), (key[3], 3), (key[3], 4)]
    assert key[:3] == [100, 101, 102]
    assert key[3] == int(random_bits(102, 1))
    assert bits.view(np.int64).tolist() == [int(random_bits(5, 3, *counter)) for counter in counters]


def test_named_streams_draw_apart_and_by_their_counters():
    documents = documents_of([3, 0, 4], segments={2: [0, 1, 1, 1]})
    lengths, start = documents.target_lengths, np.array([0, 7, 0, 2])
    seed = int(random_bits(5, *b"replacement"))
    expected = documents.random_bits(seed % 2**64, lengths, start)
    bits = documents.random_bits(5, lengths, start, stream="replacement")
    assert np.array_equal(bits, expected)
    assert not set(bits) & set(documents.random_bits(5, lengths, start))
    uniforms = documents.uniforms(5, "replacement", lengths, start)
    assert np.array_equal(uniforms, (bits >> np.uint64(11)) * 2.0**-53)
    several = documents.random_bits(5, lengths, start, stream="replacement", num=3)
    assert several.shape == (len(bits), 3)
    key = documents.key.view(np.int64).tolist()
    assert several.view(np.int64)[-1].tolist() == [int(random_bits(seed, 3, key[3], 4, draw)) for draw in range(3)]
    of_documents = documents.uniforms(5, "length")
    assert of_documents.shape == (4,)
    assert len(set(of_documents)) == len(set(documents.uniforms(5, "width")) | set(of_documents)) - 4 == 4
    assert documents.uniforms(5, "length", num=2).shape == (4, 2)


@pytest.mark.parametrize("family", ["arlm", "mlm", "mdlm"])
@pytest.mark.parametrize("continues", [False, True])
def test_a_document_that_goes_on_in_another_example_has_no_end(family, continues):
    case = FamilyCase(family)
    tokenizer = case.task.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    key = {"example_id": 3, "epoch": 0, "position": 0}
    row = {**key, "input_ids": [11, 12, 13, 14, 15], "segment_ids": [0, 0, 1, 1, 1], "continues": continues}
    batch = case.collator("lm", case.model(), **({} if family == "arlm" else {"canvas_length": None}))([row])
    end = [] if continues else [eos]
    if family == "arlm":
        assert batch["input_ids"].tolist() == [[bos, 11, 12, bos, 13, 14, 15]]
        assert batch["target_ids"].tolist() == [11, 12, eos, 13, 14, 15, *end]
        assert batch["target_lengths"].tolist() == [3, 3 + len(end)]
        assert batch["logits_index"].tolist() == list(range(6 + len(end)))
        return
    index = batch["logits_index"]
    whole = batch["input_ids"].flatten().scatter(0, index, batch["target_ids"])
    assert whole.tolist() == [bos, 11, 12, eos, bos, 13, 14, 15, *end]


@pytest.mark.parametrize("family", families())
def test_a_document_is_corrupted_by_its_example_and_number_alone(family):
    case = FamilyCase(family)
    example = {**case.examples()[0], "segment_ids": [0, 0, 0, 0, 1, 1, 1, 1]}
    collator = case.collator("lm", case.model(), packing=True)
    alone = collator([example])
    among = collator([example, *case.examples()[1:]])
    width = alone["input_ids"].shape[1]
    assert torch.equal(alone["input_ids"][0], among["input_ids"][0, :width])
    assert alone["segment_ids"][0].tolist() == among["segment_ids"][0, :width].tolist()


def moved_to(collator, batch, row: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch with its tokens, in their order, moved to other rows and positions, and what points to them with them."""
    real = batch["attention_mask"]
    shape = (int(row.max()) + 1, real.shape[1])
    moved = {name: tensor for name, tensor in batch.items() if name != "segment_ids"}
    for name, tensor in moved.items():
        if collator.entries[name].index_of == "position":
            index = torch.zeros(real.numel(), dtype=torch.int64)
            index[real.flatten()] = row * shape[1] + position
            moved[name] = index[tensor]
        elif tensor.shape[:2] == real.shape:
            moved[name] = torch.zeros((*shape, *tensor.shape[2:]), dtype=tensor.dtype)
            moved[name][row, position] = tensor[real]
    return moved


def separated(collator, batch) -> dict[str, torch.Tensor]:
    """A packed batch with every document in a row of its own."""
    real = batch["attention_mask"]
    documents = torch.arange(len(real))[:, None] * real.shape[1] + batch["segment_ids"]
    row = documents[real].unique(return_inverse=True)[1]
    # A document's tokens stand together; their positions need not rise, where it has several copies.
    counts = row.bincount()
    moved = moved_to(collator, batch, row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row])
    # What a packed batch says of each token of a document, such as its time, a batch of separate rows says of each row.
    return {name: tensor[:, 0] if collator.entries[name].of == "row" else tensor for name, tensor in moved.items()}


def check_documents_of_a_row(case, loss):
    """Documents that come in one row have the loss, metrics and gradients that they have in rows of their own."""
    model = case.model()
    rows = [{**e, "segment_ids": [min(i // 3, 1) for i in range(len(e["input_ids"]))]} for e in case.examples()]
    collator = case.collator("lm", model, packing=True)
    batch = collator([*rows, *case.examples()])
    apart = separated(collator, batch)
    assert len(apart["input_ids"]) > 2 * len(rows) > len(batch["input_ids"])
    assert_close(loss_and_gradients(model, loss, batch), loss_and_gradients(model, loss, apart))


@pytest.mark.parametrize("family", families())
def test_documents_of_a_row_do_not_see_each_other(family, tmp_path):
    case = FamilyCase(family, "++model.conv_kernel_size=3", "++model.learned_positions=true")
    check_documents_of_a_row(case, case.trainer(tmp_path).loss)
    check_packing(case, tmp_path)


@pytest.mark.parametrize("family", families())
def test_padding_on_the_left_changes_nothing(family, tmp_path):
    case = FamilyCase(family, "++model.conv_kernel_size=3", "++model.learned_positions=true")
    model, loss = case.model(), case.trainer(tmp_path).loss
    collator = case.collator(case.kind, model)
    batch = collator(case.examples(kind=case.kind))
    row, position = batch["attention_mask"].nonzero(as_tuple=True)
    left = moved_to(collator, batch, row, position + (~batch["attention_mask"]).sum(dim=-1)[row])
    assert not left["attention_mask"][:, 0].all()
    assert_close(loss_and_gradients(model, loss, left), loss_and_gradients(model, loss, batch))


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_flex_attention_sees_the_same_documents(family, tmp_path):
    """Forward alone: on a CPU torch's flex attention, which it compiles first, has no backward pass."""
    case = FamilyCase(family)
    model, loss = case.model(), case.trainer(tmp_path).loss
    batch = case.collator("seq2seq", model, packing=True)(case.examples())
    with torch.no_grad():
        expected = loss(model, batch).loss_sum
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(loss(model, batch).loss_sum, expected, rtol=1e-4, atol=1e-4)
