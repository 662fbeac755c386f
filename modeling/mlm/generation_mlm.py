"""Generation by unmasking: a canvas of mask tokens, filled a few positions at a time."""

from functools import partial
from typing import Any

import torch
from transformers.generation import LogitsProcessorList

from xlm_hf.modules.canvas import MaskedCanvas, MaskedGenerationMixin, UnmaskingGenerationConfig, unmask
from xlm_hf.modules.counter_random import random_bits, uniform
from xlm_hf.modules.generation import NonAutoregressiveGenerationOutput, row_seeds, shape_of_call


class MLMGenerationConfig(UnmaskingGenerationConfig):
    """Options of `MLMForMaskedLM.generate`: those of unmasking by a rule.

    `max_new_tokens` is the size of the canvas. With `order="random"`, `do_sample=True` and one token a step a decode
    follows the model's law in a random order exactly; every other rule trades that for quality or speed.
    """


class MLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the masked language model."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: MLMGenerationConfig | None = None,
        streamer: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        seed: int | list[int] | torch.Tensor | None = None,
        canvas_lengths: torch.Tensor | None = None,
        **overrides,
    ) -> NonAutoregressiveGenerationOutput | torch.Tensor | None:
        """Write sequences by filling in mask tokens.

        Each forward pass looks at a whole row, chooses some of its masked positions by the rule of the options, and
        commits a token at each, drawn independently of the others that are committed with it. The prompt is never
        changed, but for mask tokens in it, and what is written is never changed again.

        Args:
            input_ids: (B, P) prompts, `prompt [BOS]` or the bare prompt, which then gets its `[BOS]`; ragged prompts
                are padded on either side. A prompt that holds mask tokens is filled in, and nothing is written after
                it. None writes one sequence from an empty prompt.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            generation_config: options; the model's own by default.
            streamer: a `TextDiffusionStreamer` or its like; gets the prompt by `put`, the canvas after every step by
                `put_draft`, and the result by `put`.
            logits_processor: called as transformers does, with (masked positions, length) ids, (masked positions, V)
                logits and `cur_step`.
            seed: one integer, or one for each row (see `row_seeds`).
            canvas_lengths: (B,) length of each row's canvas, where it is given and not to be modelled; 0 only fills
                in the prompt's mask tokens.
            **overrides: single options by name.

        Returns:
            `NonAutoregressiveGenerationOutput`, or its sequences alone with `return_dict_in_generate=False`. A row
            ends with its first `eos_token_id` ("stop") or with its canvas ("length").

        Raises:
            ValueError: for an unknown option, a value out of range, an id outside the vocabulary or a prompt without
                room after it.
        """
        config = self.resolve_generation_config(generation_config, overrides)
        canvas = self.open_canvas(config, input_ids, attention_mask, canvas_lengths)
        seeds = row_seeds(seed, len(canvas.ids), canvas.ids.device)

        if streamer is not None:
            streamer.put(canvas.ids[:, : canvas.prompt_width].cpu())
        # A position is written once, so its place in the row is all that a draw needs to be told apart by.
        uniforms, step = uniform(seeds[:, None], canvas.positions, 1), 0
        while self._step(canvas, seeds, uniforms, config, logits_processor, step):
            step += 1
            if streamer is not None:
                streamer.put_draft(canvas.written().cpu())
        if streamer is not None:
            streamer.put(canvas.written().cpu())
            streamer.end()
        output = canvas.output(config.return_history)
        return output if config.return_dict_in_generate else output.sequences

    def _step(
        self, canvas: MaskedCanvas, seeds, uniforms, config: MLMGenerationConfig, logits_processor, step: int
    ) -> bool:
        """One forward pass over the rows that are not finished, after which a rule says what is written; False if none.

        The host waits for the device once, in `shape_of_call`.
        """
        is_open = canvas.masked.any(dim=-1)
        rows, num_masked, _ = shape_of_call(is_open, canvas.masked)
        if num_masked == 0:
            return False
        canvas.nfe += is_open
        masked = canvas.masked[rows]
        chosen, tokens = self.apply_to_logits(
            partial(
                unmask,
                masked=masked,
                num_masked=num_masked,
                positions=canvas.positions[rows],
                order_seeds=random_bits(seeds[rows], step) if config.order == "random" else seeds[rows],
                config=config,
                uniforms=uniforms[rows],
                steps_left=None if config.num_steps is None else config.num_steps - step,
            ),
            *(canvas, rows, masked, num_masked, config, logits_processor, step),
        )
        canvas.commit(rows, chosen, tokens, step)
        return True
