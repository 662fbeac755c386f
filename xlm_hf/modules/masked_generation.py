"""What the generation of masked language models shares: options, prompts, and the forward pass of a step."""

from functools import partial
from typing import Any, ClassVar

import torch

from .canvas import MaskedCanvas
from .devices import true_indices
from .generation import GenerationCall, NonAutoregressiveGenerationConfig, NonAutoregressiveGenerationMixin, Sampler
from .reverse_process import CanvasProcess, ConfidenceSampler
from .vocabulary_head import LogitsOnDemand


class CanvasGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of families that fill a canvas: those of the base class, a sampler, and the sampler's options.

    Attributes:
        sampler: name of the sampler, whose own options are given beside the others: "confidence", see
            `ConfidenceSampler`, and whatever else is in `samplers`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"confidence": ConfidenceSampler}

    sampler: str = "confidence"


class MaskedGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to a masked language model, which fills a canvas.

    The model's `config` names `mask_token_id`, `bos_token_id`, `pad_token_id` and `eos_token_id`; its forward takes
    `logits_index`, flat indices into (B x L), and `head_function`.
    """

    writes_once: ClassVar[bool] = False  # see `CanvasProcess`

    def open_generation(self, call: GenerationCall, input_ids, attention_mask, **inputs) -> CanvasProcess:
        """A canvas after each prompt; the further inputs are those of `open_canvas`."""
        canvas = self.open_canvas(call, input_ids, attention_mask, **inputs)
        schedule = getattr(self.config, "noise_schedule", "log_linear")
        sampler = call.config.make_sampler()
        return CanvasProcess(canvas, sampler, call, self.is_told_the_time, self.writes_once, schedule)

    def generation_step(self, call: GenerationCall, state: CanvasProcess, step: int) -> bool:
        """A step of the sampler."""
        return state.take_step(partial(self.predict, call, state.canvas, step), step)

    @property
    def is_told_the_time(self) -> bool:
        """Whether the network is told alpha, so that a step without a change still needs a call."""
        return False

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model's forward is told of alpha (R,), the share of the canvas that is clean."""
        return {}

    def open_canvas(self, call: GenerationCall, input_ids, attention_mask, canvas_lengths=None) -> MaskedCanvas:
        """Check prompts and put a canvas after each.

        A prompt without mask tokens gets a canvas of as many tokens as the options leave it; `bos_token_id` is put
        between the two, if the model has one, unless the prompt ends with it, or is the beginning of a text and begins
        with it. A prompt with mask tokens is a canvas itself, and nothing is appended.

        Args:
            call: the call of `generate`.
            input_ids (torch.Tensor): (B, P) prompts, padded on either side.
            attention_mask (torch.Tensor | None): (B, P), 1 for tokens; by default everything but `pad_token_id`.
            canvas_lengths (torch.Tensor | None): (B,) length of each row's canvas, at most that; 0 appends nothing, so
                that only the mask tokens of the prompt are filled.

        Raises:
            ValueError: for an id outside the vocabulary, a `[BOS]` inside a prompt, or a prompt that leaves no
                position.
        """
        config = self.config
        empty = [] if config.bos_token_id is None else [config.bos_token_id]
        input_ids, mask = self.aligned_prompts(input_ids, attention_mask, empty)
        if canvas_lengths is None:
            extended = ~((input_ids == config.mask_token_id) & mask).any(dim=-1)
        else:
            extended = canvas_lengths > 0
        input_ids, mask = self.completed_prompts(input_ids, mask, None, config.bos_token_id, extended)
        is_guided = getattr(call.config, "guidance_scale", None) is not None
        if is_guided and not extended.all():
            raise ValueError("guidance_scale is about prompts, and a prompt with mask tokens is filled in: unset it.")
        lengths = self._canvas_lengths(call, mask.sum(dim=-1), extended)
        if canvas_lengths is not None:
            lengths = torch.minimum(lengths, canvas_lengths)
        special = (config.mask_token_id, config.pad_token_id, config.eos_token_id)
        canvas = MaskedCanvas(input_ids, mask, lengths, *special, call.log)
        canvas.passes_per_call = 2 if is_guided else 1
        return canvas

    def _canvas_lengths(
        self, call: GenerationCall, prompt_lengths: torch.Tensor, extended: torch.Tensor
    ) -> torch.Tensor:
        longest, positions = int(prompt_lengths.max()), self.config.max_position_embeddings
        if longest > positions:
            raise ValueError(f"The input has {longest} tokens and the model has {positions} positions: shorten it.")
        lengths = torch.zeros_like(prompt_lengths)
        if extended.any():
            lengths[extended] = self.capacity_after(call, prompt_lengths[extended])
        return lengths

    def predict(
        self: Any, call: GenerationCall, canvas: MaskedCanvas, step: int, function, rows, wanted, num_wanted: int, alpha
    ) -> Any:
        """One forward pass over `rows` (R,), and what `function` makes in it of the logits at the `wanted` (R, L).

        They come in reading order, `num_wanted` of them, after the options' `suppress_tokens` and the logits processor
        (see `LogitsOnDemand.processed`). With the option `guidance_scale` they are guided by the prompts.
        """
        ids, index = canvas.ids[rows], true_indices(wanted, num_wanted)
        scale = getattr(call.config, "guidance_scale", None)

        def head_function(hidden_states, head, suppressed_ids):
            logits = LogitsOnDemand(guided(hidden_states, scale), head, suppressed_ids)
            return function(logits.processed(call.config.suppress_tokens, call.logits_processor, ids, index, step))

        mask, of_seen = canvas.attention_mask[rows] if canvas.is_padded or scale is not None else None, index
        inputs = {"input_ids": ids, "attention_mask": mask, **self.time_inputs(alpha)}
        if scale is not None:
            # Once as they are, and once without their prompts.
            inputs = {name: torch.cat((x, x)) for name, x in inputs.items()}
            inputs["attention_mask"][len(ids) :, : canvas.prompt_width] &= (
                canvas.prompt[rows] == self.config.bos_token_id
            )
            of_seen = torch.cat((index, index + ids.numel()))
        return self(logits_index=of_seen, head_function=head_function, **inputs).head_output


def guided(hidden_states: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Hidden states (S, H) whose logits are scale x the first half's + (1 - scale) x the second's; all without a scale.

    The head is a linear map, so that what is true of logits is true of what they are made of.
    """
    if scale is None:
        return hidden_states
    given, without = hidden_states.chunk(2)
    return scale * given + (1 - scale) * without
