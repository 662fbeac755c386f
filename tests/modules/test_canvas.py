import torch

from xlm_hf.modules.canvas import MaskedCanvas

PAD, MASK, EOS = 0, 2, 3


def make_canvas(eos_token_id=EOS):
    """Three rows: two prompts with canvases of 3 and 2, and a prompt that holds a mask token and gets no canvas."""
    prompt = torch.tensor([[PAD, 7], [8, EOS], [MASK, 9]])
    return MaskedCanvas(
        prompt, torch.tensor([[0, 1], [1, 1], [1, 1]]).bool(), torch.tensor([3, 2, 0]), MASK, PAD, eos_token_id
    )


def test_rows_hold_prompt_and_canvas_of_their_own_length():
    canvas = make_canvas()
    assert canvas.ids.tolist() == [[PAD, 7, MASK, MASK, MASK], [8, EOS, MASK, MASK, PAD], [MASK, 9, PAD, PAD, PAD]]
    assert canvas.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert canvas.masked.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert canvas.positions[0, 1:].tolist() == [0, 1, 2, 3]
    assert canvas.positions[1, :4].tolist() == [0, 1, 2, 3]
    assert canvas.masked.any(dim=-1).tolist() == [True] * 3


def write(canvas, rows, chosen, tokens, step):
    canvas.commit(torch.tensor(rows), torch.tensor(chosen).bool(), torch.tensor(tokens), step)
    canvas.nfe[rows] += 1


def test_a_row_ends_with_its_end_of_sequence():
    canvas = make_canvas()
    write(canvas, [0, 2], [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], [9, 8], step=0)
    write(canvas, [0], [[0, 0, 0, 1, 0]], [EOS], step=1)
    # The row still lacks what stands before its end; the other row has an end in its prompt, which ends nothing.
    assert canvas.masked.any(dim=-1).tolist() == [True, True, False]
    assert canvas.masked.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    write(canvas, [0, 1], [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]], [6, EOS], step=2)
    assert not canvas.masked.any()

    output = canvas.output(return_history=True)
    assert output.sequences.tolist() == [[PAD, 7, 6, EOS], [8, EOS, EOS, PAD], [8, 9, PAD, PAD]]
    assert output.history.tolist() == [[-1, -1, 2, 1], [-1, -1, 2, -1], [0, -1, -1, -1]]
    assert output.finish_reason == ["stop", "stop", "length"]
    assert output.nfe.tolist() == [3, 1, 1]
    torch.testing.assert_close(output.tokens_per_forward, torch.tensor([2 / 3, 1.0, 1.0]))
    assert canvas.output(return_history=False).history is None


def test_without_an_end_of_sequence_every_row_is_filled():
    canvas = make_canvas(eos_token_id=None)
    write(canvas, [0], [[0, 0, 1, 0, 0]], [EOS], step=0)
    assert canvas.masked[0].int().tolist() == [0, 0, 0, 1, 1]
    assert canvas.output(return_history=False).finish_reason == ["length"] * 3
