"""Configuration of the Insertion Transformer."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count


@strict
class InsertionTransformerConfig(RotaryTransformerConfig):
    """Architecture of an Insertion Transformer: the shared backbone and a vocabulary head that every slot reads.

    A sequence is `prompt [BOS] tokens`, with an empty prompt for plain text. The gap to the right of `[BOS]` is a slot,
    into which a token can be inserted. So is the gap to the right of every later token.

    Attributes:
        pad_token_id: fills ragged rows; never seen.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: says that a slot is finished; no sequence holds it. Without it, sequences end only at their
            capacity.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[EOS]` is
            exempt.
    """

    model_type = "insertion_transformer"
    written_specials = ("eos",)

    eos_token_id: Count | None = 3
