"""What the generation of every non-autoregressive family shares: options that refuse typos, the loop, seeds, output.

The dialect is that of the diffusion language models that transformers ships (`transformers.models.diffusion_gemma`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

import torch
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .checked_options import CheckedOptions, Count, Positive, PositiveInt, Share, annotations_of, check_value
from .counter_random import random_bits
from .devices import keep_freed_memory
from .edits import EditLog
from .generation_output import NonAutoregressiveGenerationOutput
from .messages import check_options, shown
from .prompts import PromptsMixin, integers


class Sampler(CheckedOptions):
    """A way of decoding with options of its own: a dataclass, whose fields a generation config takes beside its own.

    A sampler holds options and decides; it does not call the model. Whoever owns the forward pass hands it over.
    """

    def __post_init__(self):
        self.check()

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of its options."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


class NonAutoregressiveGenerationConfig(CheckedOptions, GenerationConfig):
    """Options of a family's `generate`: its annotated class attributes, those of its sampler, and nothing else.

    A family with several samplers lists them in `samplers` and has an option `sampler`; a config then holds the
    options of that one alone. What is loaded may hold those of the others too, which are dropped.

    Attributes:
        max_new_tokens: most tokens to write after the prompt; None means up to the model's positions.
        max_length: most tokens in all, the prompt included; None means no bound of its own.
        do_sample: draw tokens at random; False takes the most probable.
        temperature: divides the logits before anything is drawn.
        top_k: number of candidates kept; None keeps all.
        top_p: probability mass of the candidates kept; None keeps all.
        suppress_tokens: suppressed ids, beside those of the model's config.
        num_return_sequences: texts for each prompt.
        use_cache: for callers that say it to every model; results do not depend on it.
        return_dict_in_generate: False returns the sequences alone.
        return_history: also return the step that wrote each token, and every edit.
        bos_token_id: id of the beginning-of-sequence token.
        pad_token_id: fills ragged rows of the output.
        eos_token_id: id of the end-of-sequence token; transformers' trainer may write a list of them.

    Raises:
        ValueError: for an option that does not exist, naming the closest one, for one of another sampler, and for a
            value out of its range.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {}
    renamed_samplers: ClassVar[dict[str, str]] = {}  # old name -> name

    max_new_tokens: PositiveInt | None = None
    max_length: PositiveInt | None = None
    do_sample: bool = False
    temperature: Positive = 1.0
    top_k: PositiveInt | None = None
    top_p: Share | None = None
    suppress_tokens: list[int] | None = None
    num_return_sequences: PositiveInt = 1
    use_cache: bool | None = None
    return_dict_in_generate: bool = True
    return_history: bool = False
    bos_token_id: Count | None = None
    pad_token_id: Count | None = None
    eos_token_id: Count | list[int] | None = None

    _metadata: ClassVar[tuple[str, ...]] = ("_commit_hash", "_from_model_config", "transformers_version")

    # The parent's __init__ is left out on purpose: it would bring options that none of these families has.
    def __init__(self, **options):
        options, own = self._of_sampler(options)
        self._check_names(options)
        for name, default in own.items():
            setattr(self, name, options.get(name, default))
        for name in self._metadata:
            setattr(self, name, options.get(name))
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; with `sampler` come the options of the new one, and those of others go."""
        if name == "sampler" and self.samplers:
            options, own = self._of_sampler({"sampler": value})
            kept = {**own, **self._saved({**vars(self), **options}), **options}
            vars(self).clear()
            vars(self).update(kept)
        else:
            super().__setattr__(name, value)

    @classmethod
    def _check_names(cls, options: dict[str, Any]) -> None:
        """Raise ValueError for an option that does not exist, or that the sampler of `options` does not have."""
        own = cls._of_sampler(options)[1]
        for name in [name for name in options if name not in own and name not in cls._metadata]:
            users = [sampler for sampler, of in cls.samplers.items() if name in of.option_names()]
            if users and options[name] is not None:
                raise ValueError(
                    f"The sampler {options.get('sampler', own['sampler'])!r} has no option {name!r}, which "
                    f"{' and '.join(users)} {'have' if len(users) > 1 else 'has'}: unset it or choose another sampler."
                )
            check_options(cls.__name__, [name], cls.option_names())

    @classmethod
    def _of_sampler(cls, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options with the name of their sampler as it is now, and all options of that sampler by default."""
        own = {name: getattr(cls, name) for name in annotations_of(cls)}
        if cls.samplers:
            sampler = options.get("sampler", own["sampler"])
            sampler = cls.renamed_samplers.get(str(sampler), sampler)
            if sampler not in tuple(cls.samplers):
                raise ValueError(f"sampler must be one of {', '.join(cls.samplers)} and is {sampler!r}.")
            options = {**options, "sampler": sampler}
            own.update({field.name: field.default for field in fields(cls.samplers[sampler])})  # type: ignore[arg-type]
        return options, own

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options, those of the base class first and those of the samplers last."""
        of_samplers = [name for sampler in cls.samplers.values() for name in sampler.option_names()]
        return list(dict.fromkeys([*cls._of_sampler({})[1], *of_samplers]))

    @classmethod
    def _saved(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Saved options without those of samplers that are not chosen."""
        options, own = cls._of_sampler(options)
        others = set(cls.option_names()) - own.keys()
        return {name: value for name, value in options.items() if name not in others}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """As in transformers; a saved config may hold the options of every sampler."""
        check_value("A generation config", config_dict, dict)
        chosen = {name: kwargs[name] for name in ("sampler",) if name in kwargs}
        return super().from_dict(cls._saved({**config_dict, **chosen}), **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; another sampler brings its options with it."""
        # First, so that the others find the options that they set.
        return super().update(*args, **dict(sorted(kwargs.items(), key=lambda option: option[0] != "sampler")))

    def updated(self, **overrides: Any) -> Any:
        """A copy with other values; the options of a sampler that is replaced are dropped."""
        base = {**self.to_dict(), **{name: overrides[name] for name in ("sampler",) if name in overrides}}
        return type(self)(**{**self._saved(base), **overrides})

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        self._check_names({name: value for name, value in vars(self).items() if name[0] != "_"})
        self.check()
        if self.samplers:
            self.make_sampler()

    def make_sampler(self: Any) -> Any:
        """The sampler of these options."""
        sampler = self.samplers[self.sampler]
        return sampler(**{name: getattr(self, name) for name in sampler.option_names()})

    @classmethod
    def from_model_config(cls, model_config):
        """Not supported: generation options do not live in a model's config."""
        raise NotImplementedError(f"{cls.__name__} is not derived from a model config.")


@dataclass
class GenerationCall:
    """One call of `generate`.

    Attributes:
        config: its options.
        seeds: (B,) of its rows.
        logits_processor: called as transformers does.
        is_watched: whether somebody sees every step, so that none may be passed over.
        log: of every edit, where it is asked for.
        asked: the options that the call set itself.
    """

    config: Any
    seeds: torch.Tensor
    logits_processor: LogitsProcessorList | None = None
    is_watched: bool = False
    log: EditLog | None = None
    asked: frozenset[str] = frozenset()


def row_seeds(seed: Any, num_rows: int, device: torch.device, copies: int = 1) -> torch.Tensor:
    """One seed for each row of a batch.

    Args:
        seed: an integer, from which row i gets a hash of (seed, i). Or one integer a row, taken as it is, so a row
            decodes alike in any batch. None draws a seed from torch's global generator.
        num_rows: rows of the batch.
        device: of the result.
        copies: texts for each row; of more than one, text k of a row gets a hash of the row's seed and k.

    Returns:
        (num_rows x copies,) int64.

    Raises:
        ValueError: if they are not integers, or their number is neither one nor that of the rows.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if copies > 1:
        of_rows = row_seeds(seed, num_rows, device)
        return random_bits(of_rows[:, None], torch.arange(copies, device=device)).flatten()
    number: Any = seed.item() if isinstance(seed, torch.Tensor) and seed.ndim == 0 else seed
    if isinstance(number, Integral):
        return random_bits(int(number), torch.arange(num_rows, device=device))
    seeds = integers("seed must be an integer, or one for each row,", seed, (1,)).to(device)
    if seeds.shape != (num_rows,):
        raise ValueError(f"seed has {len(seeds)} entries for {num_rows} rows: give one integer, or one for each row.")
    return seeds


def followers(streamer: Any, logits_processor: Any, stopping_criteria: Any) -> list[list[Any]]:
    """Logits processors and stopping criteria as lists; raises ValueError for what is no function or list of such."""
    put, lists = None if streamer is None else getattr(streamer, "put", repr(streamer)), []
    names = ("logits_processor", "stopping_criteria", "streamer.put")
    for name, given in zip(names, (logits_processor, stopping_criteria, put), strict=True):
        lists.append([] if given is None else [*given] if isinstance(given, (list, tuple)) else [given])
        if others := [one for one in lists[-1] if not callable(one) or isinstance(one, type)]:
            raise ValueError(f"{name} must be a function, or a list of functions, and has {shown(others[0])}.")
    return lists[:2]


class GenerationOptionsMixin(PromptsMixin):
    """Plumbing between `generate`, the generation config of a model, and transformers' loading code."""

    generation_config: Any
    generation_config_class: Any
    output_modalities = ("text",)

    def adjust_generation_fn(
        self: Any, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **loading_options
    ) -> None:
        """Called by `from_pretrained`: take the generation config of the call, or else that of the checkpoint.

        Raises:
            ValueError: for weights that are not finite.
        """
        for name, x in self.named_parameters():
            if x.device.type == "cpu" and not x.isfinite().all():
                raise ValueError(f"{pretrained_model_name_or_path} has NaN or infinity in {name}: choose another.")
        if generation_config is not None:
            self.generation_config = self.generation_config_class(**generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:
            return
        loading_options.pop("trust_remote_code", None)
        try:
            config_class = self.generation_config_class
            self.generation_config = config_class.from_pretrained(pretrained_model_name_or_path, **loading_options)
        except OSError:
            self.generation_config = self.generation_config_class()

    def resolve_generation_config(self, generation_config: Any, overrides: dict) -> tuple[Any, frozenset[str]]:
        """Options of one call: `overrides` over `generation_config` over the model's own.

        Of a `GenerationConfig` of transformers what it sets counts; one of the family's own takes the place of the
        model's. A bound on the length that the call sets replaces the saved ones.

        Returns:
            the options, and the names of those that the call sets.
        """
        base, asked = self.generation_config, dict(overrides)
        if type(base) is GenerationConfig:
            of_model = {n: x for n, x in base.to_diff_dict().items() if n[0] != "_" and n != "transformers_version"}
            base = self.generation_config_class(**of_model)
        if generation_config is not None:
            own, saved = type(base), base.to_dict()
            is_own = isinstance(generation_config, own)
            if not is_own and type(generation_config) is not GenerationConfig:
                found = shown(generation_config)
                raise ValueError(f"generation_config must be a {own.__name__} or GenerationConfig and is {found}.")
            given = generation_config.to_dict() if is_own else generation_config.to_diff_dict()
            given = {name: value for name, value in given.items() if name[0] != "_" and value != saved.get(name)}
            given.pop("transformers_version", None)
            base, asked = generation_config if is_own else base, {**given, **overrides}
        # Attributes may have been set since it was made.
        base.validate()
        unset = [name for name in ("max_new_tokens", "max_length") if asked.get(name) is None]
        if len(unset) == 1:
            asked[unset[0]] = None
        config = base.updated(**asked)
        self.check_option_ids(vars(config))
        return config, frozenset(name for name, value in asked.items() if value is not None)

    def capacity_after(self, call: GenerationCall, prompt_lengths: torch.Tensor) -> torch.Tensor:
        """How many tokens each row may write after its prompt, by the options and the model's positions: (B,) int64.

        It depends on a row's own prompt alone, so that a row decodes alike in any batch. A default that exceeds what a
        prompt leaves is cut.

        Args:
            call: the call of `generate`.
            prompt_lengths: (B,) tokens of each prompt.

        Raises:
            ValueError: if a prompt fills the model's positions, or the call asks for more than they hold.
        """
        config, positions, longest = call.config, self.config.max_position_embeddings, int(prompt_lengths.max())
        left = positions - longest
        if left <= 0:
            raise ValueError(f"The prompt has {longest} tokens and the model has {positions} positions: shorten it.")
        if "max_new_tokens" in call.asked and config.max_new_tokens > left:
            found = f"a prompt of {longest} tokens leaves {left} of the model's {positions} positions"
            raise ValueError(f"max_new_tokens is {config.max_new_tokens}, but {found}: set at most {left}.")
        if config.max_length is not None and config.max_length <= longest:
            raise ValueError(f"max_length is {config.max_length} and the prompt has {longest} tokens: raise it.")
        max_length = min(positions, config.max_length or positions)
        return (max_length - prompt_lengths).clamp(max=config.max_new_tokens or max_length)


class NonAutoregressiveGenerationMixin(GenerationOptionsMixin):
    """Adds `generate` to a model.

    A family says how a state is opened (`open_generation`) and what a step does (`generation_step`). A state has
    `prompt` (B, P); `written()`, what stands after the prompts (B, W); `whole()`, the rows; `finish(rows, ended)`; and
    `output(return_history)`.
    """

    generation_inputs: ClassVar[tuple[str, ...]] = ()  # further tensors that `generate` takes by name

    def open_generation(self, call: GenerationCall, input_ids: torch.Tensor, attention_mask: Any, **inputs) -> Any:
        """Check the prompts and open the state of a call; `inputs` are those of `generation_inputs` that were given."""
        raise NotImplementedError

    def generation_step(self, call: GenerationCall, state: Any, step: int) -> bool:
        """Make the step of this number on the rows that are not finished; False if there is none."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        seed: int | Sequence[int] | torch.Tensor | None = None,
        inputs: Any = None,
        num_samples: int | None = None,
        **overrides: Any,
    ) -> NonAutoregressiveGenerationOutput | torch.Tensor | None:
        """Write after each prompt, or fill the mask tokens in it; a row decodes alike alone and in any batch.

        Args:
            input_ids: (B, P) prompts, padded on either side, in the layout of the family's collators or bare, which is
                completed. Lists of ids may be of any lengths. None writes one sequence from an empty prompt. Where the
                family fills in, a prompt that holds mask tokens is filled in and nothing is written after it.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            generation_config: options of the family, or a `GenerationConfig` of transformers; by default the model's.
            streamer: a `TextDiffusionStreamer` or its like. It gets the prompts by `put`, what stands after them when
                a step is done by `put_draft` (where prompts are filled in, the whole rows), and the result by `put`.
                With `takes_edits = True` it gets a draft before the first step, and with every later one the edits of
                the step, as `put_draft(ids, edits=...)`. Without `put_draft` it gets prompts and result.
            logits_processor: called with (S, L) ids, (S, V) logits and `cur_step`, a row for each position looked at.
            stopping_criteria: called after every step with (B, L) ids and None for scores. The rows (B,) for which one
                is True end as they stand, with "stop".
            seed: one integer, or one for each row (see `row_seeds`).
            inputs: another name of `input_ids`.
            num_samples: texts to write from nothing, in place of prompts.
            **overrides: single options by name, and further inputs of the family.

        Returns:
            `NonAutoregressiveGenerationOutput`, or its sequences alone with `return_dict_in_generate=False`.

        Raises:
            ValueError: for an unknown option, or an option, an id or a prompt that does not fit.
        """
        given = {name: x for name in self.generation_inputs if (x := overrides.pop(name, None)) is not None}
        config, asked = self.resolve_generation_config(generation_config, overrides)
        prompts, mask = self.prompt_tensors(input_ids, attention_mask, inputs, num_samples)
        seeds = row_seeds(seed, len(prompts), prompts.device, copies := config.num_return_sequences)
        prompts = prompts.repeat_interleave(copies, dim=0)
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
        numbers = {n: integers(f"{n} must be integers", x, (1, 2), "mask" in n) for n, x in given.items()}
        further = {name: x.to(self.device).repeat_interleave(copies, dim=0) for name, x in numbers.items()}
        takes_edits = getattr(streamer, "takes_edits", False)
        is_watched = any(watcher is not None for watcher in (streamer, logits_processor, stopping_criteria))
        log = EditLog() if config.return_history or takes_edits else None
        processors, criteria = followers(streamer, logits_processor, stopping_criteria)
        processor = LogitsProcessorList(processors) if isinstance(logits_processor, (list, tuple)) else logits_processor
        call = GenerationCall(config, seeds, processor, is_watched, log, asked)
        state = self.open_generation(call, prompts, mask, **further)
        self._run(call, state, streamer, takes_edits, StoppingCriteriaList(criteria))
        output = state.output(config.return_history)
        if config.return_history and log is not None:
            output.edits = log.events()
        return output if config.return_dict_in_generate else output.sequences

    def _run(self, call: GenerationCall, state: Any, streamer: Any, takes_edits: bool, criteria: Any) -> None:
        """Step until no row is open, and tell the streamer."""
        keep_freed_memory()
        step, rows = 0, torch.arange(len(call.seeds), device=call.seeds.device)
        if streamer is not None:
            streamer.put(state.prompt.cpu())
            if takes_edits:
                streamer.put_draft(state.written().cpu())
        while self.generation_step(call, state, step):
            step += 1
            if hasattr(streamer, "put_draft"):
                edits = {"edits": call.log.latest().cpu()} if takes_edits and call.log is not None else {}
                streamer.put_draft(state.written().cpu(), **edits)
            if criteria:
                state.finish(rows, criteria(state.whole(), None))
        if streamer is not None:
            streamer.put(state.written().cpu())
            streamer.end()
