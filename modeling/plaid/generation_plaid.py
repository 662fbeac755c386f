"""Generation by Gaussian diffusion: vectors of pure noise, which step by step become those of a text."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from xlm_hf.modules.canvas import MaskedCanvas
from xlm_hf.modules.checked_options import Positive, PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.devices import shape_of_call, true_indices
from xlm_hf.modules.generation import GenerationCall, NonAutoregressiveGenerationConfig, Sampler
from xlm_hf.modules.masked_generation import MaskedGenerationMixin
from xlm_hf.modules.reverse_process import CanvasProcess
from xlm_hf.modules.unmasking import draw_tokens
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

from .noise_plaid import ancestral_step, tempered

# A counter of random numbers, after those of `reverse_process`: what they decide.
_START, _NOISE = 3, 4
# Rows of logits at once.
_BLOCK_ROWS = 512


@dataclass
class GaussianSampler(Sampler):
    """The reverse process in steps that are even in time (arXiv 2305.18619; 2107.00630, equation 33).

    A step replaces the clean vector in the law of less noise by the expected one. After the last step the tokens are
    drawn from what is predicted of them, which takes one more forward pass.

    Attributes:
        num_steps: steps from noise to text; None means one for each position.
        score_temperature: divides the predicted noise (see `tempered`). Below 1 texts are more probable and less
            varied; published samples use 0.9.
    """

    num_steps: PositiveInt | None = None
    score_temperature: Positive = 1.0

    block_length: ClassVar[int | None] = None
    writes_behind_the_end: ClassVar[bool] = True
    takes_all_steps: ClassVar[bool] = True

    def open(self, process: CanvasProcess) -> None:
        """Nothing is prepared."""

    def step(self, process: Any, predict: Any, number: int) -> bool:
        """A forward pass over the rows that are open, whose vectors then have less noise; False if there is none.

        Until the last step a canvas shows the most probable tokens.
        """
        canvas, wanted = process.canvas, process.in_block()
        called = wanted.any(dim=-1)
        rows, num, _ = shape_of_call(called, wanted)
        if num == 0:
            return False
        canvas.nfe += called
        n = (process.num_steps() - 1).clamp(min=1).double()
        t, s = (((n - process.step - i) / n)[rows].clamp(min=0) for i in (0, 1))
        is_last, wanted = (process.step == n)[rows], wanted[rows]
        index = true_indices(wanted, num)
        draw = partial(
            self.read,
            is_last=is_last[:, None].expand(wanted.shape).flatten()[index],
            uniforms=process.uniforms(rows).flatten()[index],
            config=process.config,
        )
        tokens, expected, gammas = predict(draw, rows, wanted, num, process.told(rows, t, s))
        ids = canvas.ids[rows].masked_scatter(wanted, tokens)
        canvas.rewrite(rows, process.ended(ids, is_last), process.clock[rows, None])
        process.advance(rows, wanted, expected, *gammas.view(-1, len(rows))[:2], self.score_temperature)
        return True

    @staticmethod
    def read(
        logits: LogitsOnDemand, is_last: torch.Tensor, uniforms: torch.Tensor, config: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What S positions show and what is expected of their vectors, and the gammas of the call.

        The tokens (S,) are drawn where `is_last` (S,), and the most probable ones elsewhere.
        """
        head: Any = (logits.unprocessed or logits).head
        table, tokens, expected = head.table, [], []
        for start in range(0, len(uniforms), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            scores = logits[rows]
            drawn = draw_tokens(scores, uniforms[rows], config)
            tokens.append(torch.where(is_last[rows], drawn, scores.argmax(dim=-1)))
            expected.append(scores.softmax(dim=-1).to(table.dtype) @ table)
        return torch.cat(tokens), torch.cat(expected), head.level.gamma


class GaussianProcess(CanvasProcess):
    """Where each row of a canvas stands in the reverse process.

    Args:
        canvas: the rows; its masks are what the process writes.
        call: the call of `generate`.
        size: dimensions of a vector.

    Attributes:
        cells: (B, L) what is written.
        latents: (B, L, size) float64, the noisy vectors.
        expected: (B, L, size) what was last expected of the clean ones, at first 0.
    """

    def __init__(self, canvas: MaskedCanvas, call: GenerationCall, size: int):
        super().__init__(canvas, call.config.make_sampler(), call, is_timed=True)
        self.cells = self.blocks >= 0
        self._dims, every = (torch.arange(x, device=self.cells.device) for x in (size, len(self.cells)))
        self.latents = self._normal(every, _START)
        self.expected = torch.zeros_like(self.latents)

    def num_steps(self) -> torch.Tensor:
        """Forward passes (B,): those of the steps, and one to draw the tokens."""
        return super().num_steps() + 1

    def ended(self, ids: torch.Tensor, is_last: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (R, L), and where they are read for the last time (R,) with padding behind the end of the text."""
        is_end = (ids == (-1 if self.eos_token_id is None else self.eos_token_id)) & is_last[:, None]
        is_end[:, : self.canvas.prompt_width] = False
        return ids.masked_fill(is_end.cumsum(dim=-1) > is_end, self.canvas.pad_token_id)

    def _normal(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        """Normal numbers (R, L, size), float64, for a step of `rows` (R,)."""
        clock, positions = self.clock[rows, None, None], self.canvas.positions[rows][..., None]
        uniforms = uniform(self.seeds[rows, None, None], clock, positions, number, self._dims)
        # At 0 it would be infinite; 2^-54 is less than any other number here.
        return torch.special.ndtri(uniforms + 2.0**-54)

    def told(self, rows: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the network is told of `rows` (R,) at times t (R,), beside their ids; it says gamma at s (R,) too."""
        of_rows = {"is_canvas": self.cells, "latents": self.latents, "expected": self.expected}
        times = {"times": torch.cat((t, s)), "time_index": torch.arange(len(rows), device=rows.device)}
        return {**times, **{name: x[rows] for name, x in of_rows.items()}}

    def advance(self, rows, wanted, expected, gamma_t, gamma_s, temperature: float) -> None:
        """Take the `wanted` (R, L) vectors of `rows` (R,) from one gamma (R,) to another, by `expected` (S, size)."""
        gamma_t, gamma_s = (gamma.double()[:, None, None] for gamma in (gamma_t, gamma_s))
        z, where = self.latents[rows], wanted[..., None]
        self.expected[rows] = self.expected[rows].masked_scatter(where, expected.to(z.dtype))
        clean = tempered(z, self.expected[rows], gamma_t, temperature)
        self.latents[rows] = torch.where(
            where, ancestral_step(z, clean, gamma_t, gamma_s, self._normal(rows, _NOISE)), z
        )


class PlaidGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `PlaidForGaussianDiffusion.generate`.

    `max_new_tokens` is the size of the canvas. Temperature, top-k and top-p act on the draw of the tokens after the
    last step, which without `do_sample` takes the most probable ones. The noise is random in any case.

    Attributes:
        sampler: "ancestral" is the reverse process; its options are those of `GaussianSampler`.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"ancestral": GaussianSampler}

    sampler: str = "ancestral"
    guidance_scale: float | None = None


class PlaidGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the Gaussian diffusion language model."""

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> GaussianProcess:
        """A canvas of noise after each prompt; mask tokens in a prompt become noise that is filled in."""
        canvas = self.open_canvas(call, input_ids, attention_mask, **inputs)
        return GaussianProcess(canvas, call, self.config.embedding_size)

    def time_inputs(self, alpha: Any) -> dict[str, torch.Tensor]:
        """What the sampler says, which is more than a share that is clean."""
        return alpha
