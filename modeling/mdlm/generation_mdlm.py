"""Generation by unmasking: a canvas of masks, and in every step some of them become tokens."""

from functools import partial
from operator import itemgetter
from typing import Any

import torch
from transformers.generation import LogitsProcessorList

from xlm_hf.modules.canvas import MaskedCanvas, MaskedGenerationMixin, UnmaskingGenerationConfig, draw_tokens, unmask
from xlm_hf.modules.counter_random import random_bits, uniform
from xlm_hf.modules.generation import NonAutoregressiveGenerationOutput, row_seeds, shape_of_call, true_indices
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.unmasking import commit_ranks

_EVENT, _TOKEN, _TIME = 0, 1, 2  # last counter of a random number: what it decides


class MDLMGenerationConfig(UnmaskingGenerationConfig):
    """Options of `MDLMForMaskedDiffusion.generate`, beside those of the base class.

    `max_new_tokens` is the size of the canvas, and `num_steps` the number of steps in which "ancestral" and "remask"
    fill it; None means one for each place.

    Attributes:
        sampler: "ancestral", the reverse process on `num_steps` steps (arXiv 2406.07524); "first_hitting", its limit of
            infinitely many steps, one token at a time (arXiv 2409.02908); "remask", the reverse process in which
            tokens may be masked again (ReMDM, arXiv 2503.00307); "rule", the unmasking rules of the base class. The
            first three draw from the law of the model's process; a rule other than order "random" seeks its mode.
        block_length: places of a block; a block is finished before the next to its right is begun, and nothing is
            written after one that holds `[EOS]`. The steps are spread evenly over the blocks. None means one block.
        noise_schedule: spacing of the steps of "ancestral" and "remask", as `make_schedule` takes it.
        remasking: sigma_t, the probability that "remask" masks a token again: with sigma_max = min(1, (1 - alpha_s) /
            alpha_t), "cap" is min(eta, sigma_max), "rescale" is eta sigma_max, "conf" is eta sigma_max times the
            softmax over the written tokens of minus the probability that they had when they were written.
        eta: strength of the remasking, in (0, 1].
    """

    sampler: str = "ancestral"
    block_length: int | None = None
    noise_schedule: str = "log_linear"
    remasking: str = "cap"
    eta: float = 0.02

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        super().validate()
        self._check_choice("sampler", ("ancestral", "first_hitting", "remask", "rule"))
        make_schedule(self.noise_schedule)
        self._check_choice("remasking", ("cap", "rescale", "conf"))
        self._check_positive("block_length")
        self._check_probability("eta")
        if self.sampler == "first_hitting" and self.num_steps is not None:
            raise ValueError(
                f"num_steps is {self.num_steps}, but first_hitting makes one step for each place: unset it."
            )
        for name in ("confidence_threshold", "entropy_bound", "error_bound"):
            if self.sampler != "rule" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which only sampler='rule' knows: unset one of them."
                )


class MDLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the masked diffusion language model."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: MDLMGenerationConfig | None = None,
        streamer: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        seed: int | list[int] | torch.Tensor | None = None,
        **overrides,
    ) -> NonAutoregressiveGenerationOutput | torch.Tensor | None:
        """Write a canvas after each prompt, or fill the masks in it.

        Args:
            input_ids: (B, P) prompts, `prompt [BOS]` or the bare prompt, which then gets its `[BOS]`; ragged prompts
                are padded on either side. A prompt that holds mask tokens is filled in, and nothing is written after
                it. None writes one sequence from an empty prompt.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            generation_config: options; the model's own by default.
            streamer: a `TextDiffusionStreamer` or its like; gets the prompt by `put`, the canvas (masks included) after
                every step by `put_draft`, and the result by `put`.
            logits_processor: called as transformers does, with (S, L) ids, (S, V) logits and `cur_step`, a row for each
                position that is looked at.
            seed: one integer, or one for each row (see `row_seeds`).
            **overrides: single options by name.

        Returns:
            `NonAutoregressiveGenerationOutput`, or its sequences alone with `return_dict_in_generate=False`. A row
            ends with its first `eos_token_id` ("stop") or with its canvas ("length").

        Raises:
            ValueError: for an unknown option, a value out of range, an id outside the vocabulary or a prompt without
                room after it.
        """
        config = self.resolve_generation_config(generation_config, overrides)
        canvas = self.open_canvas(config, input_ids, attention_mask)
        seeds = row_seeds(seed, len(canvas.ids), canvas.ids.device)
        # Whoever watches every step, or is told the time of it, gets every step.
        watched = streamer is not None or logits_processor is not None or self.config.time_conditioning
        process = _Process(canvas, config, seeds, passes_idle_steps=not watched and config.sampler == "ancestral")
        if streamer is not None:
            streamer.put(canvas.ids[:, : canvas.prompt_width].cpu())
        take_step = self._rule_step if config.sampler == "rule" else self._process_step
        step = 0
        while take_step(process, logits_processor, step):
            process.advance()
            step += 1
            if streamer is not None:
                streamer.put_draft(canvas.written().cpu())
        canvas.eos_token_id = process.eos_token_id
        output = canvas.output(config.return_history)
        if streamer is not None:
            streamer.put(canvas.written().cpu())
            streamer.end()
        return output if config.return_dict_in_generate else output.sequences

    def _rule_step(self, process: "_Process", logits_processor, step: int) -> bool:
        """One forward pass over the rows that are not done, after which a rule says what is written; False if none."""
        canvas, config, eligible = process.canvas, process.config, process.eligible()
        is_open = process.is_open()
        rows, num_eligible, _ = shape_of_call(is_open, eligible)
        if num_eligible == 0:
            return False
        canvas.nfe += is_open
        # The rules have no time of their own: the network is told the share that is masked.
        alpha = (1 - canvas.masked.sum(dim=-1).double() / process.sizes)[rows].float()
        eligible, positions, seeds = eligible[rows], canvas.positions[rows], process.seeds[rows]
        steps_left = None
        if config.num_steps is not None:
            # Without blocks the rows share their steps.
            of_rows = (process.num_steps() - process.step)[rows]
            steps_left = of_rows if config.block_length else config.num_steps - step
        chosen, tokens = self.apply_to_logits(
            partial(
                unmask,
                masked=eligible,
                num_masked=num_eligible,
                positions=positions,
                order_seeds=random_bits(seeds, step) if config.order == "random" else seeds,
                config=config,
                uniforms=uniform(seeds[:, None], step, positions, _TOKEN),
                steps_left=steps_left,
            ),
            *(canvas, rows, eligible, num_eligible, config, logits_processor, step),
            alpha=alpha,
        )
        canvas.commit(rows, chosen, tokens, step)
        return True

    def _process_step(self: Any, process: "_Process", logits_processor, step: int) -> bool:
        """One step of a reverse process: first which masks are written, then their tokens; False if no row is open.

        From t to s a mask becomes token v with probability p(v) x (share of the masks that go), and such products are
        too small for float32. The two draws apart need no product, and ask the network only about what is written.
        """
        canvas, config = process.canvas, process.config
        chosen, remasked = process.transition()
        # A network that ignores the time has nothing to say to a row in which nothing is written.
        called = (process.eligible() if self.config.time_conditioning else chosen).any(dim=-1)
        rows, num_chosen, (num_open,) = shape_of_call(called, chosen, process.is_open().sum())
        if num_open == 0:
            return False
        canvas.nfe += called
        if len(rows):
            alpha, wanted, clock = (1 - process.masked_share()[rows]).float(), chosen[rows], process.clock[rows, None]
            logits = self.apply_to_logits(
                itemgetter(slice(None)),
                *(canvas, rows, wanted, num_chosen, config, logits_processor, step),
                alpha=alpha,
            )
            uniforms = uniform(process.seeds[rows, None], clock, canvas.positions[rows], _TOKEN)
            tokens = draw_tokens(logits, uniforms.flatten()[true_indices(wanted, num_chosen)], config)
            canvas.commit(rows, wanted, tokens, clock)
            if config.remasking == "conf":
                probabilities = logits.softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
                process.confidence[rows] = process.confidence[rows].masked_scatter(wanted, probabilities)
        if remasked is not None:
            canvas.ids.masked_fill_(remasked, self.config.mask_token_id)
            canvas.masked |= remasked
        return True


class _Process:
    """Where each row of a canvas stands: its block, and its step or its time there. Rows go at their own pace.

    Attributes:
        seeds: (B,) of the rows.
        blocks: (B, L) the block of each place of the canvas, -1 elsewhere.
        sizes: (B,) places of the canvas.
        block, last, step, clock: (B,) the block a row is at, its last one, and the steps made in the block and in all.
        mask_probability: (B,) float64, 1 - alpha_t of a row, in its block.
        times: (B, L) float64, when "ancestral" writes a place, as if in infinitely many steps: at t with alpha_t ~
            U(0, 1].
        confidence: (B, L) the probability of each token when it was written.
        eos_token_id: ends the text.
        passes_idle_steps: whether the steps in which a row writes nothing are passed over.
    """

    def __init__(self, canvas: MaskedCanvas, config: MDLMGenerationConfig, seeds, passes_idle_steps: bool):
        self.canvas, self.config, self.eos_token_id, self.seeds = canvas, config, canvas.eos_token_id, seeds
        self.passes_idle_steps, self.schedule = passes_idle_steps, make_schedule(config.noise_schedule)
        if config.sampler != "rule":
            # The law of a process is that of the whole canvas: what stands behind the end of the text is written too.
            canvas.eos_token_id = None
        numbers = canvas.masked.long().cumsum(dim=-1) - 1
        self.blocks = (numbers // (config.block_length or canvas.ids.shape[1])).masked_fill(~canvas.masked, -1)
        self.sizes, self.last = canvas.masked.sum(dim=-1), self.blocks.amax(dim=-1)
        self.block, self.step, self.clock = (torch.zeros_like(self.last) for _ in range(3))
        self.mask_probability = torch.ones_like(self.last, dtype=torch.float64)
        self.times = self.schedule.inverse(1 - uniform(seeds[:, None], canvas.positions, _EVENT))
        self.confidence = torch.zeros(canvas.ids.shape, device=canvas.ids.device)

    def is_open(self) -> torch.Tensor:
        """The rows (B,) that are not done."""
        return self.block <= self.last

    def in_block(self) -> torch.Tensor:
        """The places (B, L) of the blocks that the rows are at; none of a row that is done."""
        return self.blocks == torch.where(self.is_open(), self.block, -2)[:, None]

    def eligible(self) -> torch.Tensor:
        """The masks (B, L) of those blocks."""
        return self.canvas.masked & self.in_block()

    def num_steps(self) -> torch.Tensor:
        """Steps (B,) that the rows make in the blocks that they are at."""
        if self.config.num_steps is None:
            return self.in_block().sum(dim=-1)
        return -(-self.config.num_steps // (self.last + 1).clamp(min=1))

    def masked_share(self) -> torch.Tensor:
        """Share (B,) of the canvas that is masked, on average, at the time of a row; later blocks are all masked."""
        later = (self.blocks > self.block[:, None]).sum(dim=-1)
        return (self.mask_probability * self.in_block().sum(dim=-1) + later) / self.sizes

    def transition(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Go to the next event of each row: the places (B, L) that are written, and those that are masked again."""
        eligible, positions = self.eligible(), self.canvas.positions
        if self.config.sampler == "first_hitting":
            # n masks are all still there at r' < r with probability (r' / r)^n, r being the mask probability.
            u = uniform(self.seeds, self.clock, 0, _TIME)
            self.mask_probability *= u ** (1 / eligible.sum(dim=-1))
            return eligible & (commit_ranks(random_bits(self.seeds[:, None], positions), eligible) == 0), None
        n, remasked = self.num_steps(), None
        if self.config.sampler == "ancestral":
            # Of the masks at t those go whose times are after s: a share of (alpha_s - alpha_t) / (1 - alpha_t).
            steps = n[:, None] - 1 - (n[:, None] * self.times).long().clamp(max=n[:, None] - 1)
            if self.passes_idle_steps:
                passed = steps.masked_fill(~eligible, torch.iinfo(steps.dtype).max).amin(dim=-1) - self.step
                passed = passed.where(eligible.any(dim=-1), 0)
                self.step, self.clock = self.step + passed, self.clock + passed
            chosen = eligible & (steps == self.step[:, None])
        else:
            unmask, sigma = self.remasking(n)
            events = uniform(self.seeds[:, None], self.clock[:, None], positions, _EVENT)
            chosen, remasked = eligible & (events < unmask), self.in_block() & ~eligible & (events < sigma)
        self.mask_probability = self.schedule.mask_probability((n - self.step) / n.double())
        return chosen, remasked

    def remasking(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities of a step of n (B,), from t to s, float64 (B, 1) or (B, L): arXiv 2503.00307, equations 4 to 8.

        Returns:
            that a mask is written, (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), and that a token is masked, sigma.
        """
        config, steps_left = self.config, (n - self.step).double()
        mask_t = self.schedule.mask_probability(steps_left / n)[:, None]
        mask_s = self.schedule.mask_probability((steps_left - 1) / n)[:, None]
        alpha_t = 1 - mask_t
        largest = torch.where(mask_s < alpha_t, mask_s / alpha_t, 1.0)
        sigma = largest.clamp(max=config.eta) if config.remasking == "cap" else config.eta * largest
        if config.remasking == "conf":
            written = self.in_block() & ~self.canvas.masked
            confidence = self.confidence.double().masked_fill(~written, torch.inf)
            # In a row without a written token the softmax is 0 / 0, and there is nothing to mask again.
            sigma = sigma * (-confidence).softmax(dim=-1).nan_to_num(0.0)
        return (mask_t - mask_s + sigma * alpha_t) / mask_t, sigma

    def advance(self) -> None:
        """Count a step, and send the rows whose block is finished to the next one, or home."""
        self.step, self.clock = self.step + 1, self.clock + 1
        nothing_left = ~self.eligible().any(dim=-1)
        finished = (self.step == self.num_steps() if self.config.sampler == "remask" else nothing_left) & self.is_open()
        in_canvas = torch.arange(self.blocks.shape[1], device=self.blocks.device) >= self.canvas.prompt_width
        ends = self.in_block() & (self.canvas.ids == self.eos_token_id) & in_canvas
        self.last = torch.where(finished & ends.any(dim=-1), self.block, self.last)
        self.block = self.block + finished
        self.step = self.step.masked_fill(finished, 0)
        self.mask_probability = self.mask_probability.masked_fill(finished, 1.0)
