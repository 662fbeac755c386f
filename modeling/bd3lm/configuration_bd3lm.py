"""Configuration of the block diffusion language model (BD3-LM)."""

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, PositiveInt


@strict
class BD3LMConfig(RotaryTransformerConfig):
    """Architecture of a block diffusion language model: a backbone that sees by blocks, and a vocabulary head.

    A sequence reads `prompt [BOS] canvas`. Prompt and `[BOS]` are block 0, the canvas is cut into blocks of
    `block_length` positions: the text, `[EOS]`, and `[PAD]` up to the end of the block that holds `[EOS]`.

    Attributes:
        block_length: positions of a block; 1 is left-to-right, and a block as long as the canvas is masked diffusion.
        conditioning: "none" by default, since the masks say the time. With "adaln", as in published checkpoints, or
            "token" the backbone is told sigma = 0 at all times.
        pad_token_id: fills the last block after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: stands for what is to be written.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[EOS]` and
            `[PAD]` are exempt, since a canvas holds them, and `[MASK]` is added.
    """

    model_type = "bd3lm"
    written_specials = ("pad", "eos")

    block_length: PositiveInt = 4
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        kinds = (self.backbone_config or {}).get("layer_types") or ()
        if self.shift_logits or "sliding_attention" in kinds or (self.backbone_config or {}).get("use_sliding_window"):
            raise ValueError(
                "A row of block diffusion holds two copies of a text, so neither the column before a token nor a "
                "window of columns is what it is when a block is sampled: unset shift_logits, and choose a backbone "
                "without sliding windows."
            )
