"""What the generation of every non-autoregressive family shares: options that refuse typos, seeds, prompts, output.

The dialect is that of the diffusion language models that transformers ships (`transformers.models.diffusion_gemma`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.generation import GenerationConfig
from transformers.utils import ModelOutput

from .counter_random import random_bits
from .devices import is_synchronous
from .messages import check_options


class NonAutoregressiveGenerationConfig(GenerationConfig):
    """Options of a family's `generate`: its annotated class attributes, and nothing else.

    Attributes:
        max_new_tokens: most tokens to write after the prompt; None means up to the model's positions.
        max_length: most tokens in all, the prompt included; None means no bound of its own.
        do_sample: draw tokens at random; False takes the most probable.
        temperature: divides the logits before anything is drawn.
        top_k: number of candidates kept; None keeps all.
        top_p: probability mass of the candidates kept; None keeps all.
        suppress_tokens: ids that are never written, beside those of the model's config.
        return_dict_in_generate: False returns the sequences alone.
        return_history: also return the step that wrote each token.
        bos_token_id: id of the beginning-of-sequence token.
        pad_token_id: fills ragged rows of the output.
        eos_token_id: id of the end-of-sequence token.

    Raises:
        ValueError: for an option that does not exist, naming the closest one, and for a value out of its range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: list[int] | None = None
    return_dict_in_generate: bool = True
    return_history: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    _metadata: ClassVar[tuple[str, ...]] = ("_commit_hash", "_from_model_config", "transformers_version")

    # The parent's __init__ is left out on purpose: it would bring options that none of these families has.
    def __init__(self, **options):
        known = self.option_names()
        check_options(type(self).__name__, [name for name in options if name not in self._metadata], known)
        for name in known:
            setattr(self, name, options.get(name, getattr(type(self), name)))
        for name in self._metadata:
            setattr(self, name, options.get(name))
        self.validate()

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options, those of the base class first."""
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, NonAutoregressiveGenerationConfig)]
        return [name for base in bases for name in base.__annotations__ if not name.startswith("_")]

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        self._check_positive("max_new_tokens", "max_length", "temperature", "top_k")
        self._check_probability("top_p")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0 and is {value}.")

    def _check_probability(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1] and is {value}.")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)} and is {getattr(self, name)!r}.")

    @classmethod
    def from_model_config(cls, model_config):
        """Not supported: generation options do not live in a model's config."""
        raise NotImplementedError(f"{cls.__name__} is not derived from a model config.")


@dataclass
class NonAutoregressiveGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: (B, L) int64: the prompt, padded on the left, then what was written, padded on the right.
        tokens_per_forward: (B,) float: tokens written by one forward pass, on average.
        nfe: (B,) int64: number of function evaluations, that is forward passes that the row took part in.
        finish_reason: for each row, why it ended: "stop" (the model said so) or "length" (no room was left).
        history: (B, L) int64 with `return_history=True`: the step, from 0, that wrote each token of `sequences`; -1
            for the prompt and for padding.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    finish_reason: list[str] | None = None
    history: torch.Tensor | None = None


def row_seeds(seed: int | Sequence[int] | torch.Tensor | None, num_rows: int, device: torch.device) -> torch.Tensor:
    """One seed for each row of a batch.

    Args:
        seed: an integer, from which row i gets a hash of (seed, i); or one integer a row, taken as they are, so that a
            row decodes alike in any batch; or None, which draws a seed from torch's global generator.
        num_rows: rows of the batch.
        device: of the result.

    Returns:
        (num_rows,) int64.

    Raises:
        ValueError: if there are as many seeds as neither one nor the rows.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        return random_bits(seed, torch.arange(num_rows, device=device))
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=device)
    if seeds.shape != (num_rows,):
        raise ValueError(
            f"seed has {seeds.numel()} entries for {num_rows} rows: give one integer, or one for each row."
        )
    return seeds


def rounded_up(size: int, most: int, device: torch.device) -> int:
    """`size` where reads are free, as on a CPU; on an accelerator the next power of two, or `most` if that is less.

    So few shapes, and few graphs, compiled or captured, serve all steps of all decodes, at the price of work whose
    results nobody uses.
    """
    return size if is_synchronous(device) or not size else min(1 << (size - 1).bit_length(), most)


def true_indices(mask: torch.Tensor, num: int) -> torch.Tensor:
    """The first `num` of: flat indices of the True entries of `mask` in reading order, then those of the others."""
    return mask.flatten().logical_not().int().argsort(stable=True)[:num]


def shape_of_call(
    called: torch.Tensor, wanted: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, int, list[int]]:
    """The rows that take part in a forward pass and the positions that are looked at, by one reading of the device.

    Args:
        called: (B,) bool, the rows.
        wanted: (B, L) bool, the positions, in these rows alone.
        others: integers to be read with them.

    Returns:
        indices (R,) of the rows; the number of positions; the other integers. Both numbers are `rounded_up`: behind the
        rows that are called come some of the others.
    """
    num_rows, num_wanted, *read = torch.stack((called.sum(), wanted.sum(), *others)).tolist()
    num_rows = rounded_up(num_rows, len(called), called.device)
    return true_indices(called, num_rows), rounded_up(num_wanted, num_rows * wanted.shape[1], called.device), read


def left_align_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of every row to its left and drop columns that hold nothing but padding.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens; the tokens of a row keep their order.

    Returns:
        the moved ids and mask, (B, longest row), the mask as bool.
    """
    order = attention_mask.bool().int().argsort(dim=-1, stable=True)
    longest = int(attention_mask.bool().sum(dim=-1).max())
    order = order[:, order.shape[1] - longest :]
    return input_ids.gather(-1, order), attention_mask.bool().gather(-1, order)


class NonAutoregressiveGenerationMixin:
    """Plumbing between `generate`, the generation config of a model, and transformers' loading code."""

    config: Any
    device: Any
    generation_config: Any
    generation_config_class: Any

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **loading_options
    ) -> None:
        """Called by `from_pretrained`: take the generation config of the call, or else that of the checkpoint."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class(**generation_config.to_dict())
            return
        loading_options.pop("trust_remote_code", None)
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                **loading_options,
            )
        except OSError:
            self.generation_config = self.generation_config_class()

    def resolve_generation_config(
        self, generation_config: NonAutoregressiveGenerationConfig | None, overrides: dict[str, Any]
    ) -> Any:
        """Options of one call: `overrides` over `generation_config` over the model's own."""
        base = self.generation_config if generation_config is None else generation_config
        if not overrides:
            return base
        return type(base)(**{**copy.deepcopy(base.to_dict()), **overrides})

    def room_for_new_tokens(
        self, generation_config: NonAutoregressiveGenerationConfig, prompt_lengths: torch.Tensor
    ) -> torch.Tensor:
        """How many tokens each row may write, by the options and the model's positions: (B,) int64.

        It depends on a row's own prompt alone, so that a row decodes alike in any batch.

        Args:
            generation_config: the options.
            prompt_lengths: (B,) tokens of each prompt.

        Raises:
            ValueError: if a prompt fills the model's positions, or the options ask for more than they hold.
        """
        positions, longest = self.config.max_position_embeddings, int(prompt_lengths.max())
        room = positions - longest
        if room <= 0:
            raise ValueError(
                f"The prompt has {longest} tokens and the model has {positions} positions, which leaves no room to "
                "write: shorten the prompt or train with a larger max_position_embeddings."
            )
        if generation_config.max_new_tokens is not None and generation_config.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens is {generation_config.max_new_tokens}, but after a prompt of {longest} tokens the "
                f"model has {room} of its {positions} positions left: ask for at most {room}."
            )
        if generation_config.max_length is not None and generation_config.max_length <= longest:
            raise ValueError(
                f"max_length is {generation_config.max_length} and a prompt alone has {longest} tokens: raise "
                "max_length or shorten the prompt."
            )
        max_length = min(positions, generation_config.max_length or positions)
        return (max_length - prompt_lengths).clamp(max=generation_config.max_new_tokens or max_length)

    def check_token_ids(self, input_ids: torch.Tensor) -> None:
        """Raise ValueError if an id lies outside the model's vocabulary."""
        vocab_size = self.config.vocab_size
        outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"Token id {int(outside[0])} is outside the model's vocabulary of {vocab_size}: use the tokenizer that "
                "was saved with the model."
            )
