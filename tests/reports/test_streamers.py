"""What is seen of a decode is what happened in it."""

import io
import json
import re

import pytest
import torch
from PIL import Image

from xlm_hf.families import families
from xlm_hf.reports.decode_page import history_html, save_gif
from xlm_hf.reports.streamers import BatchDiffusionStreamer, DraftRecorder, Place
from xlm_hf.testing import FamilyCase


@pytest.fixture(scope="module")
def tokenizer():
    return FamilyCase("mdlm").task.tokenizer


def ids(tokenizer, text):
    return torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])


def replay(tokenizer, prompt, *drafts, streamer=None):
    recorder = streamer or DraftRecorder(tokenizer)
    recorder.put(ids(tokenizer, prompt))
    for draft in drafts:
        recorder.put_draft(ids(tokenizer, draft))
    recorder.put(ids(tokenizer, drafts[-1]))
    recorder.end()
    return recorder


def events(frames):
    return [[(place.text, place.event) for place in frame if place.event] for frame in frames]


def test_unmasking_and_masking_again_are_told_apart(tokenizer):
    m, p = tokenizer.mask_token, tokenizer.pad_token
    recorder = replay(tokenizer, f"{p} 7 8", f"1 {m} {m}", f"1 {m} {m}", f"{m} {m} 3", f"{m} 2 4")
    prompt = [("7", "prompt"), ("8", "prompt")]
    assert events(recorder.frames(0)) == [
        prompt,
        [*prompt, ("1", "unmasked")],
        [*prompt, (m, "remasked"), ("3", "unmasked")],
        [*prompt, ("2", "unmasked"), ("4", "replaced")],
    ]
    assert [place.is_mask for place in recorder.frames(0)[0]] == [False, False, True, True, True]


def test_an_insertion_is_seen_where_it_happened(tokenizer):
    p = tokenizer.pad_token
    recorder = replay(tokenizer, "7", f"5 {p} {p}", f"5 5 {p}", "5 9 5")
    assert [len(frame) for frame in recorder.frames(0)] == [1, 2, 3, 4]
    assert events(recorder.frames(0))[2:] == [
        [("7", "prompt"), ("5", "inserted")],
        [("7", "prompt"), ("9", "inserted")],
    ]


def test_blanks_within_a_prompt_are_filled_in_place(tokenizer):
    m = tokenizer.mask_token
    recorder = replay(tokenizer, f"1 {m} 3", "1 2 3")
    assert events(recorder.frames(0)) == [[], [("2", "unmasked")]]


@pytest.mark.parametrize("family", families())
def test_the_last_frame_is_the_result_and_every_token_appears_when_history_says(family):
    case = FamilyCase(family)
    model, tokenizer = case.model(), case.task.tokenizer
    batch = case.collator("seq2seq_prediction", model)(case.examples(1))
    batch.pop("example_id")
    recorder = DraftRecorder(tokenizer)
    output = model.generate(**batch, seed=3, streamer=recorder, return_history=True, max_new_tokens=6)
    frames, width = recorder.frames(0), batch["input_ids"].shape[1]
    pads = (tokenizer.pad_token_id, tokenizer.mask_token_id)
    written = [token for token in output.sequences[0, width:].tolist() if token not in pads]
    last = [place.text for place in frames[-1] if place.event != "prompt" and not place.is_mask]
    assert last[: len(written)] == [tokenizer.decode([token]) for token in written]
    steps = output.history[0, width:]
    changed = [sum(place.event in ("inserted", "unmasked") for place in frame) for frame in frames[1:]]
    assert changed == [int((steps == step).sum()) for step in steps[steps >= 0].unique()]


def test_the_terminal_shows_every_row_and_overwrites_what_it_showed(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "10")
    m, terminal = tokenizer.mask_token, io.StringIO()
    streamer = BatchDiffusionStreamer(tokenizer, output=terminal)
    streamer.put(torch.cat((ids(tokenizer, "7 8"), ids(tokenizer, "8 7"))))
    streamer.put_draft(torch.cat((ids(tokenizer, f"1 {m}"), ids(tokenizer, f"{m} 2"))))
    streamer.put_draft(torch.cat((ids(tokenizer, "1 4"), ids(tokenizer, "6 2"))))
    streamer.end()
    first, second = terminal.getvalue().split("\033[2A\r\033[J")
    plain = [re.sub(r"\033\[[\d;]*m", "", text) for text in (first, second)]
    assert plain == ["7 8 1 ░\n8 7 ░ 2\n", "7 8 1 4\n8 7 6 2\n"]
    assert "\033[1;34m4\033[0m" in second
    assert "\033[1;34m1\033[0m" not in second


def test_no_more_rows_are_shown_than_the_terminal_holds(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4")
    monkeypatch.setenv("LINES", "5")
    terminal = io.StringIO()
    streamer = BatchDiffusionStreamer(tokenizer, output=terminal)
    streamer.put(ids(tokenizer, "7 8").repeat(9, 1))
    streamer.put_draft(ids(tokenizer, "1 2").repeat(9, 1))
    assert re.sub(r"\033\[[\d;]*m", "", terminal.getvalue()) == "7 8 1 2\n" * 2


def test_the_page_holds_the_frames_and_nothing_that_could_break_out(tokenizer):
    frames = [[Place("</script><b>", "prompt", False), Place("1", "inserted", False)]]
    page = history_html([frames], title="a < b")
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["rows"] == [[[["</script><b>", "prompt", False], ["1", "inserted", False]]]]
    assert "<title>a &lt; b</title>" in page
    assert not re.search(r"(src|href)=", page)


def test_the_film_has_a_frame_a_step_in_the_colour_of_what_happened(tokenizer, tmp_path):
    m = tokenizer.mask_token
    frames = replay(tokenizer, "7", f"{m} {m}", f"1 {m}", f"{m} {m}").frames(0)
    save_gif(frames, tmp_path / "decode.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["decode.gif"]
    film = Image.open(tmp_path / "decode.gif")
    assert film.n_frames == len(frames) == 3
    for number, (red, blue) in enumerate([(False, False), (False, True), (True, False)]):
        film.seek(number)
        colours = {colour for _, colour in film.convert("RGB").getcolors(10**6)}
        assert ((207, 34, 46) in colours) is red
        assert ((9, 105, 218) in colours) is blue


def test_a_long_decode_makes_a_film_of_bounded_length(tokenizer, tmp_path):
    frames = [[Place(str(number), "inserted", False)] for number in range(1000)]
    save_gif(frames, tmp_path / "decode.gif")
    assert Image.open(tmp_path / "decode.gif").n_frames == 200
