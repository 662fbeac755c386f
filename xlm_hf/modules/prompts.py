"""Prompts of `generate`: as tensors, checked, with their special tokens, and their padding on the left."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def left_align_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of every row to its left and drop columns that hold nothing but padding.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens; the tokens of a row keep their order.

    Returns:
        the moved ids and mask, (B, longest row), the mask as bool.

    Raises:
        ValueError: for a batch without rows, or a mask of another shape.
    """
    if len(input_ids) == 0:
        raise ValueError("input_ids has 0 rows and needs at least 1: pass a prompt, or None for an empty one.")
    mask_shape, shape = tuple(attention_mask.shape), tuple(input_ids.shape)
    if mask_shape != shape:
        raise ValueError(f"attention_mask has the shape {mask_shape} and input_ids {shape}: make them alike.")
    order = attention_mask.bool().int().argsort(dim=-1, stable=True)
    longest = int(attention_mask.bool().sum(dim=-1).max())
    order = order[:, order.shape[1] - longest :]
    return input_ids.gather(-1, order), attention_mask.bool().gather(-1, order)


class PromptsMixin:
    """What a model does with the prompts of a call."""

    config: Any
    device: Any

    def prompt_tensors(self, input_ids, attention_mask, inputs=None, num_samples=None) -> tuple[torch.Tensor, Any]:
        """Prompts and their mask as tensors.

        Args:
            input_ids (torch.Tensor | list): (B, P); or ids, or lists of ids of any lengths; None is one empty prompt.
            attention_mask (torch.Tensor | list): of the same kind; None leaves it to `aligned_prompts`.
            inputs (torch.Tensor | list): another name of `input_ids`.
            num_samples (int): as many empty prompts instead.

        Raises:
            ValueError: if prompts are given twice.
        """
        if (input_ids is not None) + (inputs is not None) + (num_samples is not None) > 1:
            raise ValueError(
                "Give one of input_ids, inputs and num_samples: num_return_sequences writes several texts for each."
            )
        prompts = input_ids if inputs is None else inputs
        if prompts is None:
            return torch.zeros((num_samples or 1, 0), dtype=torch.int64, device=self.device), None
        if isinstance(prompts, Sequence):
            rows = prompts if prompts and not isinstance(prompts[0], Integral) else [prompts]
            seen = [[1] * len(row) for row in rows] if attention_mask is None else attention_mask
            seen = seen if rows is prompts or attention_mask is None else [seen]
            return self._padded(rows), self._padded(seen)
        ids = torch.as_tensor(prompts, device=getattr(prompts, "device", self.device))
        if ids.ndim == 1:
            return ids[None], attention_mask if attention_mask is None else attention_mask[None]
        return ids, attention_mask

    def _padded(self, rows: Any) -> torch.Tensor:
        """Lists of integers as one tensor, with zeros on their left."""
        tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_side="left").to(self.device)

    def aligned_prompts(self, input_ids: Any, attention_mask: Any, empty: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts (B, P) and their mask (bool) with the padding on the left.

        Args:
            input_ids: (B, P), padded on either side; those of width 0 read `empty`.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            empty: ids of an empty prompt.

        Raises:
            ValueError: for an id outside the vocabulary, or a batch without rows.
        """
        if input_ids.shape[1] == 0:
            input_ids = torch.tensor([list(empty)] * len(input_ids), dtype=torch.int64, device=self.device)
            # Some vocabularies have one id for everything special.
            attention_mask = torch.ones_like(input_ids)
        self.check_token_ids(input_ids)
        mask = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask.bool()
        return left_align_padding(input_ids, mask)

    def completed_prompts(self, input_ids, attention_mask, first, last, rows=None) -> tuple[torch.Tensor, torch.Tensor]:
        """`aligned_prompts` in the layout `first prompt last`, of special tokens that a bare prompt gets here.

        The beginning of a plain text reads `first last beginning` instead, and is complete too.

        Args:
            input_ids (torch.Tensor): (B, P), padded on either side. One of width 0 is a prompt of nothing else.
            attention_mask (torch.Tensor): (B, P), 1 for tokens; by default everything but `pad_token_id`.
            first (int | None): id before each prompt; None for none.
            last (int | None): id after each prompt; None for nothing on either side.
            rows (torch.Tensor): (B,) of which this is true; None is all.

        Raises:
            ValueError: for an id outside the vocabulary, or one of the two anywhere else.
        """
        ids = [token for token in (first, last) if token is not None]
        input_ids, mask = self.aligned_prompts(input_ids, attention_mask, ids)
        if last is None:
            return input_ids, mask
        start = mask.int().argmax(dim=-1, keepdim=True)
        begins = (input_ids.gather(-1, (start + len(ids) - 1).clamp(max=mask.shape[1] - 1)) == last).squeeze(-1)
        ends = input_ids[:, -1] == last
        is_complete = mask.any(dim=-1) & (begins | ends)
        if first is not None:
            is_complete &= (input_ids.gather(-1, start) == first).squeeze(-1)
        rows = torch.ones_like(ends) if rows is None else rows
        # Some vocabularies have one id for everything special.
        special = {*ids} - {getattr(self.config, "eos_token_id", None), self.config.pad_token_id}
        count = (mask & torch.isin(input_ids, torch.tensor([*special], device=mask.device))).sum(dim=-1)
        if (rows & (count > is_complete * (len(ids) + (begins & ends)))).any():
            raise ValueError(
                f"A prompt holds [BOS] (id {last}) in its middle, or only some of its special tokens: use the "
                "tokenizer that was saved with the model, or leave these tokens out."
            )
        lacks = rows & ~is_complete
        if not lacks.any():
            return input_ids, mask
        columns = [torch.full_like(input_ids[:, :1], token) for token in ids]
        added = [lacks[:, None]] * len(ids)
        input_ids = torch.cat((*columns[:-1], input_ids, columns[-1]), dim=1)
        input_ids, mask = left_align_padding(input_ids, torch.cat((*added[:-1], mask, added[-1]), dim=1))
        return input_ids.masked_fill(~mask, self.config.pad_token_id), mask

    def source_tensors(self, num_rows, special_ids, source_ids=None, source_mask=None) -> tuple[torch.Tensor, Any]:
        """The texts that `generate` is to edit, (B, N) padded on the right, and how long each is (B,).

        Args:
            num_rows (int): B.
            special_ids (list[int]): ids that no text holds.
            source_ids (torch.Tensor): (B, N), padded on either side.
            source_mask (torch.Tensor): (B, N), 1 for tokens; by default everything but `pad_token_id`.

        Raises:
            ValueError: for other shapes, one of the `special_ids`, or an id outside the vocabulary.
        """
        shapes = {tuple(x.shape) for x in (source_ids, source_mask) if x is not None}
        if source_ids is None or len(source_ids) != num_rows or source_ids.ndim != 2 or len(shapes) > 1:
            raise ValueError(
                f"This model edits given texts: pass source_ids ({num_rows}, N), a text for each prompt, and if "
                f"anything a source_mask of the same shape; what came has {shapes or 'no shape'}."
            )
        self.check_token_ids(source_ids)
        mask = source_ids != self.config.pad_token_id if source_mask is None else source_mask.bool()
        special = source_ids[torch.isin(source_ids, torch.tensor(special_ids, device=mask.device)) & mask]
        if special.numel():
            raise ValueError(
                f"A source text holds the special token {int(special[0])}, but no text does: tokenize without special "
                "tokens."
            )
        ids, mask = (x.flip(-1) for x in left_align_padding(source_ids.flip(-1), mask.flip(-1)))
        return ids.masked_fill(~mask, self.config.pad_token_id), mask.sum(dim=-1)

    def check_token_ids(self, input_ids: torch.Tensor, what: str = "Token id") -> None:
        """Raise ValueError, which says `what` they are, if an id lies outside the model's vocabulary."""
        vocab_size = self.config.vocab_size
        outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"{what} {int(outside[0])} is outside the model's vocabulary of {vocab_size}: use the tokenizer that "
                "was saved with the model."
            )

    def check_suppressed(self, suppress_tokens: Sequence[int]) -> None:
        """Raise ValueError for an id outside the vocabulary, or if no id is left to write."""
        self.check_token_ids(torch.tensor(list(suppress_tokens)), "suppress_tokens: id")
        suppressed, size = set(self.config.suppressed_ids or ()), self.config.vocab_size
        if len(suppressed.union(suppress_tokens)) == size:
            num = size - len(suppressed)
            raise ValueError(
                f"suppress_tokens has all {num} ids that the model writes: leave at least one of them out."
            )
