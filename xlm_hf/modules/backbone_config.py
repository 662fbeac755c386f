"""The configuration of the backbone, which every family's extends."""

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig, strict

from .checked_options import (
    CheckedOptions,
    Count,
    Interval,
    NotNegative,
    PartialShare,
    Positive,
    PositiveInt,
    annotations_of,
)


class CheckedConfig(CheckedOptions, PreTrainedConfig):
    """A configuration whose options are checked by their annotations whenever they are set."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for option in fields(cls):
            if option.name in annotations_of(cls):
                # Of annotations with a range `strict` knows nothing.
                option.type = Any

    def __setattr__(self, name: str, value: Any) -> None:
        self.check(**{name: value})
        super().__setattr__(name, value)


def token_options(tokenizer: Any) -> dict[str, Any]:
    """What a configuration takes from the tokenizer: the size of the vocabulary and the ids of special tokens."""
    roles = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "mask")]
    ids = {role: getattr(tokenizer, role) for role in roles if getattr(tokenizer, role) is not None}
    # Byte-level tokenizers name their end of a text for what is unknown too, which for them is nothing.
    emitted = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), **ids, "suppress_tokens": sorted({*tokenizer.all_special_ids} - emitted)}


@strict
class RotaryTransformerConfig(CheckedConfig):
    """Architecture of the backbone, inherited by the configuration of every family.

    Attributes:
        vocab_size: number of token embeddings.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer; must divide `hidden_size`.
        intermediate_size: width inside the feed-forward block; None means 4 x `hidden_size`.
        hidden_act: activation of the feed-forward block, a name from `transformers.activations.ACT2FN`.
        max_position_embeddings: longest sequence that the model accepts, in tokens.
        rope_theta: base of the rotary frequencies.
        partial_rotary_factor: share of each head's dimensions that are rotated; 0 needs `learned_positions`.
        learned_positions: whether a learnt embedding of the absolute position is added to the token's, beside the
            rotation of queries and keys.
        conv_kernel_size: taps of the short convolution at the start of every layer (see `ShortConvolution`); 0 means
            none. A bidirectional model takes an odd number.
        attention_dropout: dropout probability of the attention weights.
        hidden_dropout_prob: dropout probability after the attention and feed-forward blocks.
        layer_norm_eps: added to the variance in every layer norm.
        final_layer_norm: whether a layer norm stands between the last layer and the heads.
        initialization: "normal" draws linear maps and embeddings from N(0, initializer_range^2). "fan_in" draws linear
            maps from N(0, 1 / inputs), so the scale of their outputs does not depend on the width. It draws embeddings
            from N(0, 1). It divides the maps that write into the residual stream by sqrt(2 x num_hidden_layers), so
            the scale does not grow with the depth (Radford et al., "GPT-2", 2019, section 2.3).
        initializer_range: standard deviation of the "normal" initialisation.
        tie_word_embeddings: whether the vocabulary head shares the embedding matrix.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation.
        softmax_over_suppressed: whether those logits stay finite in the softmax, as in published checkpoints. Their
            generation config then holds `suppressed_ids`, so that `generate` leaves them out all the same.
        lm_head_bias: whether the vocabulary head has a bias, as in some published models.
        backbone: "rotary", the transformer described here; "transformers", the one that `backbone_config` describes.
            On the command line, `model.backbone` may be the folder or Hub id of the latter.
        backbone_config: configuration of a language model of transformers, as a dictionary with its `model_type`. It
            sets the sizes above; the other options of the layers have no effect.
        shift_logits: whether the state of such a backbone at a token predicts the next position, as in a left-to-right
            model, instead of the token's own position.
        lora: options of `peft.LoraConfig`, with which such a backbone is adapted; None trains all of it.
        written_specials: names of the special tokens that a sequence may hold, whatever `suppress_tokens` says.
        pad_token_id: fills ragged rows; its embedding stays zero unless padding is content.
        bos_token_id: the token between a prompt and what is written, of which each document has one.
        conditioning: how the backbone is told a time. "none": not at all. "adaln": by adaptive layer norms, which
            shift, scale and gate every block (`final_layer_norm` then has no effect). "token": by a feature added to
            the embedding of each document's `[BOS]`, which also works with a backbone of transformers.
        conditioning_size: width of the embedding of the time.
        timestep_frequencies: number of frequencies in that embedding.
        legacy_modulated_residual: whether, with "adaln", the attention block is added to its normalised and modulated
            input instead of to the residual stream. Checkpoints of xlm-core need it; the papers' diffusion transformer
            does not.

    Raises:
        ValueError: for an unknown backbone; for a special id outside the vocabulary; if `num_attention_heads` does not
            divide `hidden_size`; if the rotated part of a head is odd; if nothing encodes the positions; or if the
            conditioning does not fit the backbone.
    """

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: PositiveInt = 1024
    rope_theta: Positive = 10000.0
    partial_rotary_factor: Annotated[float, Interval("[0, 1]")] = 1.0
    learned_positions: bool = False
    conv_kernel_size: Count = 0
    attention_dropout: PartialShare = 0.0
    hidden_dropout_prob: PartialShare = 0.0
    layer_norm_eps: Positive = 1e-5
    final_layer_norm: bool = True
    initialization: Literal["normal", "fan_in"] = "normal"
    initializer_range: NotNegative = 0.02
    tie_word_embeddings: bool = False
    suppress_tokens: Annotated[list[int], Interval("[0, inf)")] | None = None
    softmax_over_suppressed: bool = False
    lm_head_bias: bool = False
    backbone: str = "rotary"
    backbone_config: dict[str, Any] | None = None
    shift_logits: bool = False
    lora: dict[str, Any] | None = None
    pad_token_id: Count = 0
    bos_token_id: Count | None = 4
    conditioning: Literal["none", "adaln", "token"] = "none"
    conditioning_size: PositiveInt = 128
    timestep_frequencies: PositiveInt = 128
    legacy_modulated_residual: bool = False

    own_backbones: ClassVar[tuple[str, ...]] = ("rotary", "dit")
    written_specials: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **options: Any) -> Any:
        """A configuration with the vocabulary and the special ids of a tokenizer.

        Args:
            tokenizer: of the texts that the model is for.
            **options: the rest, by name; what is given here goes before the tokenizer's.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in token_options(tokenizer).items() if name in names} | options)

    def __post_init__(self, **kwargs):
        # What older configurations say in other words.
        self.softmax_over_suppressed |= kwargs.pop("unrestricted_softmax", False)
        if self.backbone == "dit":
            # An old name; a conditioning that is given stays.
            self.backbone = "rotary"
            self.conditioning = "adaln" if self.conditioning == "none" else self.conditioning
        if self.conditioning == "token" and self.bos_token_id is None:
            raise ValueError("conditioning='token' adds the time to [BOS] and bos_token_id is None: set it.")
        # A mask beyond the vocabulary is none, as in published models of uniform noise.
        for name in annotations_of(type(self)).keys() - {"mask_token_id"}:
            if name.endswith("_token_id") and (token_id := getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(
                    f"{name} is {token_id} and vocab_size {self.vocab_size}: take both from one tokenizer."
                )
        if self.backbone_config is None:
            self._check_sizes()
        elif not isinstance(self.backbone_config.get("model_type"), str):
            raise ValueError("backbone_config needs a model_type, such as 'llama': add it.")
        else:
            self._take_sizes(AutoConfig.for_model(**self.backbone_config))
        super().__post_init__(**kwargs)

    def _take_sizes(self, inner: PreTrainedConfig) -> None:
        if self.conditioning == "adaln":
            raise ValueError("conditioning='adaln' needs the rotary backbone: choose 'token' with backbone_config.")
        self.backbone = "transformers"
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            setattr(self, name, getattr(inner, name, getattr(self, name)))

    def _check_sizes(self) -> None:
        if self.backbone != "rotary":
            found = f"backbone must be one of {', '.join(self.own_backbones)} and is {self.backbone!r}"
            raise ValueError(f"{found}; other transformers are given by backbone_config.")
        if self.shift_logits or self.lora:
            raise ValueError("shift_logits and lora are for a backbone of transformers: unset them or give one.")
        if self.hidden_size % self.num_attention_heads:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of {heads}: change one of them.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}.")
        if self.rotary_dim % 2 or (self.rotary_dim == 0 and not self.learned_positions):
            found = f"The rotated part of a head has {self.rotary_dim} dimensions"
            raise ValueError(
                f"{found}, and rotation works on pairs: choose an even number, or learned_positions and 0."
            )
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    @property
    def suppressed_ids(self) -> list[int]:
        """The ids that no sequence gets: `suppress_tokens` and the mask, without `written_specials`."""
        listed = {*(self.suppress_tokens or ()), getattr(self, "mask_token_id", None)}
        listed -= {None, *(getattr(self, f"{name}_token_id") for name in self.written_specials)}
        return sorted(token_id for token_id in listed if token_id < self.vocab_size)

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of each head that are rotated."""
        return round(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)
