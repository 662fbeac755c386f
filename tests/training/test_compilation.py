"""Training steps under torch.compile: no graph breaks, and no compilation after the first batches."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from xlm_hf.data.static_shapes import StaticShapes
from xlm_hf.families import families
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.tasks.tokenizers import number_tokenizer
from xlm_hf.testing import FamilyCase, assert_close, loss_and_gradients

# Examples of which each batch is made, by number: prompts and targets get shorter from one to the next.
BATCHES = [[0, 1, 2, 3], [2, 3, 4, 5], [5, 0, 1, 4], [3, 3, 3, 3], [0, 0, 0, 0], [5, 5, 5, 5]]
LENGTH = 48


def batches(case, collator):
    examples = case.examples()
    for epoch, numbers in enumerate(BATCHES):
        yield collator(
            [
                {**examples[number], "epoch": epoch, "example_id": 10 * epoch + place, "position": 4 * epoch + place}
                for place, number in enumerate(numbers)
            ]
        )


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", families())
def test_batches_of_one_shape_share_one_graph_and_have_the_gradients_of_the_others(family, tmp_path):
    case, graphs = FamilyCase(family), CompileCounterWithBackend("aot_eager")
    model, loss = case.model(), case.trainer(tmp_path).loss
    collator, compiled = case.collator("seq2seq", model), torch.compile(model, fullgraph=True, backend=graphs)
    # A loss of several passes has a graph for each.
    shapes, passes = set(), 2 if family == "levenshtein_transformer" else 1
    for plain, static in zip(batches(case, collator), batches(case, StaticShapes(collator, LENGTH)), strict=True):
        shapes.add(tuple((name, tuple(x.shape)) for name, x in static.items()))
        with torch._dynamo.config.patch(error_on_recompile=graphs.frame_count == passes):
            results = loss_and_gradients(compiled, loss, static)
        assert_close(results, loss_and_gradients(model, loss, plain))
    assert (len(shapes), graphs.frame_count) == (1, passes)


@pytest.mark.parametrize("family", families())
def test_packed_batches_of_many_shapes_share_the_graphs_of_the_first_three(family, tmp_path):
    case = FamilyCase(family)
    model, loss = case.model(), case.trainer(tmp_path).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for number, batch in enumerate(batches(case, case.collator("lm", model, packing=True))):
        with torch._dynamo.config.patch(error_on_recompile=number >= 3):
            loss_sum = loss(compiled, batch).loss_sum
        torch.testing.assert_close(loss_sum, loss(model, batch).loss_sum, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler of a CPU needs g++")
# Told at once that shapes vary, it compiles once and not twice.
@pytest.mark.parametrize(
    ("family", "dynamic"), [("mlm", True), *(pytest.param(name, None, marks=pytest.mark.slow) for name in families())]
)
def test_the_default_compiler_gives_the_gradients_of_every_shape(family, dynamic, tmp_path):
    case = FamilyCase(family, "model.num_hidden_layers=1")
    model, loss = case.model(), case.trainer(tmp_path).loss
    compiled = torch.compile(model, dynamic=dynamic)
    for batch in batches(case, case.collator("seq2seq", model)):
        assert_close(loss_and_gradients(compiled, loss, batch), loss_and_gradients(model, loss, batch))


@pytest.mark.parametrize("family", families())
def test_decodes_of_every_shape_share_two_graphs_and_write_the_same(family):
    case = FamilyCase(family, "generation.max_new_tokens=8")
    model = case.model()
    prompts = [case.collator("seq2seq_prediction", model)(case.examples()[:number]) for number in (6, 3, 5)]
    for prompt in prompts:
        del prompt["example_id"]

    def written():
        return [model.generate(**prompt, seed=3, do_sample=True).sequences.tolist() for prompt in prompts]

    expected = written()
    model.model.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    counters.clear()
    # Sizes that happen to be equal in the first call are not taken for one.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        assert written() == expected
    # One for several rows, and one for the last row that is left; with a cache, another before it holds anything.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 + hasattr(model.generation_config, "use_cache")


def test_a_row_that_is_too_long_is_refused():
    case = FamilyCase(min(families()))
    plain = case.collator("seq2seq", case.model())
    with pytest.raises(ValueError, match=r"trainer.static_length is 12 and a row needs \d+: raise it"):
        StaticShapes(plain, 12)(case.examples())


def test_with_packing_a_length_below_the_positions_is_refused_at_once():
    case = FamilyCase(min(families()))
    packed = case.collator("seq2seq", case.model(), packing=True)
    with pytest.raises(
        ValueError, match=r"static_length is 12, but .* `model.max_position_embeddings=N trainer.static"
    ):
        StaticShapes(packed, 12)


def test_with_packing_more_targets_than_positions_fill_a_multiple():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "target_ids": torch.arange(11)}
    collator = MadeBatch(batch, {"target_ids": Entry("target", padding=-100)})
    collator.row_capacity = 5
    padded = StaticShapes(collator, 5)([])
    assert padded["input_ids"].shape == (2, 5)
    assert padded["target_ids"].tolist() == [*range(11), *[-100] * 9]


class MadeBatch:
    """A collator of one batch."""

    row_capacity = None

    def __init__(self, batch, entries):
        self.batch, self.entries = batch, {**Collator.entries, **entries}

    def __call__(self, examples):
        return self.batch


def test_more_targets_than_positions_are_refused_and_not_cut_off():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "target_ids": torch.zeros(11, dtype=torch.long)}
    with pytest.raises(ValueError, match="static_length is 5 and a row needs 6"):
        StaticShapes(MadeBatch(batch, {"target_ids": Entry("target")}), 5)([])


@pytest.mark.parametrize("several", [False, True])
def test_what_a_batch_declares_decides_how_it_is_padded(several):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        "segment_ids": torch.tensor([[0, 0, 1], [0, 0, 0]]),
        "times": torch.rand(2, 3, 2) if several else torch.rand(2, 3),
        "vectors": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "gap_index": torch.tensor([1, 4]),
        "gap_documents": torch.tensor([0, 2]),
        "gap_counts": torch.tensor([3, 1]),
        "nothing": torch.zeros(0, dtype=torch.long),
        "length": torch.tensor([3, 2, 1]),
        "end_index": torch.tensor([2, 4]),
    }
    if not several:
        del batch["segment_ids"]
    entries = {
        "times": Entry("row"),
        "vectors": Entry("document"),
        "gap_index": Entry("gap", index_of="position"),
        "gap_documents": Entry("gap", index_of="document", padding="next"),
        "gap_counts": Entry("gap", padding=-1),
        "nothing": Entry("other"),
        "length": Entry("document"),
        "end_index": Entry("example", index_of="position"),
    }
    padded = StaticShapes(MadeBatch(batch, entries), 5)([])
    assert padded["input_ids"].tolist() == [[5, 6, 7, 7, 7], [8, 9, 0, 0, 0]]
    assert padded["attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3]
    assert padded["gap_index"].tolist() == [1, 6] + [6] * 8
    assert padded["gap_documents"].tolist() == [0, 2] + [3] * 8
    assert padded["gap_counts"].tolist() == [3, 1] + [-1] * 8
    assert padded["nothing"].tolist() == [0] * 10
    assert padded["end_index"].tolist() == [2, 6]
    for name in ("length", "vectors", *(() if several else ("times",))):
        assert torch.equal(padded[name], batch[name])
    if several:
        assert padded["segment_ids"].tolist() == [[0, 0, 1, 1, 1], [0] * 5]
        assert torch.equal(padded["times"], batch["times"][:, [0, 1, 2, 2, 2]])


def test_an_entry_that_is_not_declared_is_refused_by_name():
    class Undeclared(Collator):
        layouts = {"lm": "[BOS] target"}

        def training_batch(self, documents):
            rows, _ = self.rows_of(documents, documents.target_lengths)
            return rows.batch(extra_ids=documents.target_ids)

    example = {"input_ids": [8, 9], "example_id": 0, "epoch": 0, "position": 0}
    with pytest.raises(ValueError, match=r"Undeclared.entries does not declare 'extra_ids' of its batches: add an"):
        Undeclared(number_tokenizer(5), 8, "lm")([example])


def test_the_trainer_pads_its_batches_and_compiles_a_step_once(tmp_path):
    options = ("trainer.torch_compile=true", "+trainer.torch_compile_backend=aot_eager")
    trainer = FamilyCase("mlm", *options, f"trainer.static_length={LENGTH}").trainer(tmp_path)
    assert {batch["input_ids"].shape for batch in trainer.get_train_dataloader()} == {(4, LENGTH)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert trainer.state.global_step == 6
