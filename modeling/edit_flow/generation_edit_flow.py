"""Generation by an edit flow: tokens are inserted, deleted and substituted at the rates that the network gives."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import pad

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.edits import EditBuffer
from xlm_hf.modules.generation import (
    GenerationCall,
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
    Sampler,
)
from xlm_hf.modules.unmasking import draw_where
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

INSERT, DELETE, SUBSTITUTE = range(3)  # kinds of edits, in the last dimension of rates
# Last counter of a random number: what it decides; the first three are whether a slot and a token are edited, and how.
_INSERTED, _SUBSTITUTE, _WHEN, _WHICH, _NOISE = range(3, 8)


class EditRates(NamedTuple):
    """Rates at which edits are made, as functions of the time that is left: counts / (slack + time left).

    With no slack a count is the number of edits of a kind that are still to come: all of them are made before the time
    is over. With much of it the rate stays the same, so that fewer and fewer edits are expected as the time runs out.

    Attributes:
        counts: (..., K) for the K kinds of edits: the insertion of a token right of this one, and unless there are
            insertions alone the deletion and the substitution of this one. With `insertion_head="joint"` the insertion
            rate at `[BOS]` is that of the whole sequence, and those elsewhere mean nothing.
        slack: (..., K), greater than 0.
    """

    counts: torch.Tensor
    slack: torch.Tensor

    def expected(self, time_left: torch.Tensor) -> torch.Tensor:
        """Edits (..., K) expected in the time that is left, at the rate of now: time left x rate."""
        return self.counts * (time_left / (self.slack + time_left))

    def between(self, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
        """Edits (..., K) expected while the time left falls from `now` to `then`: the integral of the rate."""
        return self.counts * torch.log((self.slack + now) / (self.slack + then))


@dataclass
class TauLeapingSampler(Sampler):
    """All edits of a step at once, at rates that are frozen but for the time (arXiv 2506.09018, section 3).

    A slot gets at most one token in a step. Which edits are made is drawn even without `do_sample`.

    Attributes:
        num_steps: steps from the beginning to the text; None means one for each token that a row may write.
    """

    num_steps: PositiveInt | None = None

    def chosen(self, edits: torch.Tensor, now, then, waited, seeds, step: int, do_sample: bool):
        """The edits of a step, from those that are expected in it.

        Args:
            edits: (R, W + 1, 3) expected edits of each slot, and of the token left of it.
            now: (R,) the time that is left before the step.
            then: (R,) the time that is left after it.
            waited: (R,) how many edits have been expected since the last one, without any.
            seeds: (R,) of the rows.
            step: its number.
            do_sample: whether choices are drawn.

        Returns:
            (R, W + 1, 3) bool, which are made, and (R,) the time that is left then.
        """
        numbers = torch.arange(edits.shape[1], device=edits.device)
        inserts, changes, kinds = (uniform(seeds[:, None], step, numbers, what) for what in range(3))
        expected = edits[..., DELETE] + edits[..., SUBSTITUTE]
        is_changed, is_deleted = changes < -torch.expm1(-expected), kinds * expected < edits[..., DELETE]
        is_inserted = inserts < -torch.expm1(-edits[..., INSERT])
        return torch.stack((is_inserted, is_changed & is_deleted, is_changed & ~is_deleted), dim=-1), then


@dataclass
class EventSampler(TauLeapingSampler):
    """One edit after the other, each by a forward pass of its own.

    Within a step the rates are frozen until an edit is made. If none is made before the step ends, the network looks
    again there; without this, an edit whose count is frozen above 0 would almost surely be made, however unlikely it
    becomes. Without `do_sample` an edit is made when it has become as likely as not since the last one, however many
    steps that takes, and it is the likeliest.

    Attributes:
        num_steps: how often at least the network looks again; None means once for each token that a row may write.
    """

    def chosen(self, edits: torch.Tensor, now, then, waited, seeds, step: int, do_sample: bool):
        """See `TauLeapingSampler`; the time of an edit is where the expected edits, spread evenly, reach its draw."""
        of_rows = edits.flatten(1)
        cumulative = of_rows.cumsum(dim=-1)
        total = cumulative[:, -1]
        if do_sample:
            until = -torch.log1p(-uniform(seeds, step, 0, _WHEN))
            below = uniform(seeds, step, 0, _WHICH) * total
            below = torch.minimum(below, total.nextafter(torch.zeros_like(total)))
            which = torch.searchsorted(cumulative, below[:, None], right=True).clamp(max=of_rows.shape[1] - 1)
        else:
            until, which = (math.log(2) - waited).clamp(min=0), of_rows.argmax(dim=-1, keepdim=True)
        happens = until < total
        made = torch.zeros_like(of_rows, dtype=torch.bool).scatter_(1, which, happens[:, None]).view_as(edits)
        return made, torch.where(happens, now - (now - then) * (until / total.where(happens, 1.0)), then)


class EditFlowGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `EditFlowForEditLM.generate`, beside those of the base class.

    Attributes:
        sampler: "tau_leaping", all edits of a step at once; "event", one edit after the other. Their options are those
            of `TauLeapingSampler` and `EventSampler`.
        guidance_scale: w of classifier-free guidance (arXiv 2207.12598): rates become r_0^(1 - w) r^w, and logits
            (1 - w) z_0 + w z, r_0 and z_0 being those without the prompt, in two forward passes. None is w = 1, in one.
            The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"tau_leaping": TauLeapingSampler, "event": EventSampler}

    sampler: str = "tau_leaping"
    guidance_scale: float | None = None


class EditFlowState(EditBuffer):
    """The rows of a decode and their times.

    Attributes:
        sampler: decides which edits a step makes.
        num_steps: (B,) steps of each row's time grid.
        window: (B,) the step of the grid that each row is in.
        time_left: (B,) float64.
        waited: (B,) float64, edits that were expected since the last one.
    """

    sampler: TauLeapingSampler
    num_steps: torch.Tensor
    window: torch.Tensor
    time_left: torch.Tensor
    waited: torch.Tensor


class EditFlowGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to the edit flow. Prompts read `[CLS] prompt [BOS]`; a bare one is wrapped.

    With the coupling "source", `generate` takes the texts to be edited as `source_ids` (B, N), and `source_mask` (B,
    N), 1 for their tokens; by default all but padding.
    """

    generation_inputs: ClassVar[tuple[str, ...]] = ("source_ids", "source_mask")

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> EditFlowState:
        """Sequences that hold after their prompts what the flow begins with."""
        special = (self.config.cls_token_id, self.config.bos_token_id)
        prompt, mask = self.completed_prompts(input_ids, attention_mask, *special)
        capacity = self.capacity_after(call, mask.sum(dim=-1))
        start, lengths = self._start(call, len(prompt), **inputs)
        state = EditFlowState(prompt, mask, capacity, self.config.pad_token_id, call.log, start, lengths)
        state.sampler = call.config.make_sampler()
        num_steps = state.sampler.num_steps
        state.num_steps = torch.full_like(capacity, num_steps) if num_steps else capacity.clone()
        state.window, state.time_left = torch.zeros_like(capacity), torch.ones_like(capacity, dtype=torch.float64)
        state.waited = torch.zeros_like(state.time_left)
        return state

    def _start(self: Any, call: GenerationCall, B: int, source_ids=None, source_mask=None):
        """What the flow begins with, (B, N) padded on the right, and how much of it there is (B,); None for nothing."""
        config = self.config
        if config.coupling != "source" and (source_ids is not None or source_mask is not None):
            raise ValueError(f"This model begins with {config.coupling!r} and takes no source_ids: leave them out.")
        if config.coupling == "empty":
            return None, None
        if config.coupling == "uniform":
            suppressed = {*(config.suppressed_ids or ()), *(call.config.suppress_tokens or ())}
            writable = [i for i in range(config.vocab_size) if i not in suppressed]
            numbers = torch.arange(config.noise_length, device=self.device)
            draws = uniform(call.seeds[:, None], 0, numbers, _NOISE) * len(writable)
            start = torch.tensor(writable, device=self.device)[draws.long()]
            return start, torch.full_like(call.seeds, len(numbers))
        special_ids = [config.cls_token_id, config.bos_token_id]
        return self.source_tensors(B, special_ids, source_ids, source_mask)

    def generation_step(self: Any, call: GenerationCall, state: EditFlowState, step: int) -> bool:
        """One forward pass over the open rows, and the edits that it leads to; False if none is open."""
        rows, num_slots, width, _ = state.shape_of_step()
        if num_slots == 0:
            return False
        guided, num_steps = call.config.guidance_scale is not None, state.num_steps[rows]
        now, window = state.time_left[rows], state.window[rows]
        then = self.noise_schedule.mask_probability(1 - (window + 1).double() / num_steps)
        ids, mask, exists = state.view(rows, width)
        index, of_slots = state.slots(exists, num_slots)

        def edit(hidden_states, head, suppressed_ids, rates: EditRates):
            scale, of_rows = call.config.guidance_scale, (index // ids.shape[1]).repeat(1 + guided)
            edits = rates.between(now[of_rows, None], then[of_rows, None])
            hidden_states = hidden_states.view(-1, 1 + guided, len(index), hidden_states.shape[-1])
            if guided:
                given, free = edits.chunk(2)
                edits = free ** (1 - scale) * given**scale
                # The head is linear, so this is the guidance of its logits.
                hidden_states = hidden_states[:, 1:] + scale * (hidden_states[:, :1] - hidden_states[:, 1:])
            options = (call.config.suppress_tokens, call.logits_processor, ids, index, step)
            logits = [LogitsOnDemand(x[0], head, suppressed_ids).processed(*options) for x in hidden_states]
            return self._edits(call, state, rows, logits, edits, of_slots, step, now, then)

        inputs = {"attention_mask": mask, "time_left": now.float(), "slot_index": index}
        if guided:
            # The same rows without their prompts: of these only [CLS] and [BOS] are seen.
            columns, P = torch.arange(ids.shape[1], device=ids.device), state.prompt.shape[1]
            free = mask & ((columns >= P - 1) | (columns == mask.int().argmax(dim=-1, keepdim=True)))
            inputs = {"attention_mask": torch.cat((mask, free)), "time_left": inputs["time_left"].repeat(2)}
            inputs["slot_index"] = torch.cat((index, index + ids.numel()))
        output = self(ids.repeat(1 + guided, 1), head_function=edit, **inputs)
        state.nfe += (~state.finished) * (1 + guided)
        made, time_left, tokens, substitutes = output.head_output
        ends = time_left == then
        state.time_left[rows], state.window[rows] = time_left, window + ends
        slots = torch.arange(width + 1, device=rows.device).expand_as(tokens)
        changes = {}
        if substitutes is not None:
            changes["deleted"] = pad(made[:, 1:, DELETE], (0, state.width - width))
            changes["substitutes"] = pad(substitutes[:, 1:], (0, state.width - width), value=-1)
        state.apply(rows, step, slots, tokens, made[..., INSERT], **changes)
        state.finish(rows, ends & (window + 1 == num_steps))
        return True

    def _edits(self: Any, call, state, rows, logits, edits, of_slots, step, now, then):
        """The edits of a step, the time after it, and tokens (R, W + 1): the inserted ones, and those for others."""
        seeds, exists = call.seeds[rows], of_slots >= 0
        edits = pad(edits.double()[of_slots].masked_fill(~exists[..., None], 0.0), (0, 3 - edits.shape[-1]))
        if self.config.insertion_head == "joint":
            log_mass = logits[0].statistic("log_mass")[of_slots].double().masked_fill(~exists, -torch.inf)
            edits[..., INSERT] = edits[:, :1, INSERT] * log_mass.softmax(dim=-1)
        # [BOS] is not edited.
        edits[:, 0, DELETE:] = 0.0
        waited = state.waited[rows]
        made, time_left = state.sampler.chosen(edits, now, then, waited, seeds, step, call.config.do_sample)
        state.waited[rows] = (waited + edits.flatten(1).sum(dim=-1)).masked_fill(made.flatten(1).any(dim=-1), 0.0)
        numbers = torch.arange(of_slots.shape[1], device=rows.device)
        draws = [uniform(seeds[:, None], step, numbers, what) for what in (_INSERTED, _SUBSTITUTE)]
        tokens = draw_where(logits[0], of_slots, made[..., INSERT], draws[0], call.config)
        if len(logits) == 1:
            return made, time_left, tokens, None
        own = pad(state.tokens[rows, : of_slots.shape[1] - 1], (1, 0))
        return (
            made,
            time_left,
            tokens,
            draw_where(logits[1], of_slots, made[..., SUBSTITUTE], draws[1], call.config, own),
        )
