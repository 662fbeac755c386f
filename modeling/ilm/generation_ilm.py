"""Generation by insertion: choose a slot and a token, insert, and ask whether to stop."""

from typing import Any, Literal

import torch

from xlm_hf.modules.checked_options import Positive, PositiveInt, Share
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.edits import EditBuffer
from xlm_hf.modules.generation import (
    GenerationCall,
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
)
from xlm_hf.modules.token_sampling import filter_logits, sample_categorical
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

_SLOT, _TOKEN = 0, 1  # last counter of a random number: what it decides


class ILMGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `ILMForInsertionLM.generate`, beside those of the base class.

    Attributes:
        sampling_method: "joint" draws (slot, token) from their joint distribution after temperature, top-k and top-p
            over the whole grid; "two_stage" draws the slot from its marginal, filtered by the `slot_` options, and
            then the token given the slot, filtered by temperature, top-k and top-p.
        slot_temperature: divides the slots' log-probabilities in two-stage sampling.
        slot_top_k: number of slots kept in two-stage sampling; None keeps all.
        slot_top_p: probability mass of the slots kept in two-stage sampling; None keeps all.
        insertions_per_step: tokens inserted by one forward pass, into slots no two of which are neighbours.
        stopping: how the stopping head ends a row: "threshold", by `stopping_threshold`; "sample" draws the end with
            the head's probability of "complete". With `do_sample`, joint sampling without filters and one insertion a
            step, a decode then follows the law that the likelihood bound is about.
        stopping_threshold: a row ends once the probability of "complete" reaches this; None writes until the capacity
            is used up.
    """

    sampling_method: Literal["joint", "two_stage"] = "joint"
    slot_temperature: Positive = 1.0
    slot_top_k: PositiveInt | None = None
    slot_top_p: Share | None = None
    insertions_per_step: PositiveInt = 1
    stopping: Literal["threshold", "sample"] = "threshold"
    stopping_threshold: Share | None = 0.5


class ILMGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to the insertion language model (arXiv 2505.05755, section 3.3).

    Each forward pass either ends a row, by its stopping head, or inserts into slots right of `[BOS]`. Prompts read
    `[CLS] prompt [BOS]`; a bare one is wrapped.
    """

    def open_generation(self, call: GenerationCall, input_ids, attention_mask, **inputs) -> EditBuffer:
        """Sequences that hold nothing after their prompts."""
        special = (self.config.cls_token_id, self.config.bos_token_id)
        prompt, prompt_mask = self.completed_prompts(input_ids, attention_mask, *special)
        capacity = self.capacity_after(call, prompt_mask.sum(dim=-1))
        return EditBuffer(prompt, prompt_mask, capacity, self._pad_token_id, call.log)

    def generation_step(self: Any, call: GenerationCall, state: EditBuffer, step: int) -> bool:
        """One forward pass over the open rows: end those that are complete, insert into the others; False if none."""
        rows, num_slots, width, _ = state.shape_of_step()
        if num_slots == 0:
            return False
        config, seeds = call.config, call.seeds[rows]
        sequences, mask, slot_exists = state.view(rows, width)
        slot_index, slots = state.slots(slot_exists, num_slots)

        def draw(hidden_states, head, suppressed_ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            logits = logits.processed(config.suppress_tokens, call.logits_processor, sequences, slot_index, step)
            return _draw_insertions(logits, slots, config, seeds, step)

        outputs = self(sequences, attention_mask=mask, slot_index=slot_index, head_function=draw)
        state.nfe += ~state.finished
        if outputs.stop_logits is not None:
            complete = outputs.stop_logits.float().softmax(dim=-1)[:, 0]
            if config.stopping == "sample":
                state.finish(rows, uniform(seeds, *b"stop", step) < complete)
            elif config.stopping_threshold is not None:
                state.finish(rows, complete >= config.stopping_threshold)
        slots, tokens, drawn = outputs.head_output
        # Without a slot that is allowed there is nothing left to insert.
        state.finish(rows, ~drawn.any(dim=-1))
        # Where a row has less capacity left than draws, the first of them count, wherever they go.
        drawn = drawn & (drawn.cumsum(dim=-1) <= (state.capacity - state.lengths)[rows, None])
        state.apply(rows, step, slots, tokens, drawn)
        return True

    @property
    def _pad_token_id(self) -> int:
        return self.config.pad_token_id


def _draw_insertions(
    logits: LogitsOnDemand, slots: torch.Tensor, config: ILMGenerationConfig, seeds: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw up to `insertions_per_step` insertions without replacement, no two in neighbouring slots.

    Args:
        logits: of the tokens of N slots.
        slots: (R, S) which of them each slot of the rows is; -1 where nothing can be inserted.
        config: the options.
        seeds: (R,) seeds of the rows.
        step: number of the step, from 0.

    Returns:
        slots, tokens and whether each is a real draw, all (R, insertions_per_step).
    """
    (R, S), exists = slots.shape, slots >= 0
    joint = config.sampling_method == "joint"
    token_filter = (config.temperature, config.top_k, config.top_p)
    if joint and token_filter != (1.0, None, None):
        grid = logits[:][slots].masked_fill(~exists[..., None], -torch.inf)
        logits = LogitsOnDemand.of(filter_logits(grid.flatten(1), *token_filter).view(R * S, -1))
        slots = torch.arange(R * S, device=slots.device).view(R, S)
    # Greedy joint decoding takes the best pair; everywhere else a slot counts with the mass of all its tokens.
    greedy = joint and not config.do_sample
    scores = logits.statistic("maximum" if greedy else "log_mass")[slots].masked_fill(~exists, -torch.inf)
    if not joint:
        scores = filter_logits(scores, config.slot_temperature, config.slot_top_k, config.slot_top_p)
    rows, slot_numbers = torch.arange(R, device=slots.device), torch.arange(S, device=slots.device)
    chosen, tokens, drawn = [], [], []
    for draw in range(config.insertions_per_step):
        possible = scores.isfinite().any(dim=-1)
        # A row without a free slot draws from a uniform law instead, and the draw is marked as void.
        candidates = scores.masked_fill(~possible[:, None], 0.0)
        slot = _choose(candidates, config.do_sample, uniform(seeds, step, draw, _SLOT))
        token_logits = logits[slots[rows, slot]]
        if not joint:
            token_logits = filter_logits(token_logits, *token_filter)
        token_logits = token_logits.masked_fill(~possible[:, None], 0.0)
        tokens.append(_choose(token_logits, config.do_sample, uniform(seeds, step, draw, _TOKEN)))
        chosen.append(slot)
        drawn.append(possible)
        scores = scores.masked_fill((slot_numbers - slot[:, None]).abs() <= 1, -torch.inf)
    return torch.stack(chosen, 1), torch.stack(tokens, 1), torch.stack(drawn, 1)


def _choose(logits: torch.Tensor, do_sample: bool, uniforms: torch.Tensor) -> torch.Tensor:
    return sample_categorical(logits, uniforms) if do_sample else logits.argmax(dim=-1)
