"""The Insertion Transformer (arXiv 1902.03249)."""

from xlm_hf import register_family

from .collator_insertion_transformer import InsertionTransformerCollator
from .configuration_insertion_transformer import InsertionTransformerConfig
from .generation_insertion_transformer import InsertionTransformerGenerationConfig
from .loss_insertion_transformer import InsertionTransformerLoss
from .modeling_insertion_transformer import InsertionTransformerForInsertionLM

register_family(InsertionTransformerConfig, InsertionTransformerForInsertionLM)

__all__ = [
    "InsertionTransformerCollator",
    "InsertionTransformerConfig",
    "InsertionTransformerForInsertionLM",
    "InsertionTransformerGenerationConfig",
    "InsertionTransformerLoss",
]
