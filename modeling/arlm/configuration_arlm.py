"""Configuration of the left-to-right language model (ARLM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.rotary_transformer import RotaryTransformerConfig


@strict
class ARLMConfig(RotaryTransformerConfig):
    """Architecture of a left-to-right language model: the shared backbone, causal, and a vocabulary head.

    A sequence reads `prompt [BOS] target [EOS]`, with an empty prompt for plain text.

    Attributes:
        pad_token_id: fills ragged rows; never seen.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: ends the sequence that is written; learnt as every other token.
        suppress_tokens: ids that are never written; their logits are -inf in training and in generation. The
            end-of-sequence token is taken off the list.
    """

    model_type = "arlm"

    pad_token_id: int | None = 0
    bos_token_id: int | None = 4
    eos_token_id: int | None = 3
    suppress_tokens: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is not None:
            raise ValueError("A left-to-right model has the rotary backbone alone: leave backbone_config out.")
        if self.suppress_tokens:
            self.suppress_tokens = [token for token in self.suppress_tokens if token != self.eos_token_id]
        super().__post_init__(**kwargs)
