"""Configuration of the masked language model (MLM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count


@strict
class MLMConfig(RotaryTransformerConfig):
    """Architecture of a masked language model: the shared backbone and a vocabulary head.

    A sequence reads `prompt [BOS] tokens [EOS]`, and padding after it where the length is modelled as padding content.
    With a length head it reads `prompt [BOS] tokens`.

    Attributes:
        pad_token_id: fills ragged rows, where it is never seen, and the end of a canvas, where it is content.
        mask_token_id: stands for a token that is to be predicted.
        bos_token_id: stands between the prompt and the sequence that is written.
        eos_token_id: ends the sequence.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. The padding
            and the end of sequence, by which the model says how long a sequence is, are exempt, and the mask is added.
        max_canvas_length: gives the model a length head at `[BOS]` (mask-predict, arXiv 1904.09324), over the lengths 0
            to this. Then no token of the prompt sees the canvas, whose masks would tell its length, and neither `[EOS]`
            nor `[PAD]` is written. None means no such head.

    Raises:
        ValueError: for a negative length, or a length head in a vocabulary where `[BOS]` is not an id of its own.
    """

    model_type = "mlm"

    mask_token_id: Count = 2
    eos_token_id: Count | None = 3
    max_canvas_length: Count | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.max_canvas_length is None:
            return
        if self.bos_token_id in (None, self.pad_token_id, self.eos_token_id, self.mask_token_id):
            raise ValueError(
                f"A length is read at [BOS], which needs an id of its own, and bos_token_id is {self.bos_token_id}: "
                "leave max_canvas_length null, or use a tokenizer with such a token."
            )
        if self.shift_logits:
            raise ValueError(
                "With shift_logits the first token is read at [BOS], which does not see the canvas of a model with "
                "max_canvas_length: unset one of the two."
            )
        ids = (self.pad_token_id, self.eos_token_id, self.bos_token_id)
        ends = [token_id for token_id in ids if token_id is not None]
        self.suppress_tokens = sorted({*(self.suppress_tokens or ()), *ends})

    @property
    def written_specials(self) -> tuple[str, ...]:  # type: ignore[override]
        """What a canvas holds beside text; one whose length is named has no end to be said."""
        return ("pad", "eos") if self.max_canvas_length is None else ()
