"""The flexible masked diffusion language model (FlexMDM, arXiv 2509.01025)."""

from xlm_hf import register_family

from .collator_flexmdm import FlexMDMCollator
from .configuration_flexmdm import FlexMDMConfig
from .conversion_flexmdm import from_authors, from_xlm_core
from .generation_flexmdm import FlexMDMGenerationConfig
from .loss_flexmdm import FlexMDMLoss
from .modeling_flexmdm import FlexMDMForFlexibleMaskedDiffusion, FlexMDMOutput

register_family(
    FlexMDMConfig, FlexMDMForFlexibleMaskedDiffusion, converters={"xlm-core": from_xlm_core, "flexmdm": from_authors}
)

__all__ = [
    "FlexMDMCollator",
    "FlexMDMConfig",
    "FlexMDMForFlexibleMaskedDiffusion",
    "FlexMDMGenerationConfig",
    "FlexMDMLoss",
    "FlexMDMOutput",
]
