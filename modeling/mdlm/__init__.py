"""The masked diffusion language model (MDLM, arXiv 2406.07524)."""

from xlm_hf import register_family

from .collator_mdlm import MDLMCollator
from .configuration_mdlm import MDLMConfig
from .conversion_mdlm import from_dream, from_llada, from_paper, from_xlm_core
from .generation_mdlm import MDLMGenerationConfig
from .loss_mdlm import MDLMLoss
from .modeling_mdlm import MDLMForMaskedDiffusion

register_family(
    MDLMConfig,
    MDLMForMaskedDiffusion,
    auto_classes=("AutoModel", "AutoModelForMaskedLM"),
    converters={"xlm-core": from_xlm_core, "mdlm": from_paper, "llada": from_llada, "dream": from_dream},
)

__all__ = ["MDLMCollator", "MDLMConfig", "MDLMForMaskedDiffusion", "MDLMGenerationConfig", "MDLMLoss"]
