"""Configuration of the insertion language model (ILM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count


@strict
class ILMConfig(RotaryTransformerConfig):
    """Architecture of an insertion language model: the shared backbone, a vocabulary head and a stopping head.

    A sequence is `[CLS] prompt [BOS] tokens`. The gap to the right of `[BOS]` is a slot into which a token can be
    inserted. So is the gap to the right of every later token.

    Attributes:
        pad_token_id: fills ragged rows; never seen.
        cls_token_id: first token of a sequence; the stopping head reads its hidden state.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: end of a text for the tokenizer; an insertion model ends by its stopping head instead.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation.
        num_missing_classes: classes of the stopping head. Class n says that n tokens are missing, the last class that
            this many or more are. 2 is the paper's (complete, something is missing). 0 means no stopping head;
            sequences then end only at their capacity.
    """

    model_type = "ilm"

    cls_token_id: Count = 1
    eos_token_id: Count | None = None
    num_missing_classes: Count = 2
