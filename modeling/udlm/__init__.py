"""Uniform-state diffusion (UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892): noise that replaces tokens by any others."""

from xlm_hf import register_family

from .collator_udlm import UDLMCollator
from .configuration_udlm import UDLMConfig
from .conversion_udlm import from_paper
from .generation_udlm import UDLMGenerationConfig
from .loss_udlm import UDLMLoss
from .modeling_udlm import UDLMForUniformDiffusion

register_family(UDLMConfig, UDLMForUniformDiffusion, converters={"duo": from_paper, "udlm": from_paper})

__all__ = ["UDLMCollator", "UDLMConfig", "UDLMForUniformDiffusion", "UDLMGenerationConfig", "UDLMLoss"]
