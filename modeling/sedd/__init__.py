"""Score entropy discrete diffusion (SEDD, arXiv 2310.16834): ratios of probabilities, by masks or uniform noise."""

from xlm_hf import register_family

from .collator_sedd import SEDDCollator
from .configuration_sedd import SEDDConfig
from .conversion_sedd import from_paper
from .generation_sedd import SEDDGenerationConfig
from .loss_sedd import SEDDLoss
from .modeling_sedd import SEDDForScoreEntropy

register_family(SEDDConfig, SEDDForScoreEntropy, converters={"sedd": from_paper})

__all__ = ["SEDDCollator", "SEDDConfig", "SEDDForScoreEntropy", "SEDDGenerationConfig", "SEDDLoss"]
