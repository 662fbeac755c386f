"""Prompts of `generate`: as tensors, checked, with their special tokens, and their padding on the left."""

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .checked_options import PositiveInt, check_value
from .messages import shown


def left_align_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of every row to its left and drop columns that hold nothing but padding.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens; the tokens of a row keep their order.

    Returns:
        the moved ids and mask, (B, longest row), the mask as bool.
    """
    order = attention_mask.bool().int().argsort(dim=-1, stable=True)
    longest = int(attention_mask.bool().sum(dim=-1).max())
    order = order[:, order.shape[1] - longest :]
    return input_ids.gather(-1, order), attention_mask.bool().gather(-1, order)


def integers(what: str, values: Any, ndims: Sequence[int], is_mask: bool = False) -> torch.Tensor:
    """`values` as an int64 tensor.

    Raises:
        ValueError: which says `what` they are and must be, unless they are integers, or of a mask zeros and ones or
            truth values, of one of the numbers of dimensions `ndims`.
    """
    # What torch cannot read it says in errors of many kinds.
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        found = torch.as_tensor(values).to_dense()
        # Nothing at all has the type of numbers.
        is_one = found.numel() == 0 or (bool((found == found.bool()).all()) if is_mask else found.dtype in _INTEGERS)
        if is_one and found.ndim in ndims:
            return found.long()
    raise ValueError(f"{what} and is {shown(values)}.")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


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
            ValueError: if prompts are given twice, are no integers or none at all, or have a mask of another shape.
        """
        if (input_ids is not None) + (inputs is not None) + (num_samples is not None) > 1:
            several = "num_return_sequences writes several texts for each"
            raise ValueError(f"Give one of input_ids, inputs and num_samples: {several}.")
        check_value("num_samples", num_samples, PositiveInt | None)
        prompts = input_ids if inputs is None else inputs
        if prompts is None:
            return torch.zeros((num_samples or 1, 0), dtype=torch.int64, device=self.device), None
        ids, mask = self._rows("input_ids must be integers, of a row or of several,", prompts)
        if attention_mask is not None:
            mask, _ = self._rows("attention_mask must be zeros and ones, as many as input_ids,", attention_mask, True)
        if len(ids) == 0:
            raise ValueError("input_ids has 0 rows and needs at least 1: pass a prompt, or None for an empty one.")
        if mask is not None and mask.shape != ids.shape:
            shapes = f"{tuple(mask.shape)} and input_ids {tuple(ids.shape)}"
            raise ValueError(f"attention_mask has the shape {shapes}: make them alike.")
        return ids, mask

    def _rows(self, what: str, values: Any, is_mask: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Integers (B, P) of a tensor; or of lists of any lengths, padded on the left, and where something stands."""
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            found = integers(what, values, (1, 2), is_mask).to(self.device)
            return found if found.ndim == 2 else found[None], None
        rows = values if any(isinstance(row, Sequence) or getattr(row, "ndim", 0) for row in values) else [values]
        tensors = [integers(what, row, (1,), is_mask) for row in rows]
        both = (tensors, [torch.ones_like(row) for row in tensors])
        ids, exists = (pad_sequence(x, batch_first=True, padding_side="left").to(self.device) for x in both)
        return ids, exists

    def aligned_prompts(self, input_ids: Any, attention_mask: Any, empty: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts (B, P) and their mask (bool) with the padding on the left.

        Args:
            input_ids: (B, P), padded on either side; where no row holds a token, all read `empty`.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            empty: ids of an empty prompt.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        self.check_token_ids(input_ids)
        mask = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask.bool()
        if not mask.any():
            input_ids = torch.tensor([list(empty)] * len(input_ids), dtype=torch.int64, device=self.device)
            # Some vocabularies have one id for everything special.
            mask = torch.ones_like(input_ids)
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
            found = f"A prompt holds [BOS] (id {last}) in its middle, or only some of its special tokens"
            raise ValueError(f"{found}: use the tokenizer that was saved with the model, or leave these tokens out.")
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
            wanted = f"pass source_ids ({num_rows}, N), a text for each prompt, with a source_mask of the same shape"
            raise ValueError(f"This model edits given texts: {wanted}; what came has {shapes or 'no shape'}.")
        self.check_token_ids(source_ids)
        mask = source_ids != self.config.pad_token_id if source_mask is None else source_mask.bool()
        special = source_ids[torch.isin(source_ids, torch.tensor(special_ids, device=mask.device)) & mask]
        if special.numel():
            raise ValueError(
                f"A source text holds the special token {int(special[0])}, but no text does: leave it out."
            )
        ids, mask = (x.flip(-1) for x in left_align_padding(source_ids.flip(-1), mask.flip(-1)))
        return ids.masked_fill(~mask, self.config.pad_token_id), mask.sum(dim=-1)

    def check_token_ids(self, input_ids: torch.Tensor, what: str = "Token id") -> None:
        """Raise ValueError, which says `what` they are, if an id lies outside the model's vocabulary."""
        vocab_size = self.config.vocab_size
        outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if outside.numel():
            found = f"{what} {int(outside[0])} is outside the model's vocabulary of {vocab_size}"
            raise ValueError(f"{found}: use the tokenizer that was saved with the model.")

    def check_option_ids(self, options: dict[str, Any]) -> None:
        """Raise ValueError for an option with an id outside the vocabulary, or if no id is left to write."""
        for name in [name for name in options if name.endswith(("token_id", "suppress_tokens"))]:
            ids = options[name] if isinstance(options[name], Collection) else [options[name]]
            # As numbers of which none is too large.
            numbers = torch.tensor([token_id for token_id in ids if token_id is not None], dtype=torch.float64)
            self.check_token_ids(numbers, f"{name}: id")
        suppressed, size = set(self.config.suppressed_ids or ()), self.config.vocab_size
        if len(suppressed.union(options.get("suppress_tokens") or ())) == size:
            num = size - len(suppressed)
            raise ValueError(f"suppress_tokens has all {num} ids that the model writes: leave at least one out.")
