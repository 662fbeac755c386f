"""Configuration of the masked language model (MLM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig


@strict
class MLMConfig(RotaryTransformerConfig):
    """Architecture of a masked language model: the shared backbone and a vocabulary head.

    A sequence reads `prompt [BOS] tokens [EOS]`, and padding after it where the length is modelled as padding content.

    Attributes:
        pad_token_id: fills ragged rows, where it is never seen, and the end of a canvas, where it is content.
        mask_token_id: stands for a token that is to be predicted.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: ends the sequence.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. The padding
            and the end of sequence, by which the model says how long a sequence is, are exempt, and the mask is added.
    """

    model_type = "mlm"

    pad_token_id: int | None = 0
    mask_token_id: int = 2
    eos_token_id: int | None = 3
    bos_token_id: int | None = 4
    suppress_tokens: list[int] | None = None

    @property
    def suppressed_ids(self) -> list[int]:
        """The ids that no sequence gets."""
        return sorted({*(self.suppress_tokens or ())} - {self.pad_token_id, self.eos_token_id} | {self.mask_token_id})
