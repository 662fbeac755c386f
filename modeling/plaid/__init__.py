"""Gaussian diffusion of embeddings (Plaid, arXiv 2305.18619): noise on vectors of tokens, a bound in parts."""

from xlm_hf import register_family

from .collator_plaid import PlaidCollator
from .configuration_plaid import PlaidConfig
from .generation_plaid import PlaidGenerationConfig
from .loss_plaid import PlaidLoss
from .modeling_plaid import PlaidForGaussianDiffusion

register_family(PlaidConfig, PlaidForGaussianDiffusion)

__all__ = ["PlaidCollator", "PlaidConfig", "PlaidForGaussianDiffusion", "PlaidGenerationConfig", "PlaidLoss"]
