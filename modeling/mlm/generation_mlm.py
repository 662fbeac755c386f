"""Generation by unmasking: a canvas of mask tokens, filled a few positions at a time, or all at once and again."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.devices import shape_of_call
from xlm_hf.modules.generation import GenerationCall, Sampler
from xlm_hf.modules.generation_output import NonAutoregressiveGenerationOutput
from xlm_hf.modules.masked_generation import CanvasGenerationConfig, MaskedGenerationMixin
from xlm_hf.modules.reverse_process import CanvasProcess, CanvasSampler, ConfidenceSampler
from xlm_hf.modules.unmasking import commit_ranks, draw_tokens


@dataclass
class MaskPredictSampler(CanvasSampler):
    """Mask-predict (arXiv 1904.09324): fill the canvas, mask the least certain tokens again, and so on.

    Step i of T, from 0, fills all masks of a canvas of n positions. Then the floor(n (T - i - 1) / T) tokens of the
    lowest scores are masked again; of equal ones those further left. The score of a token is its probability when it
    was written, by the model's own distribution.

    Attributes:
        num_steps: T; None means 10, as published.
        num_lengths: of a model that predicts lengths: how many of the most probable ones are decoded. The text of the
            largest mean log-score is kept; the forward passes of all count.
    """

    num_steps: PositiveInt | None = None
    num_lengths: PositiveInt = 1

    writes_behind_the_end: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.num_steps = self.num_steps or 10

    def step(self, process: CanvasProcess, predict, number: int) -> bool:
        """One forward pass over the rows that are not done."""
        canvas, eligible, is_open = process.canvas, process.eligible(), process.is_open()
        rows, num_eligible, _ = shape_of_call(is_open, eligible)
        if num_eligible == 0:
            return False
        canvas.nfe += is_open
        # A position is drawn anew each time that it is written.
        wanted = eligible[rows]
        uniforms = uniform(process.seeds[rows, None], process.clock[rows, None], canvas.positions[rows])

        def fill(logits) -> tuple[torch.Tensor, torch.Tensor]:
            scores = logits[:]
            tokens = draw_tokens(scores, uniforms[wanted], process.config)
            return tokens, scores.softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)

        alpha = (1 - canvas.masked.sum(dim=-1).double() / process.sizes)[rows].float()
        tokens, scores = predict(fill, rows, wanted, num_eligible, alpha)
        canvas.commit(rows, wanted, tokens, process.clock[rows, None])
        process.confidence[rows] = process.confidence[rows].masked_scatter(wanted, scores)
        in_block, steps = process.in_block(), process.num_steps()
        num_masks = in_block.sum(dim=-1) * (steps - process.step - 1).clamp(min=0) // steps
        remasked = in_block & (commit_ranks(-process.confidence, in_block) < num_masks[:, None])
        canvas.ids.masked_fill_(remasked, canvas.mask_token_id)
        canvas.masked |= remasked
        return True


class MLMGenerationConfig(CanvasGenerationConfig):
    """Options of `MLMForMaskedLM.generate`: a sampler (see `ConfidenceSampler` and `MaskPredictSampler`) and its own.

    `max_new_tokens` is the size of the canvas, or the greatest length that a model with a length head may choose. With
    `order="random"`, `do_sample=True` and one token a step a decode follows the model's law in a random order exactly;
    every other rule trades that for quality or speed.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"confidence": ConfidenceSampler, "mask_predict": MaskPredictSampler}


class CandidateProcess(CanvasProcess):
    """A canvas for each of several lengths of a row, of which the best text is kept.

    Attributes:
        num_lengths: canvases of a row, one after the other.
        was_cut: (B,) whether the most probable length of a row was more than it may write.
        is_predicted: (B,) whether a row's length is predicted; the others are only filled in.
    """

    num_lengths: int
    was_cut: torch.Tensor
    is_predicted: torch.Tensor

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """The best canvas of each row by the mean log-score of its tokens; the forward passes are those of all."""
        canvas, is_canvas = self.canvas, self.blocks >= 0
        scores = self.confidence.log().masked_fill(~is_canvas, 0.0).sum(dim=-1) / is_canvas.sum(dim=-1).clamp(min=1)
        # An empty text has no score: it is kept where its length is the most probable one.
        number = torch.arange(len(scores), device=scores.device) % self.num_lengths
        scores = scores.masked_fill(~is_canvas.any(dim=-1) & (number > 0), -torch.inf)
        best = scores.view(-1, self.num_lengths).argmax(dim=-1)
        rows = torch.arange(len(best), device=best.device) * self.num_lengths + best
        canvas.stopped |= (self.is_predicted & ~self.was_cut).repeat_interleave(self.num_lengths)
        # One more pass has named the lengths; rows that are only filled in need none.
        nfe = canvas.nfe.view(-1, self.num_lengths).sum(dim=-1) + self.is_predicted
        output: Any = super().output(return_history)
        if canvas.log is not None:
            canvas.log.keep(rows)
        width = canvas.prompt_width + int(is_canvas[rows, canvas.prompt_width :].sum(dim=-1).max())
        output.sequences, history = output.sequences[rows, :width], output.history
        output.history = None if history is None else history[rows, :width]
        written = output.tokens_per_forward[rows] * canvas.nfe[rows]
        output.tokens_per_forward, output.nfe = written / nfe.clamp(min=1), nfe
        output.finish_reason = [output.finish_reason[row] for row in rows.tolist()]
        return output


class MLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the masked language model.

    It also takes `canvas_lengths` (B,), the length of each row's canvas where that is given and not to be modelled; 0
    only fills in the prompt's mask tokens. Without them a model with a length head chooses the lengths: the most
    probable one, or as many as `num_lengths` says. They are those of the texts, without an end.
    """

    generation_inputs = ("canvas_lengths",)
    writes_once = True

    def open_generation(self, call: GenerationCall, input_ids, attention_mask, **inputs) -> CanvasProcess:
        """A canvas after each prompt, or one for each length that is tried.

        Raises:
            ValueError: for several lengths of a model that predicts none, or of a decode that somebody follows.
        """
        num_lengths, lengths = getattr(call.config, "num_lengths", 1), inputs.get("canvas_lengths")
        if lengths is not None and (lengths.shape != (len(input_ids),) or lengths.min() < 0):
            found = lengths.tolist()
            raise ValueError(f"canvas_lengths must be {len(input_ids)} numbers from 0 on, one a row, and is {found}.")
        predicts = self.config.max_canvas_length is not None and lengths is None
        if num_lengths > 1 and not predicts:
            raise ValueError(f"num_lengths is {num_lengths}, and this call predicts no length: set it to 1.")
        if num_lengths > 1 and call.is_watched:
            raise ValueError(
                f"num_lengths is {num_lengths}: nothing can follow, steer or stop a decode of several canvases of a "
                "row, so set it to 1, or leave out the streamer, logits processor or stopping criteria."
            )
        if not predicts:
            return super().open_generation(call, input_ids, attention_mask, **inputs)
        prompts, mask, lengths, was_cut, capacity = self._predict_lengths(call, input_ids, attention_mask, num_lengths)
        call.seeds = call.seeds.repeat_interleave(num_lengths)
        ids, mask = (x.repeat_interleave(num_lengths, dim=0) for x in (prompts, mask))
        canvas = self.open_canvas(call, ids, mask, canvas_lengths=lengths.flatten())
        process = CandidateProcess(canvas, call.config.make_sampler(), call, writes_once=self.writes_once)
        process.num_lengths, process.was_cut, process.is_predicted = num_lengths, was_cut, capacity > 0
        return process

    def _predict_lengths(self: Any, call: GenerationCall, input_ids, attention_mask, num_lengths: int):
        """Prompts (B, P), their mask, most probable lengths (B, n), whether one was cut, and capacities (B,)."""
        # As large as the options allow, for the prompts in their layout and the capacity of each row.
        canvas = self.open_canvas(call, input_ids, attention_mask)
        P = canvas.prompt_width
        prompts, mask, capacity = canvas.prompt, canvas.attention_mask[:, :P], canvas.attention_mask[:, P:].sum(dim=-1)
        # The head speaks of the whole text behind [BOS], of which a prompt may hold the beginning.
        at = ((prompts == self.config.bos_token_id) & mask).int().argmax(dim=-1)
        index, begun = torch.arange(len(prompts), device=prompts.device) * P + at, (P - 1 - at)[:, None]
        logits = self(prompts, attention_mask=mask, logits_index=index[:0], length_index=index).length_logits
        left = torch.arange(logits.shape[-1], device=logits.device) - begun
        was_cut = left.gather(1, logits.argmax(dim=-1, keepdim=True))[:, 0] > capacity
        logits = logits.masked_fill((left < 0) | (left > capacity[:, None]), -torch.inf)
        # Where fewer lengths are possible, the most probable one is tried again.
        best = logits.topk(min(num_lengths, logits.shape[-1]), dim=-1)
        lengths = torch.where(best.values > -torch.inf, best.indices, best.indices[:, :1]) - begun
        lengths = torch.cat((lengths, lengths[:, :1].expand(-1, num_lengths - lengths.shape[1])), dim=1)
        return prompts, mask, lengths.clamp(min=0).minimum(capacity[:, None]), was_cut, capacity
