"""Generalized interpolating discrete diffusion (GIDD, arXiv 2503.04482): masks and uniform noise, mixed."""

from xlm_hf import register_family

from .collator_gidd import GIDDCollator
from .configuration_gidd import GIDDConfig
from .conversion_gidd import from_paper
from .generation_gidd import GIDDGenerationConfig
from .loss_gidd import GIDDLoss
from .modeling_gidd import GIDDForInterpolatingDiffusion

register_family(GIDDConfig, GIDDForInterpolatingDiffusion, converters={"gidd": from_paper})

__all__ = ["GIDDCollator", "GIDDConfig", "GIDDForInterpolatingDiffusion", "GIDDGenerationConfig", "GIDDLoss"]
