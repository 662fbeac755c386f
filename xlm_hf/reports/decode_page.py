"""A decode as a self-contained page and as a film: five kinds of edits, told apart by mark, shape and colour."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import jinja2

from xlm_hf.files import INCOMPLETE_SUFFIX
from xlm_hf.reports.streamers import MARKS, Decode, Token

# Background and text of a token that a step changed. The backgrounds differ in lightness and in blueness, which
# red-green blindness leaves. Each text has a contrast of at least 4.5 on its background: one palette for both themes.
COLOURS = {
    "insert": ("#f0e442", "#000000"),
    "delete": ("#57606a", "#ffffff"),
    "substitute": ("#d55e00", "#000000"),
    "unmask": ("#0072b2", "#ffffff"),
    "remask": ("#9bd4f5", "#000000"),
}
_TEXT, _DIM = "#1f2328", "#59636e"
_FONT_SIZE, _WIDTH, _MARGIN, _PADDING = 20, 960, 24, 4
_MOST_FRAMES = 200


def history_html(rows: Sequence[Decode], separator: str = " ", title: str = "Decode history") -> str:
    """A page that needs nothing else: the rows below each other, a slider over the steps, a button that plays them.

    The page holds the starts and the log, and makes the frames itself as `Decode.frames` does.

    Args:
        rows: the decodes, as `DraftRecorder` keeps them.
        separator: between the texts of two tokens.
        title: of the page.
    """
    starts = [[astuple(token) for token in row.start] for row in rows]
    steps = [[[(position, *astuple(token)) for position, token in edits] for edits in row.steps] for row in rows]
    data = {"separator": separator, "marks": MARKS, "rows": list(zip(starts, steps, strict=True))}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("xlm_hf.reports", "."), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("decode_page.html").render(title=title, colours=COLOURS, data=data)


def save_gif(decode: Decode, file: Path, separator: str = " ", seconds: float = 8.0) -> None:
    """Draw a decode as an animated GIF that lasts `seconds` and rests on its last frame.

    Of more than 200 frames an evenly spaced choice is drawn.

    Raises:
        ImportError: if Pillow or matplotlib, whose font it takes, is not installed.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    # Pillow's own font holds little more than ASCII.
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)
    frames = decode.frames()
    step = max(1, len(frames) / _MOST_FRAMES)
    chosen = [frames[min(int(i * step), len(frames) - 1)] for i in range(min(len(frames), _MOST_FRAMES) - 1)]
    layouts = [_layout(frame, font, separator) for frame in [*chosen, frames[-1]]]
    height = int(max(y for layout in layouts for _, y, _, _ in layout)) + 2 * _FONT_SIZE + _MARGIN
    images = []
    for layout in layouts:
        image = Image.new("RGB", (_WIDTH, height), "white")
        draw = ImageDraw.Draw(image)
        for x, y, text, event in layout:
            right = x + font.getlength(text)
            background, colour = COLOURS.get(event, (None, _DIM if event == "prompt" else _TEXT))
            if background:
                draw.rounded_rectangle((x - _PADDING, y - 2, right + _PADDING, y + _FONT_SIZE + 5), 4, background, _DIM)
            draw.text((x, y), text, fill=colour, font=font)
            if event == "delete":
                left, middle = x + font.getlength(MARKS[event]) + 2, y + 0.6 * _FONT_SIZE
                draw.line((left, middle, right, middle), colour, 2)
        images.append(image)
    durations = [max(30, round(1000 * seconds / len(images)))] * (len(images) - 1) + [2500]
    staging = file.with_name(file.name + INCOMPLETE_SUFFIX)
    images[0].save(staging, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    staging.replace(file)


def _layout(frame: Sequence[Token], font, separator: str) -> list[tuple[float, float, str, str]]:
    """Where each token is drawn: (x, y, text, event), wrapped at the width of the film."""
    x, y, drawn = float(_MARGIN), float(_MARGIN), []
    gap = font.getlength(separator) if separator else 0.0
    for token in frame:
        text = MARKS.get(token.event, "") + token.text
        width, padding = font.getlength(text), _PADDING if token.event in COLOURS else 0
        if x + width + 2 * padding > _WIDTH - _MARGIN:
            x, y = float(_MARGIN), y + 1.6 * _FONT_SIZE
        drawn.append((x + padding, y, text, token.event))
        x += width + 2 * padding + gap
    return drawn
