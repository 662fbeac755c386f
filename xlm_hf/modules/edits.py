"""Sequences that grow and change while they are written, and the log of every edit.

An `EditBuffer` holds the tokens after the prompts of a batch. A step may insert several tokens into a gap, delete and
substitute, in all rows at once. Cumulative sums give the new position of each token, so the host reads nothing from the
device.
"""

from dataclasses import InitVar, dataclass
from typing import Any

import torch

from .devices import rounded_up, shape_of_call, true_indices
from .generation_output import NonAutoregressiveGenerationOutput

EDIT_KINDS = ("insert", "delete", "substitute", "unmask", "remask")
INSERT, DELETE, SUBSTITUTE, UNMASK, REMASK = range(5)


class EditLog:
    """Every edit of a decode.

    An edit is (row, step, kind, position, token). `kind` is an index into `EDIT_KINDS`. `position` counts the row's own
    tokens, prompt included and padding left out. `token` is the new one, or the deleted one.

    A row begins as its prompt, with a canvas of masks if it has one. Its edits, applied in their order, replay the
    decode. Within a step, edits that change a token in place come first, then deletions from the right, then insertions
    from the left, each at its final position.
    """

    def __init__(self) -> None:
        self._records: list[tuple[Any, ...]] = []
        self._num_read = 0

    def add(self, kind: Any, exists: torch.Tensor, **fields: torch.Tensor) -> None:
        """Note edits where `exists` (R, X); `kind` and the fields row, step, position, token broadcast with it.

        The tensors are kept as they are: hand over none that will be written to.
        """
        named = (fields["row"], fields["step"], torch.as_tensor(kind), fields["position"], fields["token"])
        self._records.append((exists, *named))

    def latest(self) -> torch.Tensor:
        """The edits (N, 5) noted since this was called last."""
        latest, self._num_read = self._records[self._num_read :], len(self._records)
        return _gathered(latest)

    def events(self) -> torch.Tensor:
        """All edits (N, 5) int64, row after row."""
        events = _gathered(self._records)
        return events[events[:, 0].argsort(stable=True)]

    def keep(self, rows: torch.Tensor) -> None:
        """Leave the edits of `rows` (R,), which become rows 0 to R - 1."""
        events = self.events()
        is_kept = events[:, :1] == rows.to(events.device)
        row, (step, kind, position, token) = is_kept.long().argmax(dim=1), events.T[1:]
        self._records.clear()
        self.add(kind, is_kept.any(dim=1), row=row, step=step, position=position, token=token)


def _gathered(records: list[tuple[Any, ...]]) -> torch.Tensor:
    edits = [torch.zeros(0, 5, dtype=torch.int64)]
    for exists, *fields in records:
        index = exists.nonzero(as_tuple=True)
        columns = [field.to(exists.device).expand(exists.shape)[index] for field in fields]
        edits.append(torch.stack([column.long() for column in columns], dim=-1))
    return torch.cat([edit.to(edits[-1].device) for edit in edits])


def slots_of_counts(counts: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots (B, num) of single insertions, in reading order, for `counts` (B, S) insertions into each slot.

    Returns:
        the slots, and which of them exist; insertions beyond `num` are left out.
    """
    ends, numbers = counts.cumsum(dim=-1), torch.arange(num, device=counts.device).expand(len(counts), num)
    slots = torch.searchsorted(ends, numbers.contiguous(), right=True)
    return slots.clamp(max=counts.shape[1] - 1), numbers < ends[:, -1:]


@dataclass(eq=False)
class EditBuffer:
    """What stands after the prompts of a batch, and which rows are still being written.

    Slot i of a row is the gap left of its i-th token (from 0), and slot n, for a row of n tokens, the end.

    Args:
        prompt: (B, P) ids, padded on the left; never changed.
        prompt_mask: (B, P) bool, True for tokens.
        capacity: (B,) most tokens of each row after its prompt.
        pad_token_id: fills ragged rows.
        log: notes every edit; None keeps none.
        start: (B, N) ids that stand after the prompts at first, padded on the right; None for nothing.
        start_lengths: (B,) how many of them.
        mask_token_id: a mask, whose substitution the log calls "unmask"; None where there is none.

    Raises:
        ValueError: if what stands there at first exceeds the capacity.

    Attributes:
        tokens: (B, W) int64, what stands after the prompts.
        steps: (B, W) int64, the step that wrote each token; -1 for those of `start` and for padding.
        extra: further (B, W) tensors by name, whose entries move with their tokens; an inserted token has 0.
        lengths: (B,) tokens of each row.
        nfe: (B,) int64, forward passes that each row took part in.
        finished: (B,) bool, rows that are done.
        stopped: (B,) bool, those of them that ended by themselves, with capacity left.
    """

    prompt: torch.Tensor
    prompt_mask: torch.Tensor
    capacity: torch.Tensor
    pad_token_id: int
    log: EditLog | None = None
    start: InitVar[torch.Tensor | None] = None
    start_lengths: InitVar[torch.Tensor | None] = None
    mask_token_id: int | None = None

    def __post_init__(self, start: torch.Tensor | None, start_lengths: torch.Tensor | None):
        B, device, self.width = len(self.prompt), self.prompt.device, int(self.capacity.max())
        self.prompt_lengths = self.prompt_mask.sum(dim=-1)
        self.tokens = torch.full((B, self.width), self.pad_token_id, device=device)
        self.steps = torch.full((B, self.width), -1, device=device)
        self.extra: dict[str, torch.Tensor] = {}
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        if start is not None and start_lengths is not None:
            if bool((start_lengths > self.capacity).any()):
                longest, capacity = int(start_lengths.max()), int(self.capacity.min())
                found = f"begins with {longest} tokens and has {capacity} positions for them"
                raise ValueError(f"A text {found}: raise max_new_tokens, or max_position_embeddings of the model.")
            self.tokens[:, : start.shape[1]], self.lengths = start, start_lengths
        self.nfe = torch.zeros(B, dtype=torch.int64, device=device)
        self.finished, self.stopped = (torch.zeros(B, dtype=torch.bool, device=device) for _ in range(2))

    def shape_of_step(self, *others: torch.Tensor) -> tuple[torch.Tensor, int, int, list[int]]:
        """The open rows, their slots in all, the longest of them and `others`, by one reading (`shape_of_call`)."""
        is_open, device = ~self.finished, self.finished.device
        slots = torch.arange(self.width + 1, device=device) <= self.lengths[:, None]
        longest = (self.lengths * is_open).max()
        rows, num_slots, (width, *read) = shape_of_call(is_open, slots & is_open[:, None], longest, *others)
        width = rounded_up(width, self.width, device)
        # No more than the rows have in so many columns.
        return rows, min(num_slots, len(rows) * (width + 1)), width, read

    def view(self, rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and mask of `rows` up to `width` columns behind the prompt, and (R, width + 1) where they have slots."""
        columns = torch.arange(width + 1, device=rows.device)
        sequences = torch.cat((self.prompt[rows], self.tokens[rows, :width]), dim=1)
        mask = torch.cat((self.prompt_mask[rows], columns[:-1] < self.lengths[rows, None]), dim=1)
        return sequences, mask, (columns <= self.lengths[rows, None]) & ~self.finished[rows, None]

    def slots(self, exists: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the slots of a `view` are: slot i of a row is scored at the token left of it.

        Args:
            exists: (R, W + 1) bool, of `view`.
            num_slots: of `shape_of_step`.

        Returns:
            indices (S,) of those tokens in the flattened ids; and (R, W + 1), which of the S each slot is, -1 where
            there is none.
        """
        ahead = self.prompt.shape[1] - 1
        index = true_indices(torch.nn.functional.pad(exists, (ahead, 0)), num_slots)
        return index, (exists.flatten().cumsum(dim=0) - 1).view_as(exists).masked_fill(~exists, -1)

    def written(self) -> torch.Tensor:
        """What stands after the prompts so far, (B, longest), padded on the right."""
        return self.tokens[:, : int(self.lengths.max())]

    def whole(self) -> torch.Tensor:
        """The rows so far, prompts included."""
        return torch.cat((self.prompt, self.written()), dim=1)

    def finish(self, rows: torch.Tensor, ended: torch.Tensor) -> None:
        """End those of `rows` (R,) that have `ended` (R,) and are open: by themselves, or by their length if full."""
        ended = ended & ~self.finished[rows]
        self.finished[rows] |= ended
        self.stopped[rows] |= ended & (self.lengths < self.capacity)[rows]

    def apply(
        self,
        rows: torch.Tensor,
        step: int,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        inserted: torch.Tensor,
        deleted: torch.Tensor | None = None,
        substitutes: torch.Tensor | None = None,
    ) -> None:
        """Delete, substitute and insert in the open ones of `rows` (R,), all by the positions before the step.

        Insertions that exceed a row's capacity, in reading order and after the deletions, are left out. A step that
        neither deletes nor substitutes ends the rows that are full after it, by their length. With `deleted` or
        `substitutes` a full row stays open, since it may still change.

        Args:
            rows: indices of rows.
            step: what the history says of new tokens.
            slots: (R, K) of the insertions; those into one slot stand there in the order in which they are given.
            tokens: (R, K) their tokens.
            inserted: (R, K) bool, which of them are to be made.
            deleted: (R, W) bool, tokens to be deleted; what is inserted beside a deleted token stays.
            substitutes: (R, W) the new id of a token, or a negative number to leave it.
        """
        W, columns = self.width, torch.arange(self.width, device=rows.device)
        is_open = ~self.finished[rows, None]
        kept = present = columns < self.lengths[rows, None]
        if deleted is not None:
            kept = present & ~(deleted & is_open)
        if substitutes is not None:
            changed = kept & (substitutes >= 0) & is_open
            kind: Any = SUBSTITUTE
            if self.mask_token_id is not None:
                kind = torch.where(self.tokens[rows] == self.mask_token_id, UNMASK, SUBSTITUTE)
            self._note(kind, rows, step, columns, substitutes, changed)
            self.tokens[rows] = torch.where(changed, substitutes, self.tokens[rows])
            self.steps[rows] = torch.where(changed, step, self.steps[rows])
        if deleted is not None:
            gone = (present & ~kept).flip(1)
            self._note(DELETE, rows, step, columns.flip(0), self.tokens[rows].flip(1), gone)
        kept_before = torch.nn.functional.pad(kept.cumsum(dim=-1), (1, 0))
        # In reading order: the slot, and in one slot the order in which they are given.
        slots = torch.where(inserted & is_open, slots, W + 1)
        order = slots.argsort(dim=-1, stable=True)
        slots, tokens = slots.gather(1, order), tokens.gather(1, order)
        free = self.capacity[rows, None] - kept_before[:, -1:]
        fits = (slots <= W) & (torch.arange(slots.shape[1], device=rows.device) < free)
        target = kept_before.gather(1, slots.clamp(max=W)) + torch.arange(slots.shape[1], device=rows.device)
        added = torch.zeros_like(kept_before).scatter_add_(1, slots.clamp(max=W), fits.long()).cumsum(dim=-1)
        # One spare column takes what is deleted or left out.
        moved = torch.where(kept, kept_before[:, :-1] + added[:, :-1], W)
        target = torch.where(fits, target, W)
        for buffer, values, empty in self._columns(tokens, step):
            new = torch.full((len(rows), W + 1), empty, dtype=buffer.dtype, device=buffer.device)
            buffer[rows] = new.scatter_(1, moved, buffer[rows]).scatter_(1, target, values)[:, :W]
        self.lengths[rows] = kept_before[:, -1] + added[:, -1]
        self._note(INSERT, rows, step, target, tokens, fits)
        if deleted is None and substitutes is None:
            self.finished[rows] |= (self.lengths == self.capacity)[rows]

    def _columns(self, tokens: torch.Tensor, step: int):
        """Each (B, W) tensor, what inserted `tokens` have in it, and what stands where nothing is."""
        yield self.tokens, tokens, self.pad_token_id
        yield self.steps, torch.full_like(tokens, step), -1
        for buffer in self.extra.values():
            yield buffer, torch.zeros_like(tokens, dtype=buffer.dtype), 0

    def _note(self, kind: Any, rows, step: int, positions, tokens, exists) -> None:
        if self.log is not None:
            fields = {"row": rows[:, None], "step": torch.tensor(step), "token": tokens}
            self.log.add(kind, exists, position=self.prompt_lengths[rows, None] + positions, **fields)

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """Gather the result of `generate`."""
        width = int(self.lengths.max())
        sequences = torch.cat((self.prompt, self.tokens[:, :width]), dim=1)
        history = torch.cat((torch.full_like(self.prompt, -1), self.steps[:, :width]), dim=1)
        return NonAutoregressiveGenerationOutput.of_rows(sequences, history, self.nfe, self.stopped, return_history)
