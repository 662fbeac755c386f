"""Configuration of the left-to-right language model (ARLM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count


@strict
class ARLMConfig(RotaryTransformerConfig):
    """Architecture of a left-to-right language model: the shared backbone, causal, and a vocabulary head.

    A sequence reads `prompt [BOS] target [EOS]`, with an empty prompt for plain text.

    Attributes:
        pad_token_id: fills ragged rows; never seen.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: ends the sequence that is written; learnt as every other token.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[EOS]` is
            exempt.

    Raises:
        ValueError: with `shift_logits`, since such a model always tells what comes next.
    """

    model_type = "arlm"
    written_specials = ("eos",)

    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.shift_logits:
            raise ValueError("A left-to-right model always predicts the next token: unset shift_logits.")
