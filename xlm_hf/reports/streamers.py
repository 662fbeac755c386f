"""Watching a batch being decoded: live in a terminal, or recorded for a page or a film.

Both read the log of edits that `generate` keeps (`xlm_hf.modules.edits`). They follow the protocol of transformers'
`TextDiffusionStreamer`: `put` the prompts, `put_draft` after every step, `put` the result, `end`. A streamer with
`takes_edits` also gets a draft before the first step, and with every later one the events of the step. A model that
writes from left to right puts one token a row instead.
"""

import itertools
import shutil
import sys
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from xlm_hf.modules.edits import EDIT_KINDS
from xlm_hf.tasks.tokenizers import joining_blank

# Stands before the text of a token that a step changed. What it unmasked needs none: nothing else stood as a mask.
MARKS = {"insert": "+", "delete": "-", "substitute": "~", "unmask": "", "remask": ""}
MASK = "░"
# Neither may move the cursor of a terminal.
_VISIBLE = {**dict.fromkeys([*range(32), *range(127, 160)], "\ufffd"), ord("\n"): "↵", ord("\t"): "⇥"}


@dataclass(frozen=True)
class Token:
    """One token of a sequence after a step.

    Attributes:
        text: the token, decoded by itself; `MASK` where nothing is written yet.
        event: what the step did here, one of `EDIT_KINDS`; "" for nothing. What belongs to the prompt is "prompt" in
            every step. What a step deleted is still there after it, as "delete", and gone after the next one.
    """

    text: str
    event: str = ""


# A position of the sequence, deleted tokens not counted, and the token that an event leaves there.
Edit = tuple[int, Token]
Event = tuple[str, int, int]  # the same as ids: kind, position, token


@dataclass(frozen=True)
class Decode:
    """How a row was decoded.

    Attributes:
        start: the sequence before the first step, prompt included.
        steps: the events of every step of the batch, in the order of the log; none where the row stood still.
    """

    start: list[Token]
    steps: list[list[Edit]]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Decode":
        """The decode whose `dataclasses.asdict` this is, from JSON too."""
        steps = [[(position, Token(**token)) for position, token in edits] for edits in saved["steps"]]
        return cls([Token(**token) for token in saved["start"]], steps)

    def frames(self) -> list[list[Token]]:
        """The sequence at the start and after every step."""
        return list(itertools.accumulate(self.steps, after_step, initial=self.start))


def after_step(tokens: list[Token], edits: list[Edit]) -> list[Token]:
    """The sequence after a step, from the sequence before it and the events of the step."""
    tokens = [t if t.event in ("", "prompt") else Token(t.text) for t in tokens if t.event != "delete"]
    for position, token in edits:
        kept = [index for index, old in enumerate(tokens) if old.event != "delete"]
        index = kept[position] if position < len(kept) else len(tokens)
        if token.event == "insert":
            tokens.insert(index, token)
        elif position < len(kept):
            tokens[index] = token
        else:
            # Behind the padding of a canvas, which is not shown.
            tokens += [Token("")] * (position - len(kept)) + [token]
    return tokens


class DraftRecorder(BaseStreamer):
    """Keeps how every row was decoded.

    Args:
        tokenizer: decodes the tokens, and names the mask and padding tokens.

    Attributes:
        separator: stands between the texts of two tokens: a space for vocabularies of words, nothing for the others.
        decodes: one for each row.
    """

    takes_edits = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        token = min(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        self._blank = joining_blank(tokenizer)
        is_joined = tokenizer.decode([token, token]) == 2 * tokenizer.decode([token])
        self.separator = "" if is_joined and not self._blank else " "
        self.decodes: list[Decode] = []
        self._prompts: torch.Tensor | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts (B, P), one more token or padding for every row (B,), or the result (B, W)."""
        if self._prompts is None:
            self._prompts = value
            self.decodes = [Decode(self._prompt(row), []) for row in value.tolist()]
        elif value.dim() == 1:
            ends = [len(decode.start) + len(decode.steps) for decode in self.decodes]
            written = zip(ends, value.tolist(), strict=True)
            self._take([[("insert", end, token)] * (token != self.tokenizer.pad_token_id) for end, token in written])

    def put_draft(self, value: torch.Tensor, edits: torch.Tensor | None = None, **_) -> None:
        """Take what stands after the prompts (B, W), or the whole rows, before the first step and after every step.

        Args:
            value: (B, W) ids, padded on the right.
            edits: (N, 5) the events of the step as in the log: row, step, kind, position, token. None before the first.
        """
        if edits is not None:
            events: list[list[Event]] = [[] for _ in value]
            for row, _, kind, position, token in edits.tolist():
                events[row].append((EDIT_KINDS[kind], position, token))
            self._take(events)
        elif self._prompts is not None and not torch.equal(value, self._prompts):
            for decode, row in zip(self.decodes, value.tolist(), strict=True):
                decode.start.extend(self._token(token, "") for token in self._without_padding(row[::-1])[::-1])

    def end(self) -> None:
        """Nothing is left to do."""

    def _take(self, events: list[list[Event]]) -> None:
        """Add a step to the decodes."""
        for decode, edits in zip(self.decodes, events, strict=True):
            decode.steps.append([(position, self._token(token, kind)) for kind, position, token in edits])

    def _prompt(self, row: list[int]) -> list[Token]:
        # Some vocabularies have one id for everything special, but the last token of a prompt is never padding.
        tokens = self._without_padding(row[:-1]) + row[-1:]
        return [self._token(token, "" if token == self.tokenizer.mask_token_id else "prompt") for token in tokens]

    def _without_padding(self, row: list[int]) -> list[int]:
        return list(itertools.dropwhile(lambda token: token == self.tokenizer.pad_token_id, row))

    def _token(self, token: int, event: str) -> Token:
        is_mask = token == self.tokenizer.mask_token_id
        text = str(self.tokenizer.decode([token])).removeprefix(self._blank)
        return Token(MASK if is_mask else text.translate(_VISIBLE), event)


# Each with an attribute of its own beside the colour: underlined, struck through, reversed, bold; a mask shows as one.
_STYLES = {
    "": "0",
    "prompt": "2",
    "insert": "4;32",
    "delete": "9;31",
    "substitute": "7;33",
    "unmask": "1;34",
    "remask": "1;35",
}


class BatchDiffusionStreamer(DraftRecorder):
    """Shows the rows of a batch while they are decoded, rewritten in place after every step.

    transformers' `TextDiffusionStreamer` does this for one row. What the last step inserted is underlined and green,
    what it deleted struck through and red, what it substituted reversed and yellow, what it unmasked bold and blue.
    What it masked again is a magenta mask, and the prompt is dim. As many rows are shown as the terminal holds.

    Args:
        tokenizer: decodes the tokens.
        output: the terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO | None = None):
        super().__init__(tokenizer)
        self.output = output or sys.stdout
        self._height = 0
        self._frames: list[list[Token]] = []

    def _take(self, events: list[list[Event]]) -> None:
        """Add a step to the decodes and draw the rows after it."""
        super()._take(events)
        before = self._frames or [decode.start for decode in self.decodes]
        self._frames = [after_step(frame, decode.steps[-1]) for frame, decode in zip(before, self.decodes, strict=True)]
        columns, lines_left = shutil.get_terminal_size()
        text = f"\033[{self._height}A\r\033[J" if self._height else ""
        self._height = 0
        for frame in self._frames:
            height = len(self.separator.join(token.text for token in frame)) // columns + 1
            if self._height + height >= lines_left:
                break
            text += self.separator.join(f"\033[{_STYLES[token.event]}m{token.text}\033[0m" for token in frame) + "\n"
            self._height += height
        self.output.write(text)
        self.output.flush()
