"""Generation by a Levenshtein Transformer: rounds of deletions, placeholders and tokens, until nothing changes."""

from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.devices import rounded_up, true_indices
from xlm_hf.modules.edits import EditBuffer, slots_of_counts
from xlm_hf.modules.generation import (
    GenerationCall,
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
)
from xlm_hf.modules.unmasking import draw_where
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


class LevenshteinTransformerGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `LevenshteinTransformerForEditLM.generate`, beside those of the base class.

    `do_sample` draws the tokens of placeholders. What is deleted, and how many placeholders are inserted, is always the
    most probable.

    Attributes:
        max_rounds: most rounds of deletions, placeholders and tokens, three forward passes each; the paper has 10.
    """

    max_rounds: PositiveInt = 10


class LevenshteinTransformerState(EditBuffer):
    """The rows of a decode.

    Attributes:
        before: (B, W) their tokens before the round.
    """

    before: torch.Tensor


class LevenshteinTransformerGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to the Levenshtein Transformer (arXiv 1905.11006).

    A round has three steps: tokens are deleted, placeholders inserted, and these filled, each by a forward pass of the
    rows that have tokens, or placeholders to fill. A row ends once a round leaves its text as it was.

    Prompts read `prompt [BOS]`; a bare one is wrapped. A row begins with nothing, or with a text to be refined:
    `generate` then takes `source_ids` (B, N), and `source_mask` (B, N), 1 for its tokens; by default all but padding.
    """

    generation_inputs: ClassVar[tuple[str, ...]] = ("source_ids", "source_mask")

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> EditBuffer:
        """Sequences that hold after their prompts the texts to be refined, if any."""
        prompt, mask = self.completed_prompts(input_ids, attention_mask, None, self.config.bos_token_id)
        capacity = self.capacity_after(call, mask.sum(dim=-1))
        start = (None, None)
        if inputs:
            special_ids = [self.config.bos_token_id, self.config.mask_token_id]
            start = self.source_tensors(len(prompt), special_ids, **inputs)
        options = (self.config.pad_token_id, call.log, *start, self.config.mask_token_id)
        return LevenshteinTransformerState(prompt, mask, capacity, *options)

    def generation_step(self: Any, call: GenerationCall, state: LevenshteinTransformerState, step: int) -> bool:
        """The deletions, the placeholders or the tokens of a round; False if no row is open."""
        number, phase = divmod(step, 3)
        if phase == 0:
            state.before = state.tokens.clone()
        is_open = ~state.finished
        is_masked = (state.tokens == self.config.mask_token_id) & is_open[:, None]
        numbers = ((state.lengths * is_open).sum(), is_masked.sum())
        rows, num_slots, width, (num_tokens, num_masked) = state.shape_of_step(*numbers)
        if num_slots == 0:
            return False
        view = state.view(rows, width)
        if phase == 0 and num_tokens:
            state.nfe += is_open & (state.lengths > 0)
            self._delete(state, step, rows, view, num_tokens)
        elif phase == 1:
            state.nfe += is_open
            self._insert(state, step, rows, view, num_slots)
        elif phase == 2 and num_masked:
            state.nfe += is_masked.any(dim=-1)
            self._fill(call, state, step, rows, view, is_masked[rows, :width], num_masked)
        if phase > 0:
            is_same = (state.tokens == state.before).all(dim=-1)
            is_last = phase == 2 and number + 1 == call.config.max_rounds
            state.finish(rows, is_same[rows] | is_last)
        return True

    def _delete(self: Any, state: EditBuffer, step: int, rows, view, num_tokens: int) -> None:
        """Delete the tokens that are more likely to go than to stay."""
        ids, mask, exists = view
        is_token = pad(exists[:, 1:], (state.prompt.shape[1], 0))
        index = true_indices(is_token, rounded_up(num_tokens, exists.numel(), rows.device))
        logits = self(ids, attention_mask=mask, token_index=index).deletion_logits
        deleted = torch.zeros_like(is_token).masked_scatter(is_token, logits > 0)[:, state.prompt.shape[1] :]
        nothing = rows.new_zeros(len(rows), 0)
        deleted = pad(deleted, (0, state.width - deleted.shape[1]))
        state.apply(rows, step, nothing, nothing, nothing.bool(), deleted=deleted)

    def _insert(self: Any, state: EditBuffer, step: int, rows, view, num_slots: int) -> None:
        """Insert the most probable number of placeholders into every gap."""
        ids, mask, exists = view
        index, of_slots = state.slots(exists, num_slots)
        logits = self(ids, attention_mask=mask, gap_index=index).placeholder_logits
        counts = logits.argmax(dim=-1)[of_slots].masked_fill(~exists, 0)
        slots, inserted = slots_of_counts(counts, state.width)
        # A full row stays open: its placeholders are to be filled.
        kept = torch.zeros_like(state.tokens[rows], dtype=torch.bool)
        state.apply(rows, step, slots, torch.full_like(slots, self.config.mask_token_id), inserted, deleted=kept)

    def _fill(self: Any, call: GenerationCall, state: EditBuffer, step: int, rows, view, is_masked, num_masked) -> None:
        """Replace every placeholder by a token."""
        ids, mask, exists = view
        width, P = is_masked.shape[1], state.prompt.shape[1]
        index = true_indices(pad(is_masked, (P, 0)), rounded_up(num_masked, exists.numel(), rows.device))
        numbers = (is_masked.flatten().cumsum(dim=0) - 1).view_as(is_masked)
        uniforms = uniform(call.seeds[rows, None], step, torch.arange(width, device=rows.device))

        def draw(hidden_states, head, suppressed_ids) -> torch.Tensor:
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            logits = logits.processed(call.config.suppress_tokens, call.logits_processor, ids, index, step)
            return draw_where(logits, numbers, is_masked, uniforms, call.config)

        tokens = self(ids, attention_mask=mask, logits_index=index, head_function=draw).head_output
        nothing = rows.new_zeros(len(rows), 0)
        substitutes = pad(tokens, (0, state.width - width), value=-1)
        state.apply(rows, step, nothing, nothing, nothing.bool(), substitutes=substitutes)
