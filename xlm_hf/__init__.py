"""xlm-hf: small non-autoregressive language models, first-class in the Hugging Face stack."""

from .hub import register_family

__all__ = ["register_family"]
