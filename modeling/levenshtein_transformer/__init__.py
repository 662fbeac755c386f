"""The Levenshtein Transformer (arXiv 1905.11006)."""

from xlm_hf import register_family

from .collator_levenshtein_transformer import LevenshteinTransformerCollator
from .configuration_levenshtein_transformer import LevenshteinTransformerConfig
from .generation_levenshtein_transformer import LevenshteinTransformerGenerationConfig
from .loss_levenshtein_transformer import LevenshteinTransformerLoss
from .modeling_levenshtein_transformer import LevenshteinTransformerForEditLM

register_family(LevenshteinTransformerConfig, LevenshteinTransformerForEditLM)

__all__ = [
    "LevenshteinTransformerCollator",
    "LevenshteinTransformerConfig",
    "LevenshteinTransformerForEditLM",
    "LevenshteinTransformerGenerationConfig",
    "LevenshteinTransformerLoss",
]
