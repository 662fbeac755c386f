"""Generation by unmasking: a canvas of masks, and in every step some of them become tokens."""

from operator import itemgetter
from typing import Any

import torch
from transformers.generation import LogitsProcessorList

from xlm_hf.modules.canvas import (
    MaskedCanvas,
    MaskedGenerationMixin,
    UnmaskingGenerationConfig,
    choose_positions,
    draw_tokens,
)
from xlm_hf.modules.counter_random import random_bits, uniform
from xlm_hf.modules.generation import NonAutoregressiveGenerationOutput, row_seeds
from xlm_hf.modules.noise_schedules import NOISE_SCHEDULES
from xlm_hf.modules.unmasking import commit_ranks, commit_top_k, num_to_commit, order_scores, statistics_in_place
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

_EVENT, _TOKEN, _TIME = 0, 1, 2  # last counter of a random number: what it decides
_AHEAD = 8  # steps that are looked through at once for one in which something is written


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
        noise_schedule: spacing of the steps of "ancestral" and "remask", a name from `NOISE_SCHEDULES`.
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
        self._check_choice("noise_schedule", tuple(NOISE_SCHEDULES))
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
        process = _Process(canvas, config)
        seeds = row_seeds(seed, len(canvas.ids), canvas.ids.device)
        if streamer is not None:
            streamer.put(canvas.ids[:, : canvas.prompt_width].cpu())
        # Whoever watches every step, or is told the time of it, gets every step.
        jumps = not (streamer or logits_processor or self.config.time_conditioning) and config.sampler == "ancestral"
        step = 0
        while len(rows := process.open_rows()):
            if jumps:
                process.pass_idle_steps(rows, seeds[rows])
            take_step = self._rule_step if config.sampler == "rule" else self._process_step
            take_step(process, rows, seeds[rows], logits_processor, step)
            process.advance(rows)
            step += 1
            if streamer is not None:
                streamer.put_draft(canvas.written().cpu())
        canvas.eos_token_id = process.eos_token_id
        output = canvas.output(config.return_history)
        if streamer is not None:
            streamer.put(canvas.written().cpu())
            streamer.end()
        return output if config.return_dict_in_generate else output.sequences

    def _rule_step(self, process: "_Process", rows, seeds, logits_processor, step: int) -> None:
        """One forward pass over `rows`, after which a rule says what is written."""
        canvas, config, positions = process.canvas, process.config, process.canvas.positions[rows]
        eligible = process.eligible(rows)
        # The rules have no time of their own: the network is told the share that is masked.
        share = canvas.masked[rows].sum(dim=-1).double() / process.sizes[rows]

        def choose_and_draw(logits: LogitsOnDemand) -> tuple[torch.Tensor, torch.Tensor]:
            if config.num_steps is None:
                chosen = choose_positions(logits, eligible, positions, seeds, step, config)
            else:
                statistic = statistics_in_place(logits, eligible)
                ranks = commit_ranks(order_scores(config.order, statistic, seeds, positions), eligible)
                steps_left = process.num_steps(rows) - process.step[rows]
                chosen = commit_top_k(ranks, eligible, num_to_commit(eligible.sum(dim=-1), steps_left))
            uniforms = uniform(seeds[:, None], step, positions, _TOKEN)[chosen]
            return chosen, draw_tokens(logits[chosen[eligible]], uniforms, config)

        alpha = (1 - share).float()
        chosen, tokens = self.apply_to_logits(
            choose_and_draw, canvas, rows, eligible, config, logits_processor, step, alpha=alpha
        )
        canvas.commit(rows, chosen, tokens, step)

    def _process_step(self: Any, process: "_Process", rows, seeds, logits_processor, step: int) -> None:
        """One step of a reverse process: first which masks are written, then their tokens.

        From t to s a mask becomes token v with probability p(v) x (share of the masks that go), and such products are
        too small for float32. The two draws apart need no product, and ask the network only about what is written.
        """
        canvas, config, positions = process.canvas, process.config, process.canvas.positions[rows]
        eligible, clock = process.eligible(rows), process.clock[rows, None]
        remasked = torch.zeros_like(eligible)
        if config.sampler == "first_hitting":
            # n masks are all still there at r' < r with probability (r' / r)^n, r being the mask probability.
            process.mask_probability[rows] *= uniform(seeds, clock[:, 0], 0, _TIME) ** (1 / eligible.sum(dim=-1))
            ranks = commit_ranks(random_bits(seeds[:, None], positions), eligible)
            chosen = commit_top_k(ranks, eligible, torch.ones_like(rows))
        else:
            unmask, sigma, process.mask_probability[rows] = process.transition(rows, process.step[rows])
            events = uniform(seeds[:, None], clock, positions, _EVENT)
            chosen = eligible & (events < unmask)
            if config.sampler == "remask":
                remasked = process.in_block(rows) & ~eligible & (events < sigma)
        # A network that ignores the time has nothing to say to a row in which nothing is written.
        called = (eligible if self.config.time_conditioning else chosen).any(dim=-1)
        logits = torch.zeros(0, self.config.vocab_size, device=rows.device)
        if called.any():
            wanted, alpha = chosen[called], (1 - process.masked_share(rows)[called]).float()
            logits = self.apply_to_logits(
                itemgetter(slice(None)), canvas, rows[called], wanted, config, logits_processor, step, alpha=alpha
            )
        uniforms = uniform(seeds[:, None], clock, positions, _TOKEN)[chosen]
        tokens = draw_tokens(logits, uniforms, config)
        canvas.commit(rows, chosen, tokens, clock)
        if config.sampler == "remask":
            canvas.ids[rows] = canvas.ids[rows].masked_fill(remasked, self.config.mask_token_id)
            canvas.masked[rows] |= remasked
            probabilities = logits.softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
            process.confidence[rows] = process.confidence[rows].masked_scatter(chosen, probabilities)


class _Process:
    """Where each row of a canvas stands: its block, and its step or its time there. Rows go at their own pace.

    Attributes:
        blocks: (B, L) the block of each place of the canvas, -1 elsewhere.
        sizes: (B,) places of the canvas.
        block, last, step, clock: (B,) the block a row is at, its last one, and the steps made in the block and in all.
        mask_probability: (B,) float64, 1 - alpha_t of a row, in its block.
        confidence: (B, L) the probability of each token when it was written.
        eos_token_id: ends the text.
    """

    def __init__(self, canvas: MaskedCanvas, config: MDLMGenerationConfig):
        self.canvas, self.config, self.eos_token_id = canvas, config, canvas.eos_token_id
        if config.sampler != "rule":
            # The law of a process is that of the whole canvas: what stands behind the end of the text is written too.
            canvas.eos_token_id = None
        numbers = canvas.masked.long().cumsum(dim=-1) - 1
        self.blocks = (numbers // (config.block_length or canvas.ids.shape[1])).masked_fill(~canvas.masked, -1)
        self.sizes, self.last = canvas.masked.sum(dim=-1), self.blocks.amax(dim=-1)
        self.block, self.step, self.clock = (torch.zeros_like(self.last) for _ in range(3))
        self.mask_probability = torch.ones_like(self.last, dtype=torch.float64)
        self.confidence = torch.zeros(canvas.ids.shape, device=canvas.ids.device)

    def open_rows(self) -> torch.Tensor:
        """Indices (R,) of the rows that are not done."""
        return (self.block <= self.last).nonzero().squeeze(-1)

    def in_block(self, rows: torch.Tensor) -> torch.Tensor:
        """The places (R, L) of the blocks that `rows` are at."""
        return self.blocks[rows] == self.block[rows, None]

    def eligible(self, rows: torch.Tensor) -> torch.Tensor:
        """The masks (R, L) of those blocks."""
        return self.canvas.masked[rows] & self.in_block(rows)

    def num_steps(self, rows: torch.Tensor) -> torch.Tensor:
        """Steps (R,) that `rows` make in the blocks that they are at."""
        if self.config.num_steps is None:
            return self.in_block(rows).sum(dim=-1)
        return -(-self.config.num_steps // (self.last[rows] + 1))

    def masked_share(self, rows: torch.Tensor) -> torch.Tensor:
        """Share (R,) of the canvas that is masked, on average, at the time of `rows`; later blocks are all masked."""
        later = (self.blocks[rows] > self.block[rows, None]).sum(dim=-1)
        return (self.mask_probability[rows] * self.in_block(rows).sum(dim=-1) + later) / self.sizes[rows]

    def pass_idle_steps(self, rows: torch.Tensor, seeds: torch.Tensor) -> None:
        """Let each of `rows` (R,) pass the steps in which it writes nothing; which those are, no network decides."""
        while len(rows):
            each, ahead = rows.repeat_interleave(_AHEAD), torch.arange(_AHEAD, device=rows.device).repeat(len(rows))
            clock, keys = (self.clock[each] + ahead)[:, None], seeds.repeat_interleave(_AHEAD)[:, None]
            unmask, _, _ = self.transition(each, self.step[each] + ahead)
            writes = self.eligible(each) & (uniform(keys, clock, self.canvas.positions[each], _EVENT) < unmask)
            # In the last step everything is written, so what lies beyond it is never reached.
            writes = writes.any(dim=-1).view(-1, _AHEAD)
            passed = torch.where(writes.any(dim=-1), writes.int().argmax(dim=-1), _AHEAD)
            self.step[rows] += passed
            self.clock[rows] += passed
            rows, seeds = rows[passed == _AHEAD], seeds[passed == _AHEAD]

    def transition(self, rows: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities of step (R,), from t to s, float64 (R, 1) or (R, L) (arXiv 2503.00307, equations 4 to 8).

        Returns:
            that a mask is written, (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); that a token is masked, sigma; and
            (R,) 1 - alpha_t.
        """
        config, n = self.config, self.num_steps(rows).double()
        schedule, steps_left = NOISE_SCHEDULES[config.noise_schedule], n - step
        mask_t = schedule.mask_probability(steps_left / n)[:, None]
        mask_s = schedule.mask_probability((steps_left - 1) / n)[:, None]
        alpha_t = 1 - mask_t
        sigma = torch.zeros_like(mask_t)
        if config.sampler == "remask":
            largest = torch.where(mask_s < alpha_t, mask_s / alpha_t, 1.0)
            sigma = largest.clamp(max=config.eta) if config.remasking == "cap" else config.eta * largest
            if config.remasking == "conf":
                written = self.in_block(rows) & ~self.canvas.masked[rows]
                confidence = self.confidence[rows].double().masked_fill(~written, torch.inf)
                # In a row without a written token the softmax is 0 / 0, and there is nothing to mask again.
                sigma = sigma * (-confidence).softmax(dim=-1).nan_to_num(0.0)
        return (mask_t - mask_s + sigma * alpha_t) / mask_t, sigma, mask_t[:, 0]

    def advance(self, rows: torch.Tensor) -> None:
        """Count a step of `rows`, and send those whose block is finished to the next one, or home."""
        self.step[rows] += 1
        self.clock[rows] += 1
        if self.config.sampler == "remask":
            finished = self.step[rows] == self.num_steps(rows)
        else:
            finished = ~self.eligible(rows).any(dim=-1)
        rows = rows[finished]
        columns = torch.arange(self.blocks.shape[1], device=rows.device)
        ends = (
            self.in_block(rows) & (self.canvas.ids[rows] == self.eos_token_id) & (columns >= self.canvas.prompt_width)
        )
        self.last[rows] = torch.where(ends.any(dim=-1), self.block[rows], self.last[rows])
        self.block[rows] += 1
        self.step[rows] = 0
        self.mask_probability[rows] = 1.0
