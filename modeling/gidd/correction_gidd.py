"""Correcting a finished canvas, a token at a time (arXiv 2503.04482).

A network that has seen replaced tokens can tell which ones of a text do not fit. It takes texts of its own, and those
of any family in the layout `prompt [BOS] text`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from xlm_hf.modules.canvas import MaskedCanvas
from xlm_hf.modules.checked_options import Positive, PositiveInt, Share
from xlm_hf.modules.devices import shape_of_call, true_indices
from xlm_hf.modules.generation import GenerationCall
from xlm_hf.modules.kernel_samplers import TOKEN, KernelSampler
from xlm_hf.modules.masked_generation import MaskedGenerationMixin
from xlm_hf.modules.prompts import left_align_padding
from xlm_hf.modules.reverse_process import CanvasProcess, Predict
from xlm_hf.modules.token_sampling import filter_logits, sample_categorical
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


@dataclass
class SelfCorrectionSampler(KernelSampler):
    """Writes as `KernelSampler` does, and corrects what stands there then. A row that holds a text is corrected alone.

    In a round a token is drawn at every position of the canvas. Of those that differ from the present ones the most
    probable takes its place. A row ends when the number of tokens that are the network's most probable ones has not
    risen for `correction_patience` rounds; and when it cannot rise any more.

    Attributes:
        correction_rounds: most rounds, each of one forward pass.
        correction_patience: as above.
        correction_time: the time t that the network is told, near 0.
        correction_temperature: divides the logits of the draws, which top-k and top-p filter. Without `do_sample` the
            most probable tokens are drawn.
    """

    correction_rounds: PositiveInt = 128
    correction_patience: PositiveInt = 32
    correction_time: Share = 0.01
    correction_temperature: Positive = 0.1

    takes_all_steps: ClassVar[bool] = False

    def open(self, process: CanvasProcess) -> None:
        """Begin with the corrections where a text stands."""
        canvas = process.canvas
        is_text = (canvas.masked & (canvas.ids != canvas.mask_token_id)).any(dim=-1)
        process.step = torch.where(is_text, process.num_steps(), process.step)
        self._best, self._stale = torch.full_like(process.step, -1), torch.zeros_like(process.step)

    def step(self, process: Any, predict: Predict, number: int) -> bool:
        """A step of each row that is not written, and a round of each that is."""
        if number == 0:
            process.start()
        cells = process.in_block()
        is_written = (process.step >= process.num_steps()) & cells.any(dim=-1)
        writes = self.write(process, predict, cells & ~is_written[:, None])
        return self._round(process, predict, is_written) or writes

    def _round(self, process: Any, predict: Predict, is_written: torch.Tensor) -> bool:
        """A round of the rows that are written (B,); False if there is none."""
        canvas, wanted = process.canvas, process.in_block() & is_written[:, None]
        rows, num, _ = shape_of_call(is_written, wanted)
        if num == 0:
            return False
        canvas.nfe += is_written
        wanted, ids = wanted[rows], canvas.ids[rows]
        index = true_indices(wanted, num)
        old, uniforms = ids.flatten()[index], process.draw(TOKEN)[rows].flatten()[index]

        def corrections(logits: LogitsOnDemand) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            config, scores = process.config, logits[:]
            best = scores.argmax(dim=-1)
            scores = filter_logits(scores, self.correction_temperature, config.top_k, config.top_p)
            new = sample_categorical(scores, uniforms) if config.do_sample else best
            log_p = scores.gather(1, new[:, None])[:, 0] - scores.logsumexp(dim=-1)
            return new, log_p.exp().masked_fill(new == old, 0.0), best == old

        t = torch.full(process.step.shape, self.correction_time, dtype=torch.float64, device=ids.device)
        new, gains, agrees = predict(corrections, rows, wanted, num, process.level(t)[rows].float())
        agreement = torch.zeros_like(ids).masked_scatter(wanted, agrees.long()).sum(dim=-1)
        gains = torch.zeros(ids.shape, device=ids.device).masked_scatter(wanted, gains)
        gain, at = gains.max(dim=-1, keepdim=True)
        changes = (gain > 0) & (agreement < process.sizes[rows])[:, None]
        corrected = torch.where(torch.zeros_like(wanted).scatter(1, at, changes), ids.masked_scatter(wanted, new), ids)
        canvas.rewrite(rows, corrected, process.clock[rows, None])
        self._end(process, is_written, torch.zeros_like(self._best).index_copy(0, rows, agreement))
        return True

    def _end(self, process: Any, is_written: torch.Tensor, agreement: torch.Tensor) -> None:
        """Count a round of the rows that are written (B,), with this agreement (B,), and end those that are done."""
        rises = is_written & (agreement > self._best)
        self._best = torch.where(rises, agreement, self._best)
        self._stale = torch.where(rises, 0, self._stale + is_written)
        rounds, is_best = process.step + 1 - process.num_steps(), agreement == process.sizes
        is_done = (self._stale >= self.correction_patience) | (rounds >= self.correction_rounds) | is_best
        process.canvas.masked &= ~(is_written & is_done)[:, None]


class SelfCorrectionMixin(MaskedGenerationMixin):
    """Lets `SelfCorrectionSampler` take texts: rows that go on after their `[BOS]` are finished canvases.

    `generate` also takes the texts apart from their prompts, as `source_ids` (B, N) and `source_mask` (B, N).
    """

    generation_inputs: ClassVar[tuple[str, ...]] = ("source_ids", "source_mask")

    def open_canvas(
        self,
        call: GenerationCall,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        canvas_lengths: torch.Tensor | None = None,
        source_ids: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
    ) -> MaskedCanvas:
        """As in the base class; with that sampler a canvas begins with the text after the first `[BOS]` of its row.

        A text with `[EOS]` has a canvas as long as one to be written, filled up with padding, and one without has a
        canvas of its own length. A row with mask tokens is filled in as ever.

        Raises:
            ValueError: as in the base class, for a text that is longer than its canvas, or for `source_ids` and another
                sampler.
        """
        config = self.config
        corrects = isinstance(call.config.make_sampler(), SelfCorrectionSampler)
        if source_ids is not None and not (corrects and input_ids.shape[1]):
            raise ValueError("source_ids are texts to be corrected after prompts: choose sampler='self_correction'.")
        if not corrects or not input_ids.shape[1]:
            return super().open_canvas(call, input_ids, attention_mask, canvas_lengths)
        if source_ids is not None:
            input_ids, attention_mask = self.completed_prompts(input_ids, attention_mask, None, config.bos_token_id)
            masks = [attention_mask, source_mask]
            ids = [input_ids, source_ids]
            given = [x != config.pad_token_id if m is None else m.bool() for x, m in zip(ids, masks, strict=True)]
            input_ids, attention_mask = torch.cat(ids, dim=1), torch.cat(given, dim=1)
        input_ids, mask = self.aligned_prompts(input_ids, attention_mask, [config.bos_token_id])
        has_blanks = ((input_ids == config.mask_token_id) & mask).any(dim=-1)
        is_bos = ((input_ids == config.bos_token_id) & mask).long()
        behind = (is_bos.cumsum(dim=-1) - is_bos > 0) & mask & ~has_blanks[:, None]
        lengths, ends = behind.sum(dim=-1), (behind & (input_ids == config.eos_token_id)).any(dim=-1)
        if canvas_lengths is None:
            whole = torch.full_like(lengths, config.max_position_embeddings)
            canvas_lengths = torch.where((lengths > 0) & ~ends, lengths, whole).masked_fill(has_blanks, 0)
        prompts, of_prompts = left_align_padding(input_ids, mask & ~behind)
        prompts = prompts.masked_fill(~of_prompts, config.pad_token_id)
        width = max(1, int(of_prompts.sum(dim=-1).max()))
        canvas = super().open_canvas(call, prompts[:, -width:], of_prompts[:, -width:], canvas_lengths)
        sizes = canvas.masked[:, canvas.prompt_width :].sum(dim=-1)
        excess = int((lengths - sizes).max())
        if excess > 0:
            raise ValueError(f"A text is longer than its canvas, by {excess}: raise max_new_tokens, or shorten it.")
        canvas.hold(input_ids[behind], lengths)
        return canvas
