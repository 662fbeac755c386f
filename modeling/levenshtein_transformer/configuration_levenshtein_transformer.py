"""Configuration of the Levenshtein Transformer."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, PositiveInt


@strict
class LevenshteinTransformerConfig(RotaryTransformerConfig):
    """Architecture of a Levenshtein Transformer: one backbone and three heads, to delete, to insert and to fill.

    A sequence is `prompt [BOS] tokens`, with an empty prompt for plain text. The gap to the right of `[BOS]`, and of
    every token after it, can take placeholders. Each is a `[MASK]`, which a token then replaces.

    Attributes:
        pad_token_id: fills ragged rows; never seen.
        mask_token_id: the placeholder.
        bos_token_id: stands between the prompt and the sequence that is edited.
        max_placeholders: the most that one gap gets in one round; the paper has 255. It bounds a gap, not a text.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[MASK]` is
            added.
    """

    model_type = "levenshtein_transformer"

    mask_token_id: Count = 2
    max_placeholders: PositiveInt = 255
