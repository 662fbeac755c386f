"""Generation by insertion: choose a slot and a token, insert, and ask whether to stop."""

from typing import Any

import torch
from transformers.generation import LogitsProcessorList

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import (
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
    NonAutoregressiveGenerationOutput,
    left_align_padding,
    rounded_up,
    row_seeds,
    shape_of_call,
    true_indices,
)
from xlm_hf.modules.token_sampling import filter_logits, sample_categorical
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


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
        stopping_threshold: a row ends once the stopping head's probability of "complete" reaches this; None writes
            until there is no room.
    """

    sampling_method: str = "joint"
    slot_temperature: float = 1.0
    slot_top_k: int | None = None
    slot_top_p: float | None = None
    insertions_per_step: int = 1
    stopping_threshold: float | None = 0.5

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        super().validate()
        self._check_choice("sampling_method", ("joint", "two_stage"))
        self._check_positive("slot_temperature", "slot_top_k", "insertions_per_step")
        self._check_probability("slot_top_p", "stopping_threshold")


class ILMGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to the insertion language model."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: ILMGenerationConfig | None = None,
        streamer: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        seed: int | list[int] | torch.Tensor | None = None,
        **overrides,
    ) -> NonAutoregressiveGenerationOutput | torch.Tensor | None:
        """Write sequences by insertion (arXiv 2505.05755, section 3.3).

        Each forward pass either ends a row, by its stopping head, or inserts into slots right of `[BOS]`; the prompt
        is never changed.

        Args:
            input_ids: (B, P) prompts, `[CLS] prompt [BOS]` or the bare prompt, which is then wrapped; ragged prompts
                are padded on either side. None writes one sequence from an empty prompt.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            generation_config: options; the model's own by default.
            streamer: a `TextDiffusionStreamer` or its like; gets the prompt by `put`, the sequence after every step by
                `put_draft`, and the result by `put`.
            logits_processor: called as transformers does, with (rows x slots, length) ids, (rows x slots, V) logits
                and `cur_step`.
            seed: one integer, or one for each row (see `row_seeds`).
            **overrides: single options by name.

        Returns:
            `NonAutoregressiveGenerationOutput`, or its sequences alone with `return_dict_in_generate=False`.

        Raises:
            ValueError: for an unknown option, a value out of range, an id outside the vocabulary or a prompt without
                room after it.
        """
        config = self.resolve_generation_config(generation_config, overrides)
        prompt, prompt_mask = self._prepare_prompt(input_ids, attention_mask)
        room = self.room_for_new_tokens(config, prompt_mask.sum(dim=-1))
        state = _InsertionState(prompt, prompt_mask, room, self._pad_token_id)
        seeds = row_seeds(seed, len(prompt), prompt.device)
        if streamer is not None:
            streamer.put(prompt.cpu())
        step = 0
        while self._step(state, config, logits_processor, seeds, step):
            step += 1
            if streamer is not None:
                streamer.put_draft(state.written().cpu())
        if streamer is not None:
            streamer.put(state.written().cpu())
            streamer.end()
        output = state.output(config.return_history)
        return output if config.return_dict_in_generate else output.sequences

    def _step(self: Any, state, config: ILMGenerationConfig, logits_processor, seeds, step: int) -> bool:
        """One forward pass over the open rows: end those that are complete, insert into the others; False if none."""
        rows, num_slots, width = state.shape_of_step()
        if num_slots == 0:
            return False
        sequences, mask, slot_exists = state.view(rows, width)
        is_slot = torch.nn.functional.pad(slot_exists, (sequences.shape[1] - width - 1, 0))
        slot_index, seeds = true_indices(is_slot, num_slots), seeds[rows]
        slots = (slot_exists.flatten().cumsum(dim=0) - 1).view_as(slot_exists).masked_fill(~slot_exists, -1)

        def draw(hidden_states, head, suppressed_ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            logits = logits.processed(config.suppress_tokens, logits_processor, sequences, slot_index, step)
            return _draw_insertions(logits, slots, config, seeds, step)

        outputs = self(sequences, attention_mask=mask, slot_index=slot_index, head_function=draw)
        state.nfe += ~state.finished
        if config.stopping_threshold is not None and outputs.stop_logits is not None:
            is_complete = outputs.stop_logits.float().softmax(dim=-1)[:, 0] >= config.stopping_threshold
            state.finish(rows, is_complete)
        state.insert(rows, *outputs.head_output, step)
        return True

    @property
    def _pad_token_id(self) -> int:
        return self.config.pad_token_id

    def _prepare_prompt(self, input_ids, attention_mask):
        """Check prompts, wrap bare ones in `[CLS] ... [BOS]`, and move the padding to the left."""
        cls_id, bos_id = self.config.cls_token_id, self.config.bos_token_id
        if input_ids is None:
            input_ids = torch.tensor([[cls_id, bos_id]], device=self.device)
        self.check_token_ids(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self._pad_token_id
        input_ids, mask = left_align_padding(input_ids, attention_mask)
        starts = input_ids.gather(-1, mask.int().argmax(dim=-1, keepdim=True)).squeeze(-1) == cls_id
        wrapped = starts & (input_ids[:, -1] == bos_id) & mask[:, -1]
        if wrapped.all():
            return input_ids, mask
        if wrapped.any() or starts.any():
            raise ValueError(
                f"A prompt reads [CLS] ... [BOS] (ids {cls_id} and {bos_id}) or holds neither, alike in all rows: wrap "
                "all of them or none."
            )
        column = torch.ones_like(input_ids[:, :1])
        input_ids = torch.cat((column * cls_id, input_ids, column * bos_id), dim=1)
        mask = torch.cat((column.bool(), mask, column.bool()), dim=1)
        return left_align_padding(input_ids, mask)


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
        slot = _choose(candidates, config.do_sample, uniform(seeds, step, draw, 0))
        token_logits = logits[slots[rows, slot]]
        if not joint:
            token_logits = filter_logits(token_logits, *token_filter)
        token_logits = token_logits.masked_fill(~possible[:, None], 0.0)
        tokens.append(_choose(token_logits, config.do_sample, uniform(seeds, step, draw, 1)))
        chosen.append(slot)
        drawn.append(possible)
        scores = scores.masked_fill((slot_numbers - slot[:, None]).abs() <= 1, -torch.inf)
    return torch.stack(chosen, 1), torch.stack(tokens, 1), torch.stack(drawn, 1)


def _choose(logits: torch.Tensor, do_sample: bool, uniforms: torch.Tensor) -> torch.Tensor:
    return sample_categorical(logits, uniforms) if do_sample else logits.argmax(dim=-1)


class _InsertionState:
    """The sequences being written: a fixed prompt, padded on the left, and what was inserted after it, in order."""

    def __init__(self, prompt: torch.Tensor, prompt_mask: torch.Tensor, room: torch.Tensor, pad_token_id: int):
        B, device, self.capacity = len(prompt), prompt.device, int(room.max())
        self.prompt, self.prompt_mask, self.room = prompt, prompt_mask, room
        self.tokens = torch.full((B, self.capacity), pad_token_id, device=device)
        self.steps = torch.full((B, self.capacity), -1, device=device)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.nfe = torch.zeros(B, dtype=torch.int64, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(B, dtype=torch.bool, device=device)

    def shape_of_step(self) -> tuple[torch.Tensor, int, int]:
        """The open rows, their slots in all and the longest of them, by the one reading of a step (`shape_of_call`)."""
        is_open, device = ~self.finished, self.finished.device
        slots = torch.arange(self.capacity + 1, device=device) <= self.lengths[:, None]
        longest = (self.lengths * is_open).max()
        rows, num_slots, (width,) = shape_of_call(is_open, slots & is_open[:, None], longest)
        width = rounded_up(width, self.capacity, device)
        # No more than the rows have in so many columns.
        return rows, min(num_slots, len(rows) * (width + 1)), width

    def view(self, rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and mask of `rows` up to `width` columns behind the prompt, and (R, width + 1) where they have slots."""
        columns = torch.arange(width + 1, device=rows.device)
        sequences = torch.cat((self.prompt[rows], self.tokens[rows, :width]), dim=1)
        mask = torch.cat((self.prompt_mask[rows], columns[:-1] < self.lengths[rows, None]), dim=1)
        return sequences, mask, (columns <= self.lengths[rows, None]) & ~self.finished[rows, None]

    def written(self) -> torch.Tensor:
        """What was written so far, (B, longest), padded on the right."""
        return self.tokens[:, : int(self.lengths.max())]

    def finish(self, rows: torch.Tensor, ended: torch.Tensor) -> None:
        """End those of `rows` (R,) that have `ended` (R,) and are open."""
        ended = ended & ~self.finished[rows]
        self.finished[rows] |= ended
        self.stopped[rows] |= ended

    def insert(self, rows, slots, tokens, drawn, step: int) -> None:
        """Insert `tokens` into `slots` (R, K) of the open ones of `rows` where `drawn`, as far as there is room."""
        # Without a slot that is allowed there is nothing left to insert.
        self.finish(rows, ~drawn.any(dim=-1))
        drawn = drawn & ~self.finished[rows, None]
        drawn = drawn & (drawn.cumsum(dim=-1) <= (self.room - self.lengths)[rows, None])
        slots = torch.where(drawn, slots, self.capacity + 1)
        columns = torch.arange(self.capacity, device=rows.device)
        shifted = columns + (slots[:, None, :] <= columns[:, None]).sum(dim=-1)
        target = slots + (slots[:, None, :] < slots[:, :, None]).sum(dim=-1)
        for buffer, values in ((self.tokens, tokens), (self.steps, torch.full_like(tokens, step))):
            # One spare column takes what falls off the end: padding, and draws that are not made.
            old = buffer[rows]
            new = torch.cat((old, old[:, :1]), dim=1)
            new.scatter_(1, shifted.clamp(max=self.capacity), old)
            new.scatter_(1, target.clamp(max=self.capacity), values)
            buffer[rows] = new[:, : self.capacity]
        self.lengths[rows] += drawn.sum(dim=-1)
        self.finished[rows] |= self.lengths[rows] == self.room[rows]

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """Gather the result of `generate`."""
        width = int(self.lengths.max())
        history = None
        if return_history:
            history = torch.cat((torch.full_like(self.prompt, -1), self.steps[:, :width]), dim=1)
        return NonAutoregressiveGenerationOutput(
            sequences=torch.cat((self.prompt, self.tokens[:, :width]), dim=1),
            tokens_per_forward=self.lengths / self.nfe.clamp(min=1),
            nfe=self.nfe,
            finish_reason=["stop" if stopped else "length" for stopped in self.stopped.tolist()],
            history=history,
        )
