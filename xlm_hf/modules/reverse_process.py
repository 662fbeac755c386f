"""Filling a canvas of masks: reverse processes, unmasking rules, and the bookkeeping that they share.

A sampler is an object with options that decides what a step writes. It gets the forward pass as

    predict(function, rows, wanted, num_wanted, alpha)

This calls the model on `rows` (R,), and tells it `alpha` (R,) if the model takes a time. It returns the result of
`function` on the logits at the `num_wanted` positions in `wanted` (R, L), in reading order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Literal

import torch

from .canvas import MaskedCanvas
from .checked_options import NotNegative, PositiveInt, Share
from .counter_random import random_bits, uniform
from .devices import is_synchronous, rounded_up, shape_of_call, true_indices
from .generation import GenerationCall, Sampler
from .generation_output import NonAutoregressiveGenerationOutput
from .noise_schedules import make_schedule
from .unmasking import Order, commit_by_rule, commit_ranks, draw_tokens, num_to_commit
from .vocabulary_head import LogitsOnDemand

Predict = Callable[..., Any]
_EVENT, _TOKEN, _TIME = 0, 1, 2  # last counter of a random number: what it decides


class CanvasProcess:
    """Where each row of a canvas stands: its block, and its step or its time there. Rows go at their own pace.

    Args:
        canvas: the rows.
        sampler: decides what a step writes.
        call: the call of `generate`.
        is_timed: whether the network is told the time.
        writes_once: whether a position is written once, so that its number is all that a draw is told apart by.
        noise_schedule: the schedule that the model was trained with, as `make_schedule` takes it.

    Attributes:
        blocks: (B, L) the block of each position of the canvas, -1 elsewhere.
        sizes: (B,) positions of the canvas.
        block, last, step, clock: (B,) the block a row is at, its last one, and the steps made in the block and in all.
        mask_probability: (B,) float64, 1 - alpha_t of a row, in its block.
        confidence: (B, L) the probability of each token when it was written.
        eos_token_id: ends the text.
    """

    def __init__(
        self,
        canvas: MaskedCanvas,
        sampler: "CanvasSampler",
        call: GenerationCall,
        is_timed: bool = False,
        writes_once: bool = False,
        noise_schedule: Any = "log_linear",
    ):
        self.canvas, self.sampler, self.config, self.seeds = canvas, sampler, call.config, call.seeds
        self.noise_schedule = noise_schedule
        self.eos_token_id, self.is_timed, self.is_watched = canvas.eos_token_id, is_timed, call.is_watched
        if sampler.writes_behind_the_end:
            # The law of a process is that of the whole canvas: what stands behind the end of the text is written too.
            canvas.eos_token_id = None
        numbers = canvas.masked.long().cumsum(dim=-1) - 1
        self.blocks = (numbers // (sampler.block_length or canvas.ids.shape[1])).masked_fill(~canvas.masked, -1)
        self.sizes, self.last = canvas.masked.sum(dim=-1), self.blocks.amax(dim=-1)
        self.block, self.step, self.clock = (torch.zeros_like(self.last) for _ in range(3))
        self.mask_probability = torch.ones_like(self.last, dtype=torch.float64)
        self.confidence = torch.zeros(canvas.ids.shape, device=canvas.ids.device)
        self._uniforms = uniform(self.seeds[:, None], canvas.positions, _TOKEN) if writes_once else None
        sampler.open(self)

    @property
    def prompt(self) -> torch.Tensor:
        """The prompts (B, P)."""
        return self.canvas.prompt

    def is_open(self) -> torch.Tensor:
        """The rows (B,) that are not done."""
        return self.block <= self.last

    def in_block(self) -> torch.Tensor:
        """The positions (B, L) of the blocks that the rows are at; none of a row that is done."""
        return self.blocks == torch.where(self.is_open(), self.block, -2)[:, None]

    def eligible(self) -> torch.Tensor:
        """The masks (B, L) of those blocks."""
        return self.canvas.masked & self.in_block()

    def num_steps(self) -> torch.Tensor:
        """Steps (B,) that the rows make in the blocks that they are at; by default one for each position."""
        num_steps = getattr(self.sampler, "num_steps", None)
        if num_steps is None:
            return self.in_block().sum(dim=-1)
        return -(-num_steps // (self.last + 1).clamp(min=1))

    def masked_share(self) -> torch.Tensor:
        """Share (B,) of the canvas that is masked, on average, at the time of a row; later blocks are all masked."""
        later = (self.blocks > self.block[:, None]).sum(dim=-1)
        return (self.mask_probability * self.in_block().sum(dim=-1) + later) / self.sizes

    def uniforms(self, rows: torch.Tensor) -> torch.Tensor:
        """Numbers (R, L) in [0, 1) by which the tokens of `rows` are drawn in this step."""
        if self._uniforms is not None:
            return self._uniforms[rows]
        return uniform(self.seeds[rows, None], self.clock[rows, None], self.canvas.positions[rows], _TOKEN)

    def take_step(self, predict: Predict, number: int) -> bool:
        """Let the sampler make a step on the rows that are open; False if there is none."""
        if not self.sampler.step(self, predict, number):
            return False
        self.canvas.note(self.clock)
        self._advance()
        return True

    def _advance(self) -> None:
        """Count a step, and send the rows whose block is finished to the next one, or home."""
        self.step, self.clock = self.step + 1, self.clock + 1
        nothing_left = ~self.eligible().any(dim=-1)
        finished = (self.step == self.num_steps() if self.sampler.takes_all_steps else nothing_left) & self.is_open()
        in_canvas = torch.arange(self.blocks.shape[1], device=self.blocks.device) >= self.canvas.prompt_width
        ends = self.in_block() & (self.canvas.ids == self.eos_token_id) & in_canvas
        self.last = torch.where(finished & ends.any(dim=-1), self.block, self.last)
        self.block = self.block + finished
        self.step = self.step.masked_fill(finished, 0)
        self.mask_probability = self.mask_probability.masked_fill(finished, 1.0)

    def written(self) -> torch.Tensor:
        """What stands after the prompts (see `MaskedCanvas.written`)."""
        return self.canvas.written()

    def whole(self) -> torch.Tensor:
        """The rows so far, prompts included."""
        return self.canvas.ids

    def finish(self, rows: torch.Tensor, ended: torch.Tensor) -> None:
        """End those of `rows` (R,) that have `ended` (R,) and are open, as they stand."""
        ended = ended & self.is_open()[rows]
        self.canvas.stopped[rows] |= ended
        self.last[rows] = torch.where(ended, -1, self.last[rows])

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """Gather the result of `generate`."""
        self.canvas.eos_token_id = self.eos_token_id
        return self.canvas.output(return_history)


@dataclass
class CanvasSampler(Sampler):
    """A way of filling a canvas.

    Attributes:
        block_length: positions of a block. A block is finished before the next to its right begins, and nothing is
            written after one that holds `[EOS]`. The steps are spread evenly over the blocks. None means one block.
        writes_behind_the_end: whether the canvas is written whatever ends the text.
        takes_all_steps: whether a block ends after its last step and not before.
    """

    block_length: PositiveInt | None = None

    writes_behind_the_end: ClassVar[bool] = False
    takes_all_steps: ClassVar[bool] = False

    def open(self, process: CanvasProcess) -> None:
        """Prepare for the canvas of `process`."""

    def step(self, process: CanvasProcess, predict: Predict, number: int) -> bool:
        """Make a step on the rows that are open; False if there is none. The host reads the device once."""
        raise NotImplementedError


@dataclass
class ConfidenceSampler(CanvasSampler):
    """Unmasking by a rule: in which order, and how much in a step.

    By default a step commits one token. At most one of the last four options can be set.

    Attributes:
        order: which masked positions come first: "confidence", the largest p1; "margin", the largest p1 - p2;
            "entropy", the smallest entropy; "random", any. All are statistics of the model's own distribution,
            before temperature, top-k and top-p.
        num_steps: forward passes in which a canvas is filled, the positions spread evenly over them.
        mask_schedule: spreads them otherwise, as `make_schedule` takes it: of m masks a step from t to s commits
            floor(m (1 - (1 - alpha_s) / (1 - alpha_t))), and the last one all. "cosine" commits few at first (MaskGIT,
            arXiv 2202.04200).
        confidence_threshold: a step commits all tokens with p1 above this (arXiv 2505.22618).
        entropy_bound: a step commits the longest prefix of the order whose entropies (nats), the largest left out, sum
            to at most this (arXiv 2505.24857).
        error_bound: the same with 1 - p1 in place of the entropies.
    """

    order: Order = "confidence"
    num_steps: PositiveInt | None = None
    mask_schedule: str | dict | None = None
    confidence_threshold: Share | None = None
    entropy_bound: NotNegative | None = None
    error_bound: NotNegative | None = None

    def __post_init__(self):
        super().__post_init__()
        names = ("num_steps", "confidence_threshold", "entropy_bound", "error_bound")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each set how much a step commits: unset all but one.")
        if self.mask_schedule is not None:
            self._schedule = make_schedule(self.mask_schedule)
            if self.num_steps is None:
                raise ValueError("mask_schedule spreads the positions over num_steps, which is None: set it.")

    def _kept_share(self, steps: torch.Tensor | int, steps_left: torch.Tensor | int) -> torch.Tensor:
        """Share of the masks that a step leaves, of `steps` with `steps_left`, this one included; of the last one 0."""
        t = torch.as_tensor(steps_left / steps, dtype=torch.float64)
        kept = self._schedule.mask_probability(t - 1 / steps) / self._schedule.mask_probability(t)
        return kept.where(torch.as_tensor(steps_left) > 1, 0.0)

    def step(self, process: CanvasProcess, predict: Predict, number: int) -> bool:
        """One forward pass over the rows that are not done, after which the rule says what is written."""
        canvas, eligible, is_open = process.canvas, process.eligible(), process.is_open()
        rows, num_eligible, _ = shape_of_call(is_open, eligible)
        if num_eligible == 0:
            return False
        canvas.nfe += is_open
        # The rules have no time of their own: the network is told the share that is masked.
        alpha = (1 - canvas.masked.sum(dim=-1).double() / process.sizes)[rows].float()
        eligible, seeds, most, k = eligible[rows], process.seeds[rows], num_eligible, None
        if self.num_steps is not None:
            # Without blocks the rows share their steps.
            steps: Any = process.num_steps()[rows] if self.block_length else self.num_steps
            left = steps - (process.step[rows] if self.block_length else number)
            num_masked = eligible.sum(dim=-1)
            if self.mask_schedule is not None:
                # What rounding takes from a whole number is given back.
                k = (num_masked * (1 - self._kept_share(steps, left)) + 1e-9).long()
            else:
                # sum_i ceil(m_i / r) is at most this.
                most = min(most, most // left + len(rows)) if isinstance(left, int) else most
                k = num_to_commit(num_masked, left)
        if self.order == "random":
            # Drawn anew in each step: how far a bound lets one go tells something about the rest of an order.
            seeds = random_bits(seeds, number)

        def rule(logits: LogitsOnDemand) -> tuple[torch.Tensor, torch.Tensor]:
            """The chosen positions (R, L), and their tokens in reading order, behind which may stand others."""
            chosen, num = commit_by_rule(self, logits, eligible, positions, seeds, most, k)
            # An accelerator is not asked how many there are.
            num = int(chosen.sum()) if is_synchronous(chosen.device) else num
            index = true_indices(chosen, rounded_up(num, chosen.numel(), chosen.device))
            numbers = (eligible.flatten().cumsum(dim=0) - 1).clamp(min=0)
            return chosen, draw_tokens(logits[numbers[index]], uniforms.flatten()[index], process.config)

        positions, uniforms = canvas.positions[rows], process.uniforms(rows)
        chosen, tokens = predict(rule, rows, eligible, num_eligible, alpha)
        canvas.commit(rows, chosen, tokens, number)
        return True


@dataclass
class ReverseSampler(CanvasSampler):
    """A reverse process: first which masks are written, then their tokens.

    From t to s a mask becomes token v with probability p(v) x (share of the masks that go), and such products are too
    small for float32. The two draws apart need no product, and ask the network only about what is written.
    """

    writes_behind_the_end: ClassVar[bool] = True

    def transition(self, process: CanvasProcess) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Go to the next event of each row: the positions (B, L) that are written, and those that are masked again."""
        raise NotImplementedError

    def wrote(self, process: CanvasProcess, rows, wanted, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Told of the `tokens` written at the `wanted` positions of `rows`, and of their logits."""

    def step(self, process: CanvasProcess, predict: Predict, number: int) -> bool:
        """One event of each row that is open."""
        canvas, config = process.canvas, process.config
        chosen, remasked = self.transition(process)
        # A network that ignores the time has nothing to say to a row in which nothing is written.
        called = (process.eligible() if process.is_timed else chosen).any(dim=-1)
        rows, num_chosen, (num_open,) = shape_of_call(called, chosen, process.is_open().sum())
        if num_open == 0:
            return False
        canvas.nfe += called
        if len(rows):
            alpha, wanted = (1 - process.masked_share()[rows]).float(), chosen[rows]
            logits = predict(itemgetter(slice(None)), rows, wanted, num_chosen, alpha)
            uniforms = process.uniforms(rows).flatten()[true_indices(wanted, num_chosen)]
            tokens = draw_tokens(logits, uniforms, config)
            canvas.commit(rows, wanted, tokens, process.clock[rows, None])
            self.wrote(process, rows, wanted, logits, tokens)
        if remasked is not None:
            canvas.ids.masked_fill_(remasked, canvas.mask_token_id)
            canvas.masked |= remasked
        return True


@dataclass
class FirstHittingSampler(ReverseSampler):
    """The limit of infinitely many steps, one token at a time (arXiv 2409.02908)."""

    def transition(self, process: CanvasProcess) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next mask to go, any alike; n masks are all still there at r' < r with probability (r' / r)^n."""
        eligible, positions, seeds = process.eligible(), process.canvas.positions, process.seeds
        u = uniform(seeds, process.clock, 0, _TIME)
        process.mask_probability *= u ** (1 / eligible.sum(dim=-1))
        return eligible & (commit_ranks(random_bits(seeds[:, None], positions), eligible) == 0), None


@dataclass
class GridSampler(ReverseSampler):
    """A reverse process on a grid of times.

    Attributes:
        num_steps: steps in which a canvas is filled; None means one for each position.
        noise_schedule: spacing of the steps, as `make_schedule` takes it; None means the schedule of the training.
    """

    num_steps: PositiveInt | None = None
    noise_schedule: str | dict | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.noise_schedule is not None:
            make_schedule(self.noise_schedule)

    def open(self, process: CanvasProcess) -> None:
        """Take the schedule."""
        self._schedule = make_schedule(process.noise_schedule if self.noise_schedule is None else self.noise_schedule)

    def _reached(self, process: CanvasProcess, n: torch.Tensor) -> torch.Tensor:
        return self._schedule.mask_probability((n - process.step) / n.double())


@dataclass
class AncestralSampler(GridSampler):
    """The reverse process on `num_steps` steps (arXiv 2406.07524).

    When a position is written follows from one number: as if in infinitely many steps, at the time t with alpha_t ~
    U(0, 1]. Steps in which a row writes nothing are passed over, unless the network is told the time or somebody
    watches.
    """

    def open(self, process: CanvasProcess) -> None:
        """Take the schedule and draw the times."""
        super().open(process)
        draws = uniform(process.seeds[:, None], process.canvas.positions, _EVENT)
        self._times = self._schedule.inverse(1 - draws).clamp(0, 1)

    def transition(self, process: CanvasProcess) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the masks at t those go whose times are after s: a share of (alpha_s - alpha_t) / (1 - alpha_t)."""
        eligible, n = process.eligible(), process.num_steps()
        steps = n[:, None] - 1 - (n[:, None] * self._times).long().clamp(max=n[:, None] - 1)
        if not process.is_timed and not process.is_watched:
            passed = steps.masked_fill(~eligible, torch.iinfo(steps.dtype).max).amin(dim=-1) - process.step
            passed = passed.where(eligible.any(dim=-1), 0)
            process.step, process.clock = process.step + passed, process.clock + passed
        process.mask_probability = self._reached(process, n)
        return eligible & (steps == process.step[:, None]), None


@dataclass
class RemdmSampler(GridSampler):
    """The reverse process in which tokens may be masked again (ReMDM, arXiv 2503.00307).

    Attributes:
        remasking: sigma_t, the probability that a token is masked again. Let sigma_max = min(1, (1 - alpha_s) /
            alpha_t). "cap" is min(eta, sigma_max). "rescale" is eta sigma_max. "conf" is eta sigma_max times a softmax
            over the written tokens, of minus the probability that each had when it was written.
        eta: strength of the remasking, in (0, 1].
    """

    remasking: Literal["cap", "rescale", "conf"] = "cap"
    eta: Share = 0.02

    takes_all_steps: ClassVar[bool] = True

    def transition(self, process: CanvasProcess) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each mask and each token of the block by itself."""
        eligible, n = process.eligible(), process.num_steps()
        unmask, sigma = self._probabilities(process, n)
        events = uniform(process.seeds[:, None], process.clock[:, None], process.canvas.positions, _EVENT)
        process.mask_probability = self._reached(process, n)
        return eligible & (events < unmask), process.in_block() & ~eligible & (events < sigma)

    def _probabilities(self, process: CanvasProcess, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities of a step of n (B,), from t to s, float64 (B, 1) or (B, L): arXiv 2503.00307, equations 4 to 8.

        Returns:
            that a mask is written, (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), and that a token is masked, sigma.
        """
        steps_left = (n - process.step).double()
        mask_t = self._schedule.mask_probability(steps_left / n)[:, None]
        # The last step leaves no mask, wherever the schedule ends.
        mask_s = self._schedule.mask_probability((steps_left - 1) / n).where(steps_left > 1, 0.0)[:, None]
        alpha_t = 1 - mask_t
        largest = torch.where(mask_s < alpha_t, mask_s / alpha_t, 1.0)
        sigma = largest.clamp(max=self.eta) if self.remasking == "cap" else self.eta * largest
        if self.remasking == "conf":
            written = process.in_block() & ~process.canvas.masked
            confidence = process.confidence.double().masked_fill(~written, torch.inf)
            # In a row without a written token the softmax is 0 / 0, and there is nothing to mask again.
            sigma = sigma * (-confidence).softmax(dim=-1).nan_to_num(0.0)
        return (mask_t - mask_s + sigma * alpha_t) / mask_t, sigma

    def wrote(self, process: CanvasProcess, rows, wanted, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep the probability of what was written, which "conf" goes by."""
        if self.remasking == "conf":
            probabilities = logits.softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
            process.confidence[rows] = process.confidence[rows].masked_scatter(wanted, probabilities)
