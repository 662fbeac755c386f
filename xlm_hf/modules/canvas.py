"""The canvas of masked language models: rows of masks after each prompt, and how far they are written.

A canvas has a length of its own for each row. What counts as written ends with the first end-of-sequence token: a
position behind it is never written, and the row is finished when nothing before it is masked.
"""

import torch

from .edits import REMASK, SUBSTITUTE, UNMASK, EditLog
from .generation_output import NonAutoregressiveGenerationOutput


class MaskedCanvas:
    """The rows being written: prompts, padded on the left, and a canvas of mask tokens after each, padded on the right.

    A mask token inside a prompt is filled like the canvas is.

    Args:
        prompt: (B, P) ids, padded on the left.
        prompt_mask: (B, P) bool, True for tokens.
        lengths: (B,) mask tokens to append to each prompt.
        mask_token_id: stands for what is not written yet.
        pad_token_id: fills ragged rows.
        eos_token_id: ends what is written in a canvas; None if nothing does.
        log: notes every edit; None keeps none.

    Attributes:
        ids: (B, L) int64, the rows as the model sees them.
        attention_mask: (B, L) bool, True for everything but the padding of ragged rows.
        masked: (B, L) bool, what is still to be written; a position behind an end-of-sequence token no longer is.
        positions: (B, L) int64, the position of each token in its own row.
        nfe: (B,) int64, calls of the model that each row took part in.
        passes_per_call: forward passes of each of them.
        stopped: (B,) bool, rows that a criterion ended as they stand.
        is_padded: whether the attention mask says anything.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        prompt_mask: torch.Tensor,
        lengths: torch.Tensor,
        mask_token_id: int,
        pad_token_id: int,
        eos_token_id: int | None,
        log: EditLog | None = None,
    ):
        self.prompt_width, self.pad_token_id, self.eos_token_id = prompt.shape[1], pad_token_id, eos_token_id
        appended = torch.arange(int(lengths.max()), device=prompt.device) < lengths[:, None]
        canvas = torch.full(appended.shape, pad_token_id, device=prompt.device).masked_fill(appended, mask_token_id)
        self.ids = torch.cat((prompt, canvas), dim=1)
        self.attention_mask = torch.cat((prompt_mask, appended), dim=1)
        self.masked = (self.ids == mask_token_id) & self.attention_mask
        self.positions = (self.attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        self.nfe, self.passes_per_call = torch.zeros_like(lengths), 1
        self.is_padded = not bool(self.attention_mask.all())
        self.stopped = torch.zeros_like(lengths, dtype=torch.bool)
        self.mask_token_id, self.log = mask_token_id, log
        self._steps, self._logged = torch.full_like(self.ids, -1), self.ids.clone()

    def commit(self, rows: torch.Tensor, chosen: torch.Tensor, tokens: torch.Tensor, step: int | torch.Tensor) -> None:
        """Write `tokens`, in reading order, where `chosen` (R, L) in the rows of indices `rows` (R,).

        There may be more tokens than positions. `step` is what the history says of them: a number, or (R, 1).
        """
        self.ids[rows] = self.ids[rows].masked_scatter(chosen, tokens)
        self._steps[rows] = torch.where(chosen, step, self._steps[rows])
        self.masked[rows] &= ~chosen
        if self.eos_token_id is not None:
            self.masked &= ~self._behind_eos()

    def hold(self, texts: torch.Tensor, lengths: torch.Tensor) -> None:
        """Let canvases begin with texts of `lengths` (B,), given one after the other (S,), and hold padding behind.

        A row whose text has the length 0 stays as it is.
        """
        columns = torch.arange(self.ids.shape[1], device=self.ids.device) - self.prompt_width
        is_held = self.masked & (columns >= 0) & (lengths > 0)[:, None]
        self.ids[is_held & (columns < lengths[:, None])] = texts
        self.ids.masked_fill_(is_held & (columns >= lengths[:, None]), self.pad_token_id)
        self._logged = self.ids.clone()

    def rewrite(self, rows: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor) -> None:
        """Let the rows of indices `rows` (R,) read `ids` (R, L); the history says `steps` (R, 1) of what changes."""
        self._steps[rows] = torch.where(ids != self.ids[rows], steps, self._steps[rows])
        self.ids[rows] = ids

    def note(self, steps: torch.Tensor) -> None:
        """Add what has changed since the last call to the log, with the number (B,) of each row's step."""
        if self.log is None:
            return
        before, after = self._logged, self.ids.clone()
        of_masks = torch.where(before == self.mask_token_id, UNMASK, SUBSTITUTE)
        kinds = torch.where(after == self.mask_token_id, REMASK, of_masks)
        rows = torch.arange(len(after), device=after.device)[:, None]
        where = {"row": rows, "step": steps[:, None].clone(), "position": self.positions}
        self.log.add(kinds, before != after, token=after, **where)
        self._logged = after

    @property
    def prompt(self) -> torch.Tensor:
        """The prompts (B, P)."""
        return self.ids[:, : self.prompt_width]

    def written(self) -> torch.Tensor:
        """What stands after the prompts, mask tokens included; the whole rows where nothing was appended to any."""
        return self.ids[:, self.prompt_width :] if self.ids.shape[1] > self.prompt_width else self.ids

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """Gather the result of `generate`: rows end with their end-of-sequence token, the rest is padding."""
        behind_eos = self._behind_eos()
        kept = self.attention_mask & ~behind_eos
        # Columns of padding alone are left out at the end.
        numbers = torch.arange(1, kept.shape[1] + 1, device=kept.device)
        width = max(self.prompt_width, int((kept.any(dim=0) * numbers).max()))
        history = self._steps.masked_fill(~kept, -1)[:, :width]
        nfe = self.nfe * self.passes_per_call
        stopped = self._is_eos().any(dim=-1) | self.stopped
        sequences = self.ids.masked_fill(behind_eos, self.pad_token_id)[:, :width]
        return NonAutoregressiveGenerationOutput.of_rows(sequences, history, nfe, stopped, return_history)

    def _is_eos(self) -> torch.Tensor:
        if self.eos_token_id is None:
            return torch.zeros_like(self.masked)
        in_canvas = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.prompt_width
        return (self.ids == self.eos_token_id) & in_canvas & self.attention_mask

    def _behind_eos(self) -> torch.Tensor:
        is_eos = self._is_eos().long()
        return is_eos.cumsum(dim=-1) - is_eos > 0
