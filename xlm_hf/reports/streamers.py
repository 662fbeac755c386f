"""Watching a batch being decoded: live in a terminal, or recorded for a page or a film.

Both follow the protocol of transformers' `TextDiffusionStreamer`: `put` the prompts, `put_draft` what stands after them
after every step, `put` the result, `end`. A model that writes from left to right puts one token a row instead.
"""

import itertools
import shutil
import sys
import time
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

Event = Literal["", "prompt", "inserted", "unmasked", "remasked", "replaced"]


@dataclass(frozen=True)
class Place:
    """One place of a sequence after a step.

    Attributes:
        text: the token, decoded by itself.
        event: what the step did here: "inserted" (the sequence grew), "unmasked", "remasked", "replaced", or "" for
            nothing; what belongs to the prompt is "prompt" in every step.
        is_mask: whether nothing is written here yet.
    """

    text: str
    event: Event
    is_mask: bool


class DraftRecorder(BaseStreamer):
    """Keeps every draft of every row.

    Args:
        tokenizer: decodes the tokens, and names the mask and padding tokens.

    Attributes:
        separator: stands between the texts of two tokens: a space for vocabularies of words, nothing for the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        token = min(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        self.separator = "" if tokenizer.decode([token, token]) == 2 * tokenizer.decode([token]) else " "
        self._prompts: torch.Tensor | None = None
        self._drafts: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts (B, P), one more token for every row (B,), or the result (B, W)."""
        if self._prompts is None:
            self._prompts = value
        elif value.dim() == 1:
            written = self._drafts[-1] if self._drafts else value.new_zeros(len(value), 0)
            self.put_draft(torch.cat((written, value[:, None]), dim=1))
        elif not self._drafts or not torch.equal(self._drafts[-1], value):
            self.put_draft(value)

    def put_draft(self, value: torch.Tensor, **_) -> None:
        """Take what stands after the prompts (B, W) after a step, or the whole rows where the prompts had blanks."""
        # A canvas is written in place.
        self._drafts.append(value.clone())

    def end(self) -> None:
        """Nothing is left to do."""

    def frames(self, row: int) -> list[list[Place]]:
        """The sequence of a row, prompt included, at the start and after every step that changed it."""
        drafts = [self._content(draft[row]) for draft in self._drafts]
        states = [self._start(row, drafts), *drafts]
        changes = [pair for pair in itertools.pairwise(states) if pair[0] != pair[1]]
        return [self._frame(row, before, after) for before, after in [(states[0], states[0]), *changes]]

    def _start(self, row: int, drafts: list[list[int]]) -> list[int]:
        if self._has_blanks(row):
            return self._prompt(row)
        mask = self.tokenizer.mask_token_id
        # Whoever writes over masks had a canvas full of them at the start; the others began with nothing.
        return [mask] * len(drafts[0]) if any(mask in draft for draft in drafts) else []

    def _frame(self, row: int, before: list[int], after: list[int]) -> list[Place]:
        prompt = [] if self._has_blanks(row) else self._prompt(row)
        changes = [self._place(old, new) for old, new in _aligned(before, after)]
        return [Place(self._text(token), "prompt", False) for token in prompt] + changes

    def _place(self, old: int | None, new: int) -> Place:
        mask = self.tokenizer.mask_token_id
        of_masks: Event = "unmasked" if old == mask else "remasked" if new == mask else "replaced"
        event: Event = "" if old == new else "inserted" if old is None else of_masks
        return Place(self._text(new), event, new == mask)

    def _has_blanks(self, row: int) -> bool:
        return self.tokenizer.mask_token_id in self._prompt(row)

    def _prompt(self, row: int) -> list[int]:
        return [] if self._prompts is None else self._content(self._prompts[row])

    def _content(self, ids: torch.Tensor) -> list[int]:
        return [token for token in ids.tolist() if token != self.tokenizer.pad_token_id]

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _aligned(before: list[int], after: list[int]) -> list[tuple[int | None, int]]:
    """What stood before in each place of `after`, None for nothing: by place in a canvas, else by an alignment."""
    if len(before) == len(after):
        return list(zip(before, after, strict=True))
    pairs: list[tuple[int | None, int]] = []
    for _, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old = [*before[i:j], *[None] * (m - k)]
        pairs += zip(old, after[k:m], strict=False)
    return pairs


_STYLES = {"": "0", "prompt": "2", "inserted": "1;32", "unmasked": "1;34", "remasked": "1;31", "replaced": "1;35"}


class BatchDiffusionStreamer(DraftRecorder):
    """Shows the rows of a batch while they are decoded, rewritten in place after every step.

    transformers' `TextDiffusionStreamer` does this for one row. What the last step inserted is green, what it unmasked
    blue, what it masked again red, and the prompt dim. As many rows are shown as the terminal holds.

    Args:
        tokenizer: decodes the tokens.
        sleep_time: seconds to wait after each step.
        output: the terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sleep_time: float = 0.0, output: TextIO | None = None):
        super().__init__(tokenizer)
        self.sleep_time, self.output = sleep_time, output or sys.stdout
        self._height = 0

    def put_draft(self, value: torch.Tensor, **_) -> None:
        """Draw what stands after the prompts (B, W) after a step."""
        before = self._drafts[-1:]
        super().put_draft(value)
        columns, lines_left = shutil.get_terminal_size()
        text = f"\033[{self._height}A\r\033[J" if self._height else ""
        self._height = 0
        for row in range(len(value)):
            after = self._content(value[row])
            places = self._frame(row, self._content(before[0][row]) if before else self._start(row, [after]), after)
            shown = [("░" if place.is_mask else place.text, place.event) for place in places]
            height = len(self.separator.join(word for word, _ in shown)) // columns + 1
            if self._height + height >= lines_left:
                break
            text += self.separator.join(f"\033[{_STYLES[event]}m{word}\033[0m" for word, event in shown) + "\n"
            self._height += height
        self.output.write(text)
        self.output.flush()
        time.sleep(self.sleep_time)
