"""What is seen of a decode is what happened in it."""

import io
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TextDiffusionStreamer

from xlm_hf.commands.generate import render
from xlm_hf.families import families
from xlm_hf.modules.edits import EDIT_KINDS, EditBuffer, EditLog
from xlm_hf.reports.decode_page import COLOURS, history_html, save_gif
from xlm_hf.reports.streamers import _STYLES, MARKS, MASK, BatchDiffusionStreamer, Decode, DraftRecorder, Token
from xlm_hf.tasks.tokenizers import decode_text
from xlm_hf.testing import FamilyCase


@pytest.fixture(scope="module")
def tokenizer():
    return FamilyCase("mdlm").task.tokenizer


def ids(tokenizer, *texts):
    return torch.tensor([tokenizer.convert_tokens_to_ids(text.split()) for text in texts])


def put_step(streamer, drafts, *events):
    """Put drafts, one text a row, and events (row, kind, position, token)."""
    log = [
        (row, 0, EDIT_KINDS.index(kind), position, ids(streamer.tokenizer, token))
        for row, kind, position, token in events
    ]
    streamer.put_draft(ids(streamer.tokenizer, *drafts), edits=torch.tensor(log, dtype=torch.int64).view(-1, 5))


@pytest.fixture
def recorder(tokenizer):
    """Two rows, one with all five kinds of events, both ragged on either side."""
    m, p, streamer = tokenizer.mask_token, tokenizer.pad_token, DraftRecorder(tokenizer)
    streamer.put(ids(tokenizer, f"{p} 7 8", "5 7 8"))
    streamer.put_draft(ids(tokenizer, f"{m} {m} {m}", f"{m} {m} {p}"))
    first = [(0, "unmask", 2, "1"), (0, "insert", 5, "4"), (1, "unmask", 4, p)]
    put_step(streamer, [f"1 {m} {m} 4 {p}", f"{m} {p} {p} {p} {p}"], *first)
    put_step(streamer, [f"1 2 {m} {p} {p}", f"{m} {p} {p} {p} {p}"], (0, "unmask", 3, "2"), (0, "delete", 5, "4"))
    third = [
        (0, "remask", 2, m),
        (0, "substitute", 3, "5"),
        (0, "delete", 4, m),
        (0, "insert", 2, "12"),
        (0, "insert", 5, "13"),
    ]
    put_step(streamer, [f"12 {m} 5 13 {p}", f"{m} {p} {p} {p} {p}"], *third)
    put_step(streamer, [f"12 3 5 13 {p}", f"9 {p} {p} {p} {p}"], (0, "unmask", 3, "3"), (1, "unmask", 3, "9"))
    streamer.put(ids(tokenizer, f"12 3 5 13 {p}", f"9 {p} {p} {p} {p}"))
    streamer.end()
    return streamer


def written(frame):
    return [(token.text, token.event) for token in frame if token.event != "prompt"]


def test_the_five_kinds_of_events_are_told_apart(recorder):
    assert [written(frame) for frame in recorder.decodes[0].frames()] == [
        [(MASK, ""), (MASK, ""), (MASK, "")],
        [("1", "unmask"), (MASK, ""), (MASK, ""), ("4", "insert")],
        [("1", ""), ("2", "unmask"), (MASK, ""), ("4", "delete")],
        [("12", "insert"), (MASK, "remask"), ("5", "substitute"), (MASK, "delete"), ("13", "insert")],
        [("12", ""), ("3", "unmask"), ("5", ""), ("13", "")],
    ]
    assert [token.text for token in recorder.decodes[0].frames()[-1] if token.event == "prompt"] == ["7", "8"]


def test_padding_that_is_written_is_a_token_and_rows_keep_step(recorder, tokenizer):
    p, frames = tokenizer.pad_token, recorder.decodes[1].frames()
    assert [written(frame) for frame in frames] == [
        [(MASK, ""), (MASK, "")],
        [(MASK, ""), (p, "unmask")],
        [(MASK, ""), (p, "")],
        [(MASK, ""), (p, "")],
        [("9", "unmask"), (p, "")],
    ]
    assert len(frames) == len(recorder.decodes[0].frames())


def test_a_deletion_is_seen_where_it_happened(tokenizer):
    streamer = DraftRecorder(tokenizer)
    streamer.put(ids(tokenizer, "7"))
    streamer.put_draft(ids(tokenizer, "1 2 3 4"))
    put_step(streamer, ["1 3 4"], (0, "delete", 2, "2"))
    put_step(streamer, ["1 3 4"])
    frames = streamer.decodes[0].frames()
    assert written(frames[1]) == [("1", ""), ("2", "delete"), ("3", ""), ("4", "")]
    assert written(frames[2]) == [("1", ""), ("3", ""), ("4", "")]


def test_edits_are_read_in_the_order_of_the_log(tokenizer):
    streamer = DraftRecorder(tokenizer)
    streamer.put(ids(tokenizer, "7"))
    streamer.put_draft(ids(tokenizer, "9 3 4"))
    deleted = [(0, "delete", 3, "4"), (0, "delete", 1, "9")]
    put_step(streamer, ["1 3 5"], *deleted, (0, "insert", 1, "1"), (0, "insert", 3, "5"))
    start, after = streamer.decodes[0].frames()
    assert written(start) == [("9", ""), ("3", ""), ("4", "")]
    assert written(after) == [("9", "delete"), ("1", "insert"), ("3", ""), ("4", "delete"), ("5", "insert")]


def test_blanks_within_a_prompt_are_filled_in_place(tokenizer):
    m, streamer = tokenizer.mask_token, DraftRecorder(tokenizer)
    streamer.put(ids(tokenizer, f"1 {m} 3"))
    streamer.put_draft(ids(tokenizer, f"1 {m} 3"))
    put_step(streamer, ["1 2 3"], (0, "unmask", 1, "2"))
    prompt = [Token("1", "prompt"), Token("3", "prompt")]
    assert streamer.decodes[0].frames() == [
        [prompt[0], Token(MASK), prompt[1]],
        [prompt[0], Token("2", "unmask"), prompt[1]],
    ]


def test_tokens_that_come_one_by_one_are_appended(tokenizer):
    streamer = DraftRecorder(tokenizer)
    streamer.put(ids(tokenizer, "7 8", f"{tokenizer.pad_token} 8"))
    for tokens in ("5 6", f"4 {tokenizer.pad_token}"):
        streamer.put(ids(tokenizer, tokens)[0])
    assert [written(frame) for frame in streamer.decodes[0].frames()[1:]] == [
        [("5", "insert")],
        [("5", ""), ("4", "insert")],
    ]
    assert [written(frame) for frame in streamer.decodes[1].frames()[1:]] == [[("6", "insert")], [("6", "")]]


def test_the_frames_are_what_an_edit_buffer_holds(tokenizer):
    draws, (B, W, K) = np.random.default_rng(0), (3, 12, 4)
    log, recorder, p = EditLog(), DraftRecorder(tokenizer), tokenizer.pad_token_id
    prompt = ids(tokenizer, "7 8", f"{tokenizer.pad_token} 8", "9 8")
    start, lengths = ids(tokenizer, *["1 2 3 4 5"] * 3), torch.tensor([5, 2, 0])
    start = start.masked_fill(torch.arange(5) >= lengths[:, None], p)
    buffer = EditBuffer(prompt, prompt != p, torch.full((B,), W), p, log, start, lengths)
    recorder.put(prompt)
    recorder.put_draft(buffer.written())
    for step in range(8):
        slots = torch.from_numpy(draws.integers(0, W, (B, K))).clamp(max=buffer.lengths[:, None])
        inserted, deleted, changed = (torch.from_numpy(draws.random(size) < 0.3) for size in [(B, K), (B, W), (B, W)])
        tokens, substitutes = (torch.from_numpy(draws.integers(3, 15, size)) for size in [(B, K), (B, W)])
        buffer.apply(torch.arange(B), step, slots, tokens, inserted, deleted, torch.where(changed, substitutes, -1))
        recorder.put_draft(buffer.written(), edits=log.latest())
        for row, decode in enumerate(recorder.decodes):
            kept = [text for text, event in written(decode.frames()[-1]) if event != "delete"]
            own = buffer.tokens[row, : buffer.lengths[row]].tolist()
            assert kept == [decode_text(tokenizer, [token]) for token in own]


class DraftKeeper(DraftRecorder):
    """Keeps the drafts too, which the frames have to agree with."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.drafts = []

    def put_draft(self, value, edits=None):
        self.drafts.append(value.clone())
        super().put_draft(value, edits)


@pytest.fixture(scope="module", params=families())
def decoding(request):
    """Of every family a model, its tokenizer and a batch of prompts."""
    case = FamilyCase(request.param)
    model = case.model()
    batch = case.collator("seq2seq_prediction", model)(case.examples(3))
    batch.pop("example_id")
    return model, case.task.tokenizer, batch


def test_every_frame_is_the_draft_and_the_last_one_the_result(decoding):
    model, tokenizer, batch = decoding
    recorder, pad = DraftKeeper(tokenizer), tokenizer.pad_token
    output = model.generate(**batch, seed=3, streamer=recorder, return_history=True, max_new_tokens=6)
    width = batch["input_ids"].shape[1]
    for row, decode in enumerate(recorder.decodes):
        frames = decode.frames()
        texts = [[text for text, event in written(frame) if event != "delete"] for frame in frames]
        for text, draft in zip(texts, recorder.drafts, strict=False):
            whole = [MASK if t == tokenizer.mask_token_id else decode_text(tokenizer, [t]) for t in draft[row].tolist()]
            assert text == whole[: len(text)]
            assert set(whole[len(text) :]) <= {pad}
        written_ids = [t for t in output.sequences[row, width:].tolist() if t != tokenizer.pad_token_id]
        result = [decode_text(tokenizer, [t]) for t in written_ids]
        assert [text for text in texts[-1] if text not in (pad, MASK)][: len(result)] == result
        for step in range(len(frames) - 1):
            of_step = [event for _, event in written(frames[step + 1]) if event in ("insert", "unmask", "substitute")]
            assert len(of_step) >= int((output.history[row] == step).sum())


def test_a_streamer_of_transformers_goes_on_working(decoding, capsys):
    model, tokenizer, batch = decoding
    first = {name: tensor[:1] for name, tensor in batch.items()}
    output = model.generate(
        **first, seed=3, streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True), max_new_tokens=6
    )
    result = tokenizer.decode(output.sequences[0, first["input_ids"].shape[1] :])
    # A canvas that is written whole may show the padding behind the end of its text.
    printed = capsys.readouterr().out.replace(tokenizer.pad_token, "").rstrip()
    assert printed.endswith(result.split(tokenizer.pad_token)[0].rstrip())


def plain(text):
    return re.sub(r"\033\[[\d;]*m", "", text)


def test_the_terminal_shows_every_row_and_overwrites_what_it_showed(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "10")
    m, terminal = tokenizer.mask_token, io.StringIO()
    streamer = BatchDiffusionStreamer(tokenizer, output=terminal)
    streamer.put(ids(tokenizer, "7 8", "8 7"))
    streamer.put_draft(ids(tokenizer, f"{m} {m}", f"{m} {m}"))
    put_step(streamer, [f"1 {m}", f"{m} 2"], (0, "unmask", 2, "1"), (1, "unmask", 3, "2"))
    put_step(streamer, ["1 4", "6 2"], (0, "unmask", 3, "4"), (1, "unmask", 2, "6"))
    streamer.end()
    first, second = terminal.getvalue().split("\033[2A\r\033[J")
    assert [plain(first), plain(second)] == ["7 8 1 ░\n8 7 ░ 2\n", "7 8 1 4\n8 7 6 2\n"]
    assert "\033[1;34m4\033[0m" in second
    assert "\033[1;34m1\033[0m" not in second


def test_no_more_rows_are_shown_than_the_terminal_holds(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4")
    monkeypatch.setenv("LINES", "5")
    terminal = io.StringIO()
    streamer = BatchDiffusionStreamer(tokenizer, output=terminal)
    streamer.put(ids(tokenizer, *["7 8"] * 9))
    streamer.put_draft(ids(tokenizer, *["1 2"] * 9))
    put_step(streamer, ["1 2"] * 9)
    assert plain(terminal.getvalue()) == "7 8 1 2\n" * 2


def test_a_token_can_not_move_the_cursor(tokenizer, monkeypatch):
    streamer = DraftRecorder(tokenizer)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "a\033[2J\r\n\x9b")
    streamer.put(torch.tensor([[5]]))
    streamer.put(torch.tensor([6]))
    assert [token.text for token in streamer.decodes[0].frames()[-1]] == ["a\ufffd[2J\ufffd↵\ufffd"] * 2


def test_a_decode_as_text_marks_what_every_step_did(recorder, tokenizer):
    record = {"prompt": "7 8", "prediction": "12 3 5 13", "reference": "", "finish_reason": "stop", "nfe": 4}
    lines = render({**record, "steps": [2, 3, 2, 2]}, recorder.decodes[0], tokenizer.pad_token).splitlines()
    assert lines == [
        "prompt      7 8",
        "step 1      [1] [+4]",
        "step 2      1 [2] [-4]",
        "step 3      [+12] [_] [~5] [-_] [+13]",
        "step 4      12 [3] 5 13",
        "prediction  12 3 5 13   (stop, 4 forward passes)",
    ]
    lines = render({**record, "steps": [3]}, recorder.decodes[1], tokenizer.pad_token).splitlines()
    assert lines[1:-1] == ["step 4      [9]"]
    lines = render({**record, "steps": [-1, 2, 3, 2]}, recorder.decodes[0], tokenizer.pad_token).splitlines()
    assert lines[1] == "step 1      7 8 [1] _ _ [+4]"


def linear(colour):
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Of WCAG 2.2, from 1 to 21."""
    dark, light = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


# Machado, Oliveira and Fernandes (2009), deuteranopia: severity 1.
DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def lab(rgb):
    """CIELAB of linear RGB, by the white point of sRGB."""
    share = TO_XYZ @ rgb / TO_XYZ.sum(axis=1)
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_told_apart_by_the_colour_blind_and_text_is_read_in_both_themes():
    assert list(COLOURS) == list(MARKS) == list(EDIT_KINDS)
    for one, other in itertools.combinations([background for background, _ in COLOURS.values()], 2):
        seen = [lab(np.clip(DEUTAN @ linear(colour), 0, 1)) for colour in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) > 30
    assert all(contrast(*pair) >= 4.5 for pair in COLOURS.values())
    page = history_html([])
    themes = [dict(re.findall(r"--(\w+): (#\w+);", root)) for root in re.findall(r":root \{([^}]*)\}", page)]
    assert len(themes) == 2
    for theme in themes:
        assert contrast(theme["fg"], theme["bg"]) >= 4.5
        assert contrast(theme["dim"], theme["bg"]) >= 4.5


def test_every_kind_has_a_look_of_its_own_beside_its_colour():
    terminal = {event: style.split(";")[0] for event, style in _STYLES.items() if event in MARKS}
    assert len(set(terminal.values())) == len(terminal) - 1
    assert terminal["unmask"] == terminal["remask"]  # of which one leaves a mask
    rules = re.findall(r"^  \.(\w+) \{ (.*) \}$", history_html([]), re.MULTILINE)
    looks = {(MARKS[kind], *(rule for of, rule in rules if of == kind and "background" not in rule)) for kind in MARKS}
    assert len(looks) == len(MARKS)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_the_log_and_nothing_that_could_break_out():
    texts = ["</script><b>", "<!--<script>", "DATA TITLE"]
    page = history_html([Decode([Token(texts[0], "prompt")], [[], [(1, Token(texts[1], "insert"))]])], title="a < DATA")
    assert page.count("</script>") == page.count("<script") == 2
    assert "<!--" not in page
    (row,) = data_of(page)["rows"]
    assert row == [[[texts[0], "prompt"]], [[], [[1, texts[1], "insert"]]]]
    assert "<title>a &lt; DATA</title>" in page
    assert not re.search(r"(src|href)=", page)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
READ_FRAMES = """<script>
  const frames = [...Array(last + 1).keys()].map(step => {
    slider.value = step; slider.oninput();
    return views.map(view => [...view.element.children].map(span => [span.textContent, span.className]));
  });
  document.body.replaceChildren(JSON.stringify(frames));
</script></html>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_the_frames_in_a_browser(recorder, tmp_path):
    (tmp_path / "decodes.html").write_text(history_html(recorder.decodes).replace("</html>", READ_FRAMES))
    command = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--dump-dom"]
    result = subprocess.run([*command, f"file://{tmp_path}/decodes.html"], capture_output=True, text=True, check=True)
    shown = json.loads(re.search(r"<body>(.*)</body>", result.stdout, re.DOTALL)[1])
    frames = [decode.frames() for decode in recorder.decodes]
    expected = [
        [[[t.text, t.event or ("mask" if t.text == MASK else "")] for t in frame] for frame in step]
        for step in zip(*frames, strict=True)
    ]
    assert shown == expected


def test_the_film_has_a_frame_a_step_in_the_colour_of_what_happened(recorder, tmp_path):
    frames = recorder.decodes[0].frames()
    save_gif(recorder.decodes[0], tmp_path / "decode.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["decode.gif"]
    film = Image.open(tmp_path / "decode.gif")
    assert film.n_frames == len(frames)
    for number, frame in enumerate(frames):
        film.seek(number)
        colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in film.convert("RGB").getcolors(10**6)}
        events = {kind for kind, (background, _) in COLOURS.items() if background in colours}
        assert events == {token.event for token in frame} - {"", "prompt"}


def test_a_long_decode_makes_a_film_of_bounded_length(tmp_path):
    steps = [[(0, Token(str(number), "substitute"))] for number in range(999)]
    save_gif(Decode([Token("0")], steps), tmp_path / "decode.gif")
    assert Image.open(tmp_path / "decode.gif").n_frames == 200
