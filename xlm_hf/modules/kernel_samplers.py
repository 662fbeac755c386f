"""Sampling a canvas whose tokens are replaced by noise, and may change in every step: uniform and mixed kernels.

All positions of a canvas start as noise and take part in every step. A step from t to s < t asks the network once for
x_theta, the prediction of the clean tokens, and moves each position by itself by the law of its kernel. Temperature,
top-k and top-p act on x_theta; without `do_sample` it is all on its most probable token. Then only the noise is random.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from .canvas import MaskedCanvas
from .checked_options import Count, PositiveInt, Share
from .counter_random import random_bits, uniform
from .devices import is_synchronous, shape_of_call, true_indices
from .generation import GenerationCall, Sampler
from .kernels import MASK, PREDICTED, UNIFORM, Kernel, draw_part
from .reverse_process import CanvasProcess, Predict
from .token_sampling import filter_logits, sample_categorical
from .unmasking import commit_ranks
from .vocabulary_head import LogitsOnDemand

# Last counter of a random number: what it decides.
_PRIOR, _BRANCH, _PART, TOKEN, _REPLACEMENT, _NOISE, _CHOICE = range(7)
_NUM_DRAWS = 7
# Rows of logits that are drawn from at once.
_BLOCK_ROWS = 512


class KernelProcess(CanvasProcess):
    """Where each row of a canvas stands in the reverse process of a kernel.

    Args:
        canvas: the rows; its masks are what the process writes.
        sampler: decides what a step does.
        call: the call of `generate`.
        kernel: the noise.
    """

    def __init__(self, canvas: MaskedCanvas, sampler: Any, call: GenerationCall, kernel: Kernel):
        super().__init__(canvas, sampler, call, is_timed=True)
        self.kernel = kernel
        self.cells = self.blocks >= 0
        inside = torch.arange(self.cells.shape[1], device=self.cells.device) < canvas.prompt_width
        self._fills_in = (self.cells & inside).any(dim=-1)
        # Read once: what a step asks the device for, the host waits for.
        self._some_fill_in = bool(self._fills_in.any())

    def draw(self, number: int, round_: int = 0) -> torch.Tensor:
        """Numbers (B, L) in [0, 1) for what `number` says, in a move of the step that a row is at."""
        seeds, clock = self.seeds[:, None], self.clock[:, None]
        return uniform(seeds, clock, self.canvas.positions, number + _NUM_DRAWS * round_)

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is told of the noise at times t, 1 being none: the share alpha_t of clean tokens."""
        return self.kernel.shares(t).alpha

    def take_step(self, predict: Predict, number: int) -> bool:
        """As in the base class. Where blanks are filled in, the network is told that given tokens have no noise."""

        def telling(function, rows, wanted, num_wanted, alpha):
            if self._some_fill_in:
                alpha = alpha[:, None].where(self.cells[rows] | ~self._fills_in[rows, None], 1.0)
            return predict(function, rows, wanted, num_wanted, alpha)

        return super().take_step(telling, number)

    def move(
        self, predict: Predict, kind: type["Move"], wanted, t, s, round_: int = 0, num_least=None, **where
    ) -> bool:
        """Move the `wanted` positions (B, L) from t (B,) to s (B,) in one forward pass; False if there is none.

        Args:
            predict: see the module `reverse_process`.
            kind: `Move`, or a subclass of it.
            round_: numbers the moves of one step.
            num_least (int): of each row move so many positions alone, those with the least probable tokens.
            **where (torch.Tensor | None): attributes of the move that are (B, L) bool, or None.
        """
        canvas, called = self.canvas, wanted.any(dim=-1)
        rows, num, _ = shape_of_call(called, wanted)
        if num == 0:
            return False
        canvas.nfe += called
        wanted = wanted[rows]
        index, of_rows = true_indices(wanted, num), torch.arange(len(rows), device=rows.device)
        uniforms = torch.stack([self.draw(number, round_)[rows].flatten()[index] for number in range(_NUM_DRAWS)])
        at = of_rows.repeat_interleave(wanted.shape[1])[index]
        where = {name: None if x is None else x[rows].flatten()[index] for name, x in where.items()}
        ids = canvas.ids[rows]
        of_tokens = (ids.flatten()[index], t[rows][at], s[rows][at], uniforms)
        move = kind(self.kernel, self.config, *of_tokens, **where)
        tokens, own = predict(move, rows, wanted, num, self.level(t)[rows].float())
        new = ids.masked_scatter(wanted, tokens)
        if num_least is not None:
            # A mask is no token that could be wrong.
            own = own.masked_fill(of_tokens[0] == canvas.mask_token_id, 1.0)
            least = commit_ranks(-torch.ones_like(ids, dtype=own.dtype).masked_scatter(wanted, own), wanted) < num_least
            new = torch.where(least, new, ids)
        canvas.rewrite(rows, new, self.clock[rows, None])
        return True

    def start(self) -> None:
        """Fill the canvas with noise, where it holds no text yet."""
        noise, ids = self.kernel.prior(self.draw(_PRIOR)), self.canvas.ids
        is_empty = self.cells & (ids == self.canvas.mask_token_id)
        rows = torch.arange(len(noise), device=noise.device)
        self.canvas.rewrite(rows, torch.where(is_empty, noise, ids), self.clock[:, None])


@dataclass(frozen=True)
class Move:
    """What a step from t to s makes of S positions, each by itself.

    Attributes:
        kernel: the noise.
        config: the options of the draw.
        ids: (S,) the tokens at t.
        t: (S,) float64, in (0, 1].
        s: (S,) float64, less than t.
        uniforms: (7, S) numbers in [0, 1), by what they decide.
        to_data: (S,) positions that go to time 0, and then by new noise to s; None sends none.
        is_greedy: (S,) positions that take the most probable token of x_theta; None for none.
    """

    kernel: Kernel
    config: Any
    ids: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    uniforms: torch.Tensor
    to_data: torch.Tensor | None = None
    is_greedy: torch.Tensor | None = None

    per_position: ClassVar[tuple[str, ...]] = ("ids", "t", "s", "to_data", "is_greedy")

    def __call__(self, logits: LogitsOnDemand) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens at s, and x_theta of those at t, both (S,)."""
        of_blocks = []
        for start in range(0, len(self.ids), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            given = {name: x[rows] for name in self.per_position if (x := getattr(self, name)) is not None}
            block = replace(self, **given, uniforms=self.uniforms[:, rows])
            scores = block.predictions(logits[rows])
            own = scores.gather(1, block.ids[:, None])[:, 0] - scores.logsumexp(dim=-1)
            of_blocks.append((block.tokens(scores, own.exp()), own.exp()))
        return torch.cat([tokens for tokens, _ in of_blocks]), torch.cat([own for _, own in of_blocks])

    def predictions(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) of x_theta: of the leave-one-out prediction, after temperature, top-k and top-p."""
        scores = self.kernel.leave_one_out(scores, self.ids, self.t)
        if not self.config.do_sample:
            return torch.full_like(scores, -torch.inf).scatter_(1, scores.argmax(dim=-1, keepdim=True), 0.0)
        return filter_logits(scores, self.config.temperature, self.config.top_k, self.config.top_p)

    def parts(self, own: torch.Tensor) -> torch.Tensor:
        """The mixture (S, 4) that a token is drawn from, by x_theta of the present one (S,)."""
        s = self.s if self.to_data is None else self.s.where(~self.to_data, 0.0)
        return self.kernel.posterior(self.ids, own, self.t, s)

    def tokens(self, scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The tokens (S,) at s."""
        kernel, u = self.kernel, self.uniforms
        part = draw_part(self.parts(own), u[_PART])
        drawn = part == PREDICTED
        # An accelerator is not asked how many there are.
        index = drawn.nonzero()[:, 0] if is_synchronous(drawn.device) else torch.arange(len(own), device=own.device)
        tokens = self.ids.clone()
        tokens[index] = sample_categorical(scores[index], u[TOKEN][index])
        tokens = torch.where(drawn, tokens, self.ids)
        is_uniform, is_mask = part == UNIFORM, part == MASK
        if self.to_data is not None:
            at_s = kernel.shares(self.s)
            is_mask = is_mask.where(~self.to_data, u[_NOISE] < at_s.mask)
            is_uniform = is_uniform.where(~self.to_data, ~is_mask & (u[_NOISE] < at_s.mask + at_s.uniform))
        tokens = torch.where(is_uniform, kernel.replacement(u[_REPLACEMENT]), tokens)
        if kernel.mask_token_id is not None:
            tokens = tokens.masked_fill(is_mask, kernel.mask_token_id)
        return tokens if self.is_greedy is None else torch.where(self.is_greedy, scores.argmax(dim=-1), tokens)


class Resampling(Move):
    """Draws positions anew at time t, without regard to their present tokens: from x_theta noised to t."""

    def parts(self, own: torch.Tensor) -> torch.Tensor:
        """See `Move`."""
        alpha, mask, uniform_share = self.kernel.shares(self.t)
        return torch.stack((torch.zeros_like(alpha), alpha, uniform_share, mask), dim=-1)


@dataclass
class KernelSampler(Sampler):
    """The reverse process of a kernel in steps (arXiv 2107.03006; 2412.10193, equation 15).

    A token is kept, drawn from x_theta, drawn uniformly or masked (`Kernel.posterior`). The steps are even in the time
    of the model's own schedule.

    Attributes:
        num_steps: steps from noise to text, each of one forward pass; None means one for each position.
        corrector_steps: after each step but the last, so many times some positions are drawn anew from what the network
            predicts of them by the others (Gibbs; arXiv 2605.22765). Each time takes one more forward pass.
        corrector_positions: how many positions of a row that is.
        corrector_order: which ones: "random", which changes no law if they are one at a time; or "confidence", those
            whose tokens are least probable, masks last.
        greedy_tail: the last step takes the most probable token everywhere, whatever stood there. It seeks the mode.
    """

    num_steps: PositiveInt | None = None
    corrector_steps: Count = 0
    corrector_positions: PositiveInt = 1
    corrector_order: Literal["random", "confidence"] = "random"
    greedy_tail: bool = False

    block_length: ClassVar[int | None] = None
    writes_behind_the_end: ClassVar[bool] = True
    takes_all_steps: ClassVar[bool] = True

    def open(self, process: CanvasProcess) -> None:
        """Nothing is prepared: the first step begins with noise."""

    def times(self, done: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """The time (B,) after `done` (B,) of n (B,) steps."""
        return (n - done) / n.double()

    def share_to_data(self, process: Any, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor | None:
        """Probability (B,) that a position goes to time 0 and back to s; None where none does."""
        return None

    def step(self, process: Any, predict: Predict, number: int) -> bool:
        """A step of each row that is open, with its corrections."""
        if number == 0:
            process.start()
        return self.write(process, predict, process.in_block())

    def write(self, process: Any, predict: Predict, cells: torch.Tensor) -> bool:
        """The step at the `cells` (B, L); False if there is none."""
        n = process.num_steps().clamp(min=1)
        t, s = self.times(process.step, n), self.times(process.step + 1, n)
        is_last = process.step + 1 == n
        share, to_data = self.share_to_data(process, t, s), None
        if share is not None:
            to_data = process.draw(_BRANCH) < share[:, None]
        is_greedy = is_last[:, None].expand(cells.shape) if self.greedy_tail else None
        if not process.move(predict, Move, cells, t, s, to_data=to_data, is_greedy=is_greedy):
            return False
        for round_ in range(1, self.corrector_steps + 1):
            self._correct(process, predict, cells & ~is_last[:, None], s, round_)
        return True

    def _correct(self, process: Any, predict: Predict, cells: torch.Tensor, s: torch.Tensor, round_: int) -> None:
        """Draw some of the `cells` (B, L) anew at time s (B,)."""
        k = self.corrector_positions
        if self.corrector_order == "random":
            keys = random_bits(
                process.seeds[:, None], process.clock[:, None], process.canvas.positions, _CHOICE, round_
            )
            cells = cells & (commit_ranks(keys, cells) < k)
            process.move(predict, Resampling, cells, s, s, round_)
        else:
            process.move(predict, Resampling, cells, s, s, round_, num_least=k)


@dataclass
class PsiSampler(KernelSampler):
    """Steps of which a share forgets the noise so far (psi-samplers, arXiv 2602.21185).

    With probability 1 - kappa a position goes from t to a clean token, by the posterior at time 0, and by new noise to
    s; else it takes the reverse step. All laws at a single time are kept, whatever kappa is. kappa = 1 - sigma / (1 -
    alpha_s), with the sigma of remasking (arXiv 2503.00307), sigma_max = min(1, (1 - alpha_s) / alpha_t).

    Attributes:
        schedule: "cap", sigma = min(eta, sigma_max); "rescale", sigma = eta sigma_max; "loop", as "cap" in the second
            of three phases and 0 in the others: 45 % of the steps lead to the time `loop_time`, 50 % stay there and
            the rest lead to the text. Fewer than 3 steps are even and have no such phase.
        eta: strength, in (0, 1].
        loop_time: of "loop".
    """

    schedule: Literal["cap", "rescale", "loop"] = "cap"
    eta: Share = 0.01
    loop_time: Share = 0.1

    def times(self, done: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """See `KernelSampler`."""
        if self.schedule != "loop":
            return super().times(done, n)
        first, last = (0.45 * n).long(), (0.95 * n).long()
        falling = 1 - (1 - self.loop_time) * done / first.clamp(min=1)
        end = self.loop_time * (n - done) / (n - last)
        loop = torch.where(done < first, falling, torch.where(done <= last, self.loop_time, end)).double()
        return torch.where(first > 0, loop, super().times(done, n))

    def share_to_data(self, process: Any, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor | None:
        """See `KernelSampler`."""
        alpha_t, alpha_s = process.kernel.shares(t).alpha, process.kernel.shares(s).alpha
        noise = 1 - alpha_s
        largest = torch.where(noise < alpha_t, noise / alpha_t, 1.0)
        sigma = self.eta * largest if self.schedule == "rescale" else largest.clamp(max=self.eta)
        if self.schedule == "loop":
            sigma = sigma.where(s == t, 0.0)
        # At s = 0 both kinds of step are the same.
        return torch.where(noise > 0, sigma / noise, 0.0)
