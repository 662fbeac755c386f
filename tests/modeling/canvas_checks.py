"""What holds of every family that fills a canvas under noise, written once."""

import torch

from tests.host_reads import as_on_an_accelerator
from tests.modeling.naive import EOS, FIRST_WORD, MASK, PAD, UNK, SpecialIds, batch_of, make_examples

PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
SEEDS = [3, 1, 4, 9]


def check_rows(model, **options):
    """A row decodes alike alone, in any batch, padded on either side and on an accelerator; its prompt stays."""
    options = {"do_sample": True, "return_history": True, **options}
    together = model.generate(batch_of(PROMPTS), seed=SEEDS, **options)
    right = model.generate(batch_of(PROMPTS, "right"), seed=SEEDS, **options)
    with as_on_an_accelerator():
        rounded = model.generate(batch_of(PROMPTS), seed=SEEDS, **options)
    for other in (right, rounded):
        for field in ("sequences", "history", "nfe", "edits"):
            torch.testing.assert_close(getattr(other, field), getattr(together, field))
    width = batch_of(PROMPTS).shape[1]
    assert torch.equal(together.sequences[:, :width], batch_of(PROMPTS))
    written = together.sequences[:, width:]
    assert set(written.unique().tolist()) <= {PAD, EOS, UNK, *range(FIRST_WORD, 20)}
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=SEEDS[row : row + 1], **options)
        own = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert own == written[row, : len(own)].tolist()
        assert (written[row, len(own) :] == PAD).all()
        assert alone.nfe[0] == together.nfe[row]
        assert alone.finish_reason[0] == together.finish_reason[row]


def check_blanks(model, **options):
    """Blanks are filled in place, alike alone and in a batch, and what is given stays."""
    rows = [[8, MASK, 10, MASK, MASK, MASK], [MASK, MASK, 11], [12, 13]]
    ids = torch.tensor([[PAD] * (6 - len(row)) + row for row in rows])
    inputs = {"canvas_lengths": torch.zeros(3, dtype=torch.int64)}
    model.generation_inputs = ("canvas_lengths",)
    output = model.generate(ids, seed=SEEDS[:3], do_sample=True, return_history=True, **options, **inputs)
    assert torch.equal(output.sequences[ids != MASK], ids[ids != MASK])
    assert MASK not in output.sequences
    assert torch.equal(output.history >= 0, ids == MASK)
    assert output.nfe[2] == 0
    for row, alone in enumerate(rows[:2]):
        own = model.generate(torch.tensor([alone]), seed=SEEDS[row : row + 1], do_sample=True, **options)
        assert own.sequences[0].tolist() == output.sequences[row, 6 - len(alone) :].tolist()


def check_unwritten_ids(make_model, collator_class, loss, vocab_size, **options):
    """More special tokens change neither the noise, nor the number of ids that it is drawn from, nor the bound."""
    more = [vocab_size, vocab_size + 1, vocab_size + 2]

    class MoreIds(SpecialIds):
        all_special_ids = [*range(FIRST_WORD), *more]

    small, large = make_model(vocab_size, 32), make_model(vocab_size + 3, 32, suppress_tokens=[*range(6), *more])
    weights = small.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.ones(3, 32)))
    large.load_state_dict(weights)
    batches = [
        collator_class(ids, 32, kind="seq2seq", canvas_length=9, **options)(make_examples(6, vocab_size))
        for ids in (SpecialIds(vocab_size), MoreIds(vocab_size + 3))
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(*(loss(*pair).loss_sum for pair in zip((small, large), batches, strict=True)))
