"""Generation by flexible masked diffusion: masks come into the gaps, and become tokens at times of their own."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.devices import is_synchronous, rounded_up, shape_of_call, true_indices
from xlm_hf.modules.edits import DELETE, EditBuffer, slots_of_counts
from xlm_hf.modules.generation import (
    GenerationCall,
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
    Sampler,
)
from xlm_hf.modules.prompts import left_align_padding
from xlm_hf.modules.token_sampling import sample_categorical
from xlm_hf.modules.unmasking import commit_ranks, commit_top_k, draw_tokens, order_scores, statistics_in_place
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

_TOKEN, _NUMBER, _GAP, _COMES, _CAME, _TURNS = range(6)  # last counter of a random number: what it decides


@dataclass
class TauLeapingSampler(Sampler):
    """Steps of even length in time, in each of which the network's predictions are frozen (arXiv 2509.01025).

    Attributes:
        num_steps: steps from time 1 to 0, behind which one more forward pass fills the last masks; None means one for
            each token that a row may write.
        counts: how many masks come into the gaps. "independent" draws each gap by itself: a Poisson number, or with
            the head "distribution" a number of missing tokens (without `do_sample` the most probable one), each of
            which comes in this step or not. "rounded" rounds the expected counts of a row as one, by systematic
            sampling with `do_sample` and to the nearest without, so that their sum is off by less than 1; then each of
            these tokens comes in this step or not. Both have the same limit for small steps, and the second is closer
            to it.
        insertion_steps: masks come in this many first steps alone; in the last of them all that is missing comes. They
            keep the times at which they turn into tokens. So the length is written first. None means all steps.
    """

    num_steps: PositiveInt | None = None
    counts: Literal["independent", "rounded"] = "independent"
    insertion_steps: PositiveInt | None = None

    def candidates(self, masked: torch.Tensor, due: torch.Tensor) -> torch.Tensor:
        """Which of the masks (B, W) may become tokens, when those that are `due` (B, W) have had their time."""
        return due

    def chosen(
        self, logits: LogitsOnDemand, candidates: torch.Tensor, due: torch.Tensor, seeds: torch.Tensor
    ) -> torch.Tensor:
        """Which of the candidates (R, W) do, by their logits."""
        return due


@dataclass
class ConfidenceSampler(TauLeapingSampler):
    """The same, but which masks become tokens says the network: as many as are due, the surest first.

    Attributes:
        order: "confidence", the largest p1; "margin", the largest p1 - p2; "entropy", the smallest entropy.
    """

    order: Literal["confidence", "margin", "entropy"] = "confidence"

    def candidates(self, masked, due) -> torch.Tensor:
        """All masks of the rows in which any turns."""
        return masked & due.any(dim=-1, keepdim=True)

    def chosen(self, logits, candidates, due, seeds) -> torch.Tensor:
        """See `TauLeapingSampler`."""
        scores = order_scores(self.order, statistics_in_place(logits, candidates), seeds, candidates)
        return commit_top_k(commit_ranks(scores, candidates), candidates, due.sum(dim=-1))


class FlexMDMGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `FlexMDMForFlexibleMaskedDiffusion.generate`, beside those of the base class.

    Attributes:
        sampler: "tau_leaping", the process of the model, in which each mask has a time at which it becomes a token;
            "confidence", in which those turn first that the network is surest of. Their options are those of
            `TauLeapingSampler` and `ConfidenceSampler`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"tau_leaping": TauLeapingSampler, "confidence": ConfidenceSampler}

    sampler: str = "tau_leaping"


class FlexMDMState(EditBuffer):
    """The rows of a decode, with the times at which masks turn into tokens, and gaps that are closed.

    Attributes:
        sampler: decides how a step is made.
        num_steps: (B,) steps of each row.
        extra: `turns_at`, the time of each mask; `is_closed`, whether the gap right of a token is closed.
        is_first_closed: (B,) whether that right of `[BOS]` is.
    """

    sampler: TauLeapingSampler
    num_steps: torch.Tensor
    is_first_closed: torch.Tensor

    def masks(self) -> torch.Tensor:
        """The masks (B, W) of the rows that are open."""
        return (self.tokens == self.mask_token_id) & ~self.finished[:, None]

    def open_gaps(self) -> torch.Tensor:
        """The gaps (B, W + 1) into which masks may come."""
        columns = torch.arange(self.width + 1, device=self.lengths.device)
        is_closed = torch.cat((self.is_first_closed[:, None], self.extra["is_closed"]), dim=1)
        return (columns <= self.lengths[:, None]) & ~is_closed


class FlexMDMGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to flexible masked diffusion.

    Prompts read `prompt [BOS]`, and `[BOS]` is added where it lacks. A prompt with mask tokens is filled in: each run
    of masks is an open gap, into which any number of tokens may come, and nothing is written behind it.
    """

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> FlexMDMState:
        """Rows with nothing after their prompts, or with what stands around the open gaps."""
        config, pad_id, mask_id = self.config, self.config.pad_token_id, self.config.mask_token_id
        ids, mask, is_filled = self._prepare_prompt(input_ids, attention_mask)
        blank = (ids == mask_id) & mask
        first, columns = mask.int().argmax(dim=-1, keepdim=True), torch.arange(ids.shape[1], device=ids.device)
        # Of a row that is filled in, only [BOS] is the prompt of the buffer; the rest stands in it from the start.
        kept = mask & is_filled & (columns > first) & ~blank
        order, start_lengths = kept.logical_not().int().argsort(dim=-1, stable=True), kept.sum(dim=-1)
        order = order[:, : int(start_lengths.max())]
        start = ids.masked_fill(~kept, pad_id).gather(1, order)
        is_closed = is_filled & ~pad(blank[:, 1:], (0, 1))
        prompt, prompt_mask = left_align_padding(ids, mask & (~is_filled | (columns == first)))
        prompt = prompt.masked_fill(~prompt_mask, pad_id)
        tokens = prompt_mask.sum(dim=-1) + start_lengths + (config.end_token_id is not None)
        free = self.capacity_after(call, tokens)
        state = FlexMDMState(prompt, prompt_mask, free + start_lengths, pad_id, call.log, start, start_lengths, mask_id)
        state.sampler = call.config.make_sampler()
        state.num_steps = torch.full_like(free, state.sampler.num_steps) if state.sampler.num_steps else free
        state.is_first_closed = is_closed.gather(1, first)[:, 0]
        state.extra["turns_at"] = torch.zeros(state.tokens.shape, dtype=torch.float64, device=ids.device)
        of_start = (is_closed & kept).gather(1, order)
        state.extra["is_closed"] = pad(of_start, (0, state.width - order.shape[1]))
        if call.log is not None:
            fields = {"row": torch.arange(len(ids), device=ids.device)[:, None], "step": torch.tensor(0)}
            position = (mask.cumsum(dim=-1) - 1).flip(1)
            call.log.add(DELETE, blank.flip(1), position=position, token=ids.flip(1), **fields)
        return state

    def _prepare_prompt(self: Any, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts with their `[BOS]`, padded on the left, their mask, and (B, 1) which of them are filled in."""
        config, bos_id = self.config, self.config.bos_token_id
        ids, mask = self.aligned_prompts(input_ids, attention_mask, [bos_id])
        is_filled = ((ids == config.mask_token_id) & mask).any(dim=-1, keepdim=True)
        # Of a row that is filled in, [BOS] stands before all the rest.
        begins = (ids == bos_id).gather(1, mask.int().argmax(dim=-1, keepdim=True))
        first = torch.full_like(ids[:, :1], bos_id)
        ids, mask = left_align_padding(torch.cat((first, ids), dim=1), torch.cat((is_filled & ~begins, mask), dim=1))
        ids, mask = self.completed_prompts(ids, mask, None, bos_id, ~is_filled[:, 0])
        return ids, mask, is_filled

    def generation_step(self: Any, call: GenerationCall, state: FlexMDMState, step: int) -> bool:
        """Masks that are due become tokens, and new ones come; False if no row is open.

        Rows in which neither can happen in this step are left out of its forward pass.
        """
        masked, sampler, is_last = state.masks(), state.sampler, step >= state.num_steps
        now, then = ((1 - (step + k) / state.num_steps.double()).clamp(min=0) for k in (0, 1))
        absent, no_more_come = [self.insertion_schedule.mask_probability(t) for t in (now, then)], then == 0
        if sampler.insertion_steps is not None:
            absent = [share * (step + k < sampler.insertion_steps) for k, share in enumerate(absent)]
            no_more_come = no_more_come | (step + 1 >= sampler.insertion_steps)
        comes = (absent[0] - absent[1]) / absent[0].where(absent[0] > 0, 1.0)
        due = masked & ((state.extra["turns_at"] >= then[:, None]) | is_last[:, None])
        may_grow = ~state.finished & (comes > 0) & (state.lengths < state.capacity)
        called = ~state.finished & (is_last | due.any(dim=-1) | may_grow)
        gaps, candidates = state.open_gaps() & may_grow[:, None], sampler.candidates(masked, due)
        sizes = ((state.lengths * called).max(), candidates.sum(), (~state.finished).sum())
        rows, num_gaps, (width, num_candidates, num_open) = shape_of_call(called, gaps, *sizes)
        if num_open == 0 or len(rows) == 0:
            return num_open > 0
        width = rounded_up(width, state.width, rows.device)
        num_candidates = rounded_up(num_candidates, len(rows) * width, rows.device)
        masked, due, candidates = (of_masks[rows, :width] for of_masks in (masked, due, candidates))
        gaps, seeds = gaps[rows, : width + 1], call.seeds[rows]
        inputs = self._inputs(state, rows, gaps, candidates, num_gaps, num_candidates)
        ids, logits_index = inputs["input_ids"], inputs["logits_index"]

        def unmask(hidden_states, head, suppressed_ids) -> torch.Tensor:
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            logits = logits.processed(call.config.suppress_tokens, call.logits_processor, ids, logits_index, step)
            chosen = sampler.chosen(logits, candidates, due, seeds)
            uniforms = uniform(seeds[:, None], step, torch.arange(width, device=rows.device), _TOKEN)
            return _drawn(logits, candidates, num_candidates, chosen, uniforms, call.config)

        outputs = self(**inputs, times=now[rows].float(), head_function=unmask)
        state.nfe += called
        tokens = outputs.head_output
        # The masks that stay keep the times of those that were not due, whichever these were.
        turns_at = state.extra["turns_at"][rows, :width]
        later = turns_at.flatten()[true_indices(masked & ~due, masked.numel())]
        state.extra["turns_at"][rows, :width] = turns_at.masked_scatter(masked & (tokens < 0), later)
        slots, inserted = self._insertions(call, state, rows, gaps, outputs, comes[rows], step)
        masks = torch.full_like(slots, self.config.mask_token_id)
        state.apply(rows, step, slots, masks, inserted, substitutes=pad(tokens, (0, state.width - width), value=-1))
        self._time_new_masks(state, rows, seeds, step, [share[rows] for share in absent])
        nothing_left = (no_more_come | (state.lengths == state.capacity)) & ~state.masks().any(dim=-1)
        state.finish(rows, (is_last | nothing_left)[rows])
        return True

    def _inputs(self: Any, state, rows, gaps, candidates, num_gaps: int, num_candidates: int):
        """What the network sees, with the end token where it reads one, and the indices of the gaps and the masks."""
        ahead, end = state.prompt.shape[1], self.config.end_token_id
        ids, mask, _ = state.view(rows, candidates.shape[1])
        if end is not None:
            at = ahead + state.lengths[rows, None]
            ids, mask = pad(ids, (0, 1), value=self.config.pad_token_id).scatter(1, at, end), pad(mask, (0, 1))
            mask = mask.scatter(1, at, True)
        of_gaps = pad(gaps, (ahead - (end is None), 0))
        of_masks = pad(candidates, (ahead, int(end is not None)))
        index = {"gap_index": true_indices(of_gaps, num_gaps), "logits_index": true_indices(of_masks, num_candidates)}
        return {"input_ids": ids, "attention_mask": mask, **index}

    def _insertions(self: Any, call, state, rows, gaps, outputs, comes: torch.Tensor, step: int):
        """Slots (R, K) of the masks that come in a step, each missing token with the probability `comes` (R,)."""
        seeds, sampler, capacity = call.seeds[rows, None], state.sampler, state.capacity[rows, None]
        numbers = torch.arange(state.width + 1, device=rows.device)
        if not len(outputs.expected_counts):
            return torch.zeros_like(seeds), torch.zeros_like(seeds, dtype=torch.bool)
        # Which of the gaps each slot is.
        slots = (gaps.flatten().cumsum(dim=0) - 1).view_as(gaps).clamp(min=0)
        expected = outputs.expected_counts.double()[slots].masked_fill(~gaps, 0.0)
        if sampler.counts == "independent" and outputs.count_logits is None:
            rates = (expected * comes[:, None]).cumsum(dim=-1)
            # A Poisson number of masks in all, of which each chooses its gap.
            at_most = torch.special.gammaincc(numbers.double() + 1, rates[:, -1:])
            num = (at_most <= uniform(seeds, step, 0, _NUMBER)).sum(dim=-1, keepdim=True).minimum(capacity + 1)
            total = rates[:, -1:].contiguous()
            below = torch.minimum(uniform(seeds, step, numbers, _GAP) * total, total.nextafter(torch.zeros_like(total)))
            chosen = torch.searchsorted(rates, below, right=True).clamp(max=gaps.shape[1] - 1)
            return chosen, numbers < num
        if sampler.counts == "rounded":
            offset = uniform(seeds, step, 0, _NUMBER) if call.config.do_sample else 0.5
            counts = (expected.cumsum(dim=-1) + offset).floor().long().diff(dim=-1, prepend=torch.zeros_like(seeds))
        else:
            logits, uniforms = outputs.count_logits[slots], uniform(seeds, step, numbers[: gaps.shape[1]], _NUMBER)
            counts = sample_categorical(logits, uniforms) if call.config.do_sample else logits.argmax(dim=-1)
            counts = counts.masked_fill(~gaps, 0)
        # Of all that are missing, whatever there is capacity for, each comes or not; what exceeds it is then left out.
        numbers = torch.arange(self.config.max_position_embeddings, device=rows.device)
        missing, is_missing = slots_of_counts(counts, len(numbers))
        return missing, is_missing & (uniform(seeds, step, numbers, _COMES) < comes[:, None])

    def _time_new_masks(self: Any, state, rows, seeds, step: int, absent: list[torch.Tensor]) -> None:
        """Give each new mask its time to become a token, as the data had it.

        `absent` are the shares (R,) that are absent before the step and after it.
        """
        insertion, unmasking = self.insertion_schedule, self.unmasking_schedule
        columns = torch.arange(state.width, device=rows.device)
        came, turns = (uniform(seeds[:, None], step, columns, which) for which in (_CAME, _TURNS))
        before, after = (share[:, None] for share in absent)
        came_at = insertion.inverse(1 - (after + came * (before - after)))
        # A mask that came at s is still one at t with probability (1 - beta_t) / (1 - beta_s).
        turns_at = unmasking.inverse(1 - turns * unmasking.mask_probability(came_at))
        is_new = (state.steps[rows] == step) & (state.tokens[rows] == self.config.mask_token_id)
        state.extra["turns_at"][rows] = torch.where(is_new, turns_at, state.extra["turns_at"][rows])


def _drawn(
    logits: LogitsOnDemand, masked: torch.Tensor, num_masks: int, chosen: torch.Tensor, uniforms: torch.Tensor, config
) -> torch.Tensor:
    """Tokens (R, W) for the `chosen` ones of the masks, -1 elsewhere; `logits` are those of the masks."""
    most = int(chosen.sum()) if is_synchronous(chosen.device) else num_masks
    index = true_indices(chosen, most)
    numbers = (masked.flatten().cumsum(dim=0) - 1).clamp(min=0)
    tokens = draw_tokens(logits[numbers[index]], uniforms.flatten()[index], config)
    return torch.full_like(chosen, -1, dtype=torch.int64).masked_scatter(chosen, tokens)
