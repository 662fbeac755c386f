"""Generation by block diffusion: from block to block, masked diffusion within, a cache of what is finished."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from xlm_hf.modules.devices import is_synchronous, true_indices
from xlm_hf.modules.generation import GenerationCall, Sampler
from xlm_hf.modules.masked_generation import CanvasGenerationConfig, MaskedGenerationMixin, guided
from xlm_hf.modules.reverse_process import (
    AncestralSampler,
    CanvasProcess,
    ConfidenceSampler,
    FirstHittingSampler,
    RemdmSampler,
)
from xlm_hf.modules.vocabulary_head import LogitsOnDemand


class BD3LMGenerationConfig(CanvasGenerationConfig):
    """Options of `BD3LMForBlockDiffusion.generate`.

    `max_new_tokens` bounds the canvas; a text ends in the block that holds `[EOS]`, and no later one is written.
    `block_length` is the model's by default. Steps of a sampler with `num_steps` are spread evenly over the blocks that
    the canvas may have.

    Attributes:
        sampler: how a block is filled: "ancestral", the reverse process on a grid of times (arXiv 2406.07524);
            "first_hitting", its limit of infinitely many steps, one token at a time (arXiv 2409.02908); "remdm", the
            reverse process in which tokens may be masked again (arXiv 2503.00307); "confidence", the unmasking rules.
            The options of each are those of `AncestralSampler`, `FirstHittingSampler`, `RemdmSampler` and
            `ConfidenceSampler`.
        use_cache: whether keys and values of finished blocks are kept. The decode is the same without, but for
            rounding. Prompts that are filled in are decoded without.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {
        "ancestral": AncestralSampler,
        "first_hitting": FirstHittingSampler,
        "remdm": RemdmSampler,
        "confidence": ConfidenceSampler,
    }

    sampler: str = "ancestral"
    use_cache: bool = True
    guidance_scale: float | None = None


class BlockProcess(CanvasProcess):
    """A canvas in blocks, and the memory of those that are finished.

    A prompt with masks is one block of its own, which is filled in both directions. Under guidance the rows B .. 2B - 1
    of what the network gets are the B rows once more, without their prompts.

    Attributes:
        block_length: columns of a block of the canvas.
        block_ids: (B, L) block of each token, 0 for the prompt.
        memory: None if nothing is remembered.
    """

    def __init__(self, canvas, sampler, call: GenerationCall, memory: "BlockMemory | None" = None):
        super().__init__(canvas, sampler, call)
        is_filled_in = (self.blocks[:, : canvas.prompt_width] >= 0).any(dim=-1)
        self.blocks = torch.where(is_filled_in[:, None], self.blocks.clamp(max=0), self.blocks)
        self.last = self.blocks.amax(dim=-1)
        self.block_length, self.memory = sampler.block_length, memory
        self.block_ids = (self.blocks + 1).masked_fill(is_filled_in[:, None], 0)
        # Behind each row a column that does not exist, for what lies beyond its ends.
        self._none = canvas.ids.shape[1]
        masks, positions = canvas.attention_mask, canvas.positions
        if call.config.guidance_scale is not None:
            without = masks.clone()
            without[:, : canvas.prompt_width - 1] = False
            positions = torch.cat((positions, (without.long().cumsum(dim=-1) - 1).clamp(min=0)))
            masks = torch.cat((masks, without))
        self._mask, self._positions, self._block_ids = (pad(x, (0, 1)) for x in (masks, positions, self.block_ids))

    def window(self, rows: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
        """Where the blocks of `rows` (R,) end, and how far back their tokens are not in the memory.

        Returns:
            columns (R, C) that lead up to the end of each row's block, `_none` where there is none; how many of them,
            the last, the network is to see anew; and whether something of that is to be remembered. On an accelerator
            they are as many as can be, so that the host need not read how many are needed.
        """
        P, size, own = self.canvas.prompt_width, self.block_length, rows % len(self.block)
        blocks = torch.minimum(self.block[own].clamp(min=0), self.last[own].clamp(min=0))
        ends = P + (blocks + 1) * size
        reads = is_synchronous(ends.device)
        num_columns = int(ends.max()) if reads else P + -(-(self._none - P) // size) * size
        is_new, num_new = True, num_columns
        if self.memory is not None and self.memory.layers:
            is_new = not reads or bool((self.memory.blocks[rows] < blocks).any())
            num_new = 2 * size if is_new else size
            # A convolution reaches back beyond its tokens.
            num_columns = max(num_columns, num_new + self.memory.reach)
        elif self.memory is not None:
            num_new = num_columns = P + size
        if self.memory is not None:
            self.memory.blocks[rows] = blocks
        columns = ends[:, None] - num_columns + torch.arange(num_columns, device=ends.device)
        return columns.where((columns >= 0) & (columns < self._none), self._none), num_new, is_new

    def inputs(self, rows: torch.Tensor, columns: torch.Tensor, num_new: int) -> dict[str, torch.Tensor]:
        """What the network gets of these columns, of which the last `num_new` are not in its cache."""
        of_rows, new = rows[:, None], columns[:, -num_new:]
        own = of_rows % len(self.block)
        # A block by itself sees all that comes with it.
        of_blocks = {"block_ids": self._block_ids[own, columns]} if num_new > self.block_length else {}
        return {
            "input_ids": pad(self.canvas.ids, (0, 1), value=self.canvas.pad_token_id)[own, new],
            "position_ids": self._positions[of_rows, new],
            "attention_mask": self._mask[of_rows, columns],
            **of_blocks,
        }


class BlockMemory:
    """Keys and values of the tokens of finished blocks, and the inputs of their short convolutions, by column.

    Rows finish their blocks at different times. So what is remembered stands in the columns of the canvas, and a call
    gets for each of its rows those before its own block.

    Args:
        shape: rows and columns; behind these stands one more, for what lies beyond the ends of a row.
        reach: how many tokens back a short convolution goes.

    Attributes:
        blocks: (R,) the block before which all of a row is remembered.
        layers: tensors (R, L + 1, ...) of each layer; empty before the first call.
        kinds: of the layers of the cache.
    """

    def __init__(self, shape: tuple[int, int], reach: int, device: torch.device):
        self.shape, self.reach = (shape[0], shape[1] + 1), reach
        self.blocks = torch.full((shape[0],), -1, device=device)
        self.layers: list[list[torch.Tensor]] = []
        self.kinds: list[Any] = []

    def read(self, rows: torch.Tensor, columns: torch.Tensor) -> Cache:
        """A cache of what is remembered of `columns` (R, C) of `rows` (R,)."""
        layers: list[Any] = [kind() for kind in self.kinds]
        of_rows, last = rows[:, None], columns[:, columns.shape[1] - self.reach :]
        for layer, (keys, values, *inputs) in zip(layers, self.layers, strict=True):
            # As after a call, without the empty tensors of a fresh layer, which a device would be sent.
            layer.keys, layer.values = (x[of_rows, columns].transpose(1, 2) for x in (keys, values))
            layer.is_initialized = True
            if inputs:
                layer.inputs = inputs[0][of_rows, last]
        return Cache(layers=layers)

    def write(self, cache: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Remember what a cache holds last, of `columns` (R, C) of `rows` (R,)."""
        for number, layer in enumerate(cache.layers):
            parts = [layer.keys.transpose(1, 2), layer.values.transpose(1, 2)]
            parts += [x for x in [getattr(layer, "inputs", None)] if x is not None]
            if number == len(self.layers):
                self.kinds.append(type(layer))
                self.layers.append([x.new_zeros(*self.shape, *x.shape[2:]) for x in parts])
            for remembered, x in zip(self.layers[number], parts, strict=True):
                remembered[rows[:, None], columns] = x[:, -columns.shape[1] :]


class BD3LMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the block diffusion language model."""

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> BlockProcess:
        """A canvas after each prompt, in blocks."""
        canvas, sampler = self.open_canvas(call, input_ids, attention_mask, **inputs), call.config.make_sampler()
        sampler = replace(sampler, block_length=sampler.block_length or self.config.block_length)
        memory = None
        if call.config.use_cache and not canvas.masked[:, : canvas.prompt_width].any():
            rows, columns = canvas.ids.shape
            shape = (rows * canvas.passes_per_call, columns)
            memory = BlockMemory(shape, self.config.conv_kernel_size // 2, canvas.ids.device)
        return BlockProcess(canvas, sampler, call, memory)

    def generation_step(self, call: GenerationCall, state: Any, step: int) -> bool:
        """A step of the sampler."""
        return state.take_step(partial(self.predict, call, state, step), step)

    def predict(
        self: Any, call: GenerationCall, state: Any, step: int, function, rows, wanted, num_wanted: int, alpha
    ) -> Any:
        """One forward pass over the blocks that `rows` (R,) are at, as `MaskedGenerationMixin.predict`.

        It begins with what is not in the memory: a row's prompt, or the block that it has just finished. So a finished
        block is written into the memory by the first step of the next, and costs no pass of its own. The first pass
        reads the prompts of all rows.
        """
        memory, scale = state.memory, call.config.guidance_scale
        if memory is not None and not memory.layers:
            of_all = torch.zeros_like(state.canvas.masked)
            of_all[rows] = wanted
            rows, wanted = torch.arange(len(of_all), device=rows.device), of_all
        ids, full_index = state.canvas.ids[rows], true_indices(wanted, num_wanted)
        if scale is not None:
            rows = torch.cat((rows, rows + len(state.canvas.ids)))
        columns, num_new, is_new = state.window(rows)
        inputs, cache = state.inputs(rows, columns, num_new), None
        index = true_indices(pad(wanted, (0, 1)).gather(1, columns[: len(wanted), -num_new:]), num_wanted)
        # A number that is rounded up may exceed the window.
        index = pad(index, (0, len(full_index) - len(index)))
        if scale is not None:
            index = torch.cat((index, index + len(wanted) * num_new))

        def head_function(hidden_states, head, suppressed_ids):
            logits = LogitsOnDemand(guided(hidden_states, scale), head, suppressed_ids)
            suppressed = call.config.suppress_tokens
            return function(logits.processed(suppressed, call.logits_processor, ids, full_index, step))

        if memory is not None:
            cache = memory.read(rows, columns[:, :-num_new]) if memory.layers else self.new_cache()
        output = self(**inputs, logits_index=index, head_function=head_function, cache=cache)
        if memory is not None and is_new:
            memory.write(cache, rows, columns[:, -num_new:])
        return output.head_output
