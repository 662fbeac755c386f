"""A decode as a self-contained page and as a film, with insertions, unmaskings and remaskings told apart."""

import html
import json
from collections.abc import Sequence
from dataclasses import astuple
from importlib import resources
from pathlib import Path

from xlm_hf.files import INCOMPLETE_SUFFIX
from xlm_hf.reports.streamers import Place

Frames = Sequence[Sequence[Place]]

_COLOURS = {
    "": "#1f2328",
    "prompt": "#8c959f",
    "inserted": "#1a7f37",
    "unmasked": "#0969da",
    "remasked": "#cf222e",
    "replaced": "#8250df",
}
_FONT_SIZE, _WIDTH, _MARGIN = 20, 960, 24
_MOST_FRAMES = 200


def history_html(rows: Sequence[Frames], separator: str = " ", title: str = "Decode history") -> str:
    """A page that needs nothing else: the rows side by side, a slider over the steps, and a button that plays them.

    Args:
        rows: of each row its frames, as `DraftRecorder.frames` gives them.
        separator: between the texts of two tokens.
        title: of the page.
    """
    data = {"separator": separator, "rows": [[[astuple(place) for place in frame] for frame in row] for row in rows]}
    # Within a script element only "</" could end it early.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = (resources.files("xlm_hf.reports") / "decode_page.html").read_text(encoding="utf-8")
    return page.replace("TITLE", html.escape(title)).replace("ROWS", text)


def save_gif(frames: Frames, file: Path, separator: str = " ", seconds: float = 8.0) -> None:
    """Draw the frames of one row as an animated GIF that lasts `seconds` and rests on its last frame.

    Of more than 200 frames an evenly spaced choice is drawn.

    Raises:
        ImportError: if Pillow is not installed.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    step = max(1, len(frames) / _MOST_FRAMES)
    chosen = [frames[min(int(i * step), len(frames) - 1)] for i in range(min(len(frames), _MOST_FRAMES) - 1)]
    layouts = [_layout(frame, font, separator) for frame in [*chosen, frames[-1]]]
    height = int(max(y for layout in layouts for _, y, _, _ in layout)) + 2 * _FONT_SIZE + _MARGIN
    images = []
    for layout in layouts:
        image = Image.new("RGB", (_WIDTH, height), "white")
        draw = ImageDraw.Draw(image)
        for x, y, text, place in layout:
            colour = _COLOURS[place.event]
            if place.event not in ("", "prompt"):
                box = draw.textbbox((x, y), text, font=font)
                draw.rounded_rectangle((box[0] - 3, y - 2, box[2] + 3, y + _FONT_SIZE + 5), 4, fill=colour)
                colour = "white"
            draw.text((x, y), text, fill=colour, font=font)
        images.append(image)
    durations = [max(30, round(1000 * seconds / len(images)))] * (len(images) - 1) + [2500]
    staging = file.with_name(file.name + INCOMPLETE_SUFFIX)
    images[0].save(staging, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    staging.replace(file)


def _layout(frame: Sequence[Place], font, separator: str) -> list[tuple[float, float, str, Place]]:
    """Where each token is drawn: (x, y, text, place), wrapped at the width of the film."""
    x, y, drawn = float(_MARGIN), float(_MARGIN), []
    gap = font.getlength(separator) if separator else 0.0
    for place in frame:
        text = "_" if place.is_mask else place.text
        width = font.getlength(text)
        if x + width > _WIDTH - _MARGIN:
            x, y = float(_MARGIN), y + 1.6 * _FONT_SIZE
        drawn.append((x, y, text, place))
        x += width + gap + (6 if separator else 0)
    return drawn
