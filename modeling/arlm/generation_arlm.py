"""Generation from left to right: transformers' own loop and caches, with this library's seeds and output."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from xlm_hf.modules.checked_options import CheckedOptions, Count, Interval, PartialShare, Positive, PositiveInt, Share
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.edits import INSERT, EditLog
from xlm_hf.modules.generation import GenerationCall, GenerationOptionsMixin, followers, row_seeds
from xlm_hf.modules.generation_output import NonAutoregressiveGenerationOutput
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.modules.token_sampling import sample_categorical


class ARLMGenerationConfig(CheckedOptions, GenerationConfig):
    """Options of `ARLMForCausalLM.generate`: those of transformers' `GenerationConfig`, and no others.

    Two differ from there: without `max_new_tokens` and `max_length` a sequence may fill the model's positions, and
    `top_k` keeps all tokens by default.

    Attributes:
        return_history: also return the step that wrote each token, and every edit, and so all of
            `ARLMGenerationOutput`.

    Raises:
        ValueError: for an option that does not exist, naming the closest one, and for a value out of its range.
    """

    max_new_tokens: PositiveInt | None
    max_length: PositiveInt | None
    min_length: Count | None
    min_new_tokens: Count | None
    early_stopping: bool | Literal["never"] | None
    max_time: Positive | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: PositiveInt | None
    num_return_sequences: PositiveInt | None
    use_cache: bool | None
    cache_implementation: str | None
    temperature: Positive | None
    top_k: Count | None
    top_p: Share | None
    min_p: Annotated[float, Interval("[0, 1]")] | None
    top_h: Share | None
    typical_p: Share | None
    epsilon_cutoff: PartialShare | None
    eta_cutoff: PartialShare | None
    repetition_penalty: Positive | None
    length_penalty: float | None
    no_repeat_ngram_size: Count | None
    bad_words_ids: list[list[int]] | None
    renormalize_logits: bool | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[float, float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    guidance_scale: float | None
    forced_bos_token_id: Count | None
    forced_eos_token_id: Count | list[int] | None
    pad_token_id: Count | None
    bos_token_id: Count | None
    eos_token_id: Count | list[int] | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    return_dict_in_generate: bool | None
    return_history: bool

    _metadata = ("_commit_hash", "_from_model_config", "transformers_version")

    def __init__(self, **options):
        known = self.option_names()
        unknown = [name for name in options if name not in known and name not in self._metadata]
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {unknown[0]!r}: {did_you_mean(unknown[0], known)}")
        defaults = {"top_k": 0, "return_history": False}
        super().__init__(**{**defaults, **{name: value for name, value in options.items() if value is not None}})

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options."""
        return [name for name in vars(GenerationConfig()) if name not in cls._metadata] + ["return_history"]

    def updated(self, **overrides: Any) -> "ARLMGenerationConfig":
        """A copy with other values."""
        # transformers keeps ids as tensors here while it decodes.
        own = {name: value for name, value in self.to_dict().items() if not name.endswith("_tensor")}
        return type(self)(**own | overrides)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        self.check()
        # An option that the decoding at hand does not use, such as a temperature in greedy decoding, is no mistake.
        super().validate(user_set_attributes={"do_sample", "num_beams"})

    @classmethod
    def from_model_config(cls, model_config) -> "ARLMGenerationConfig":
        """Options of a new model: the special ids of its config."""
        return cls(**{name: getattr(model_config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})


@dataclass
class ARLMGenerationOutput(NonAutoregressiveGenerationOutput):
    """What `generate` returns: the output of every family, and what transformers' `GenerateDecoderOnlyOutput` adds.

    Of a beam search, `nfe` counts the passes that wrote the sequence, each of them over `num_beams` hypotheses.

    Attributes:
        sequences_scores: (B,) log-probability / length^length_penalty of a beam search, with `output_scores=True`.
        scores: per step (rows, V) processed scores, with `output_scores=True`.
        logits: per step (rows, V) logits of the model, with `output_logits=True`.
        beam_indices: (B, new tokens) hypothesis that each token was written to, of a beam search; -1 for padding.
        attentions: per step and layer, with `output_attentions=True`.
        hidden_states: per step and layer, with `output_hidden_states=True`.
        cache: the cache.
    """

    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cache: Cache | None = None


class _CapacityCriteria(StoppingCriteria):
    """Ends a row once it has written its capacity of tokens: (B,), by its own prompt alone."""

    def __init__(self, capacity: torch.Tensor, prompt_width: int):
        self.capacity = capacity
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> Any:
        capacity = self.capacity.repeat_interleave(len(input_ids) // len(self.capacity))
        return input_ids.shape[1] - self.prompt_width >= capacity


class _SeededDraw(LogitsProcessor):
    """Draws the token of each row by its own seed and leaves nothing else to be drawn.

    transformers draws a batch from one generator, so that a row would depend on its neighbours.
    """

    def __init__(self, seeds: torch.Tensor, prompt_width: int):
        self.seeds = seeds
        self.prompt_width = prompt_width
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        self.scores.append(scores)
        tokens = sample_categorical(scores, uniform(self.seeds, input_ids.shape[1] - self.prompt_width))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Passes:
    """Counts the forward passes of a model while it is open: an assisted step writes several tokens by one."""

    def __init__(self, model: Any):
        self.model, self.count = model, 0

    def __enter__(self) -> None:
        def add_one(*_: Any) -> None:
            self.count += 1

        self.hook = self.model.register_forward_pre_hook(add_one)

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


def _kept_generators(device: torch.device) -> AbstractContextManager:
    """Restore torch's global generators, of the CPU and of `device`, on leaving."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


class ARLMGenerationMixin(GenerationOptionsMixin, GenerationMixin):  # type: ignore[misc]
    """Adds `generate` to the left-to-right language model."""

    # What transformers' `generate` takes that is no option of its config.
    _passed_on = (
        *("prefix_allowed_tokens_fn", "assistant_model", "assistant_tokenizer", "synced_gpus", "custom_generate"),
        *("trust_remote_code", "negative_prompt_ids", "negative_prompt_attention_mask", "cache", "past_key_values"),
        *("logits_to_keep", "position_ids"),
    )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        seed: int | list[int] | torch.Tensor | None = None,
        tokenizer: Any = None,
        inputs: Any = None,
        num_samples: int | None = None,
        **overrides,
    ) -> ARLMGenerationOutput | torch.Tensor | None:
        """Write sequences from left to right, in all ways of transformers' `generate` but beam search with sampling.

        Args as there, `tokenizer` for `stop_strings`, and:
            input_ids: (B, P) prompts, `prompt [BOS]` or `[BOS] beginning`; a bare prompt gets its `[BOS]` at the end.
                Ragged prompts are padded on either side, or lists. None writes one sequence from an empty prompt.
            generation_config: options; what it leaves open is the model's own.
            seed: of sampling; one integer, or one for each row (see `row_seeds`).
            inputs: prompts by another name.
            num_samples: texts to write from nothing (see `prompt_tensors`).

        Returns:
            the sequences, or `ARLMGenerationOutput` with `return_dict_in_generate=True` or `return_history=True`.

        Raises:
            ValueError: for beam search with sampling, or an option, an id or a prompt that does not fit.
        """
        passed = {name: overrides.pop(name) for name in self._passed_on if name in overrides}
        config, asked = self.resolve_generation_config(generation_config, overrides)
        is_assisted = self._check_mode(config, passed.get("assistant_model"))
        prompt, mask = self._prepare_prompt(*self.prompt_tensors(input_ids, attention_mask, inputs, num_samples))
        seeds = row_seeds(seed, len(prompt), prompt.device, copies=config.num_return_sequences or 1)
        capacity = self.capacity_after(GenerationCall(config, seeds, asked=asked), mask.sum(dim=-1))
        return_dict = config.return_dict_in_generate or config.return_history
        config.update(max_new_tokens=int(capacity.max()), max_length=None, return_dict_in_generate=True)
        is_full = _CapacityCriteria(capacity, mask.shape[1])
        processors, criteria = followers(streamer, logits_processor, stopping_criteria)
        draw = [_SeededDraw(seeds, prompt.shape[1])] if config.do_sample else []
        passes = _Passes(self)
        # transformers draws from what _SeededDraw leaves it, which is no choice but moves the global generator.
        with _kept_generators(prompt.device), passes:
            output: Any = super().generate(
                prompt,
                attention_mask=mask.long(),
                generation_config=config,
                streamer=streamer,
                logits_processor=LogitsProcessorList([*processors, *draw]),
                stopping_criteria=StoppingCriteriaList([*criteria, is_full]),
                tokenizer=tokenizer,
                **{**self._convolution_cache(config, passed), **passed},
            )
        if draw and config.output_scores and not is_assisted:
            output["scores"] = tuple(draw[0].scores)
        if passed.get("custom_generate") is not None:
            return output
        result = self._output(output, prompt, mask, capacity, config, passes.count if is_assisted else None)
        return result if return_dict else result.sequences

    def _convolution_cache(self: Any, config: ARLMGenerationConfig, passed: dict[str, Any]) -> dict[str, Any]:
        """The cache to pass on where there is a short convolution, which no other of transformers holds."""
        is_given = passed.get("cache") is not None or passed.get("past_key_values") is not None
        if not self.config.conv_kernel_size or config.use_cache is False or is_given:
            return {}
        config.cache_implementation = None
        return {"cache": self.new_cache()}

    def _check_mode(self, config: ARLMGenerationConfig, assistant_model: Any) -> bool:
        """Refuse ways of decoding that do not work here; whether tokens are proposed, several for each pass."""
        mode = config.get_generation_mode(assistant_model)
        # Beam search with sampling draws a batch from one generator.
        modes = (
            *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH),
            GenerationMode.ASSISTED_GENERATION,
        )
        if mode not in modes:
            raise ValueError(
                f"The options select {mode.value}, but only {', '.join(mode.value for mode in modes)} are supported: "
                "unset num_beams or do_sample."
            )
        if config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit needs layers that were trained to be the last one: unset it.")
        return mode == GenerationMode.ASSISTED_GENERATION

    def _prepare_prompt(self, input_ids, attention_mask):
        """Check prompts, end bare ones with `[BOS]`, and move the padding to the left."""
        bos_id = self.config.bos_token_id
        input_ids, mask = self.aligned_prompts(input_ids, attention_mask, [bos_id])
        opened = ((input_ids == bos_id) & mask).any(dim=-1)
        if opened.all():
            return input_ids, mask
        if opened.any():
            raise ValueError(f"Some prompts hold a [BOS] (id {bos_id}) and others do not: add it to all or none.")
        column = torch.ones_like(input_ids[:, :1])
        return torch.cat((input_ids, bos_id * column), dim=1), torch.cat((mask, column.bool()), dim=1)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """The processors of transformers, which puts temperature, top-k and the like last, and the draw after them."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        processors.sort(key=lambda processor: isinstance(processor, _SeededDraw))
        return processors

    def _output(self, output, prompt, mask, capacity, config: ARLMGenerationConfig, num_passes: int | None) -> Any:
        """Count what each row wrote and blank what stands behind it; without `num_passes`, a pass wrote each token."""
        rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(config.num_return_sequences or 1)
        prompt, mask, capacity, pad_id = prompt[rows], mask[rows], capacity[rows], self.config.pad_token_id
        written = output.sequences[:, prompt.shape[1] :]
        columns = torch.arange(written.shape[1], device=written.device)
        eos_ids = [] if config.eos_token_id is None else config.eos_token_id
        is_eos = torch.isin(written, torch.as_tensor(eos_ids, dtype=torch.int64, device=written.device))
        if output.get("beam_indices") is None:
            exists = (is_eos.cumsum(dim=-1) - is_eos.long() == 0) & (columns < capacity[:, None])
            exists &= (written != pad_id) | is_eos
        else:
            # A beam search fills short rows with the end-of-sequence token where the pad id is 0.
            exists = output.beam_indices >= 0
        lengths = exists.sum(dim=-1)
        stopped = (is_eos & exists).any(dim=-1) | (lengths < capacity)
        nfe = lengths if num_passes is None else torch.full_like(lengths, num_passes)
        log, rows = EditLog(), torch.arange(len(written), device=written.device)[:, None]
        log.add(INSERT, exists, row=rows, step=columns, position=mask.sum(dim=-1)[:, None] + columns, token=written)
        history = torch.cat((torch.full_like(prompt, -1), torch.where(exists, columns, -1)), dim=1)
        return ARLMGenerationOutput(
            **{
                **output,
                "sequences": torch.cat((prompt, written.masked_fill(~exists, pad_id)), dim=1),
                "tokens_per_forward": (lengths / nfe).nan_to_num(1.0),
                "nfe": nfe,
                "finish_reason": ["stop" if row else "length" for row in stopped.tolist()],
                "history": history if config.return_history else None,
                "edits": log.events() if config.return_history else None,
            }
        )
