"""The insertion language model (ILM, arXiv 2505.05755)."""

from xlm_hf import register_family

from .collator_ilm import ILMCollator
from .configuration_ilm import ILMConfig
from .conversion_ilm import from_xlm_core
from .generation_ilm import ILMGenerationConfig
from .loss_ilm import ILMLoss
from .modeling_ilm import ILMForInsertionLM, ILMOutput

register_family(ILMConfig, ILMForInsertionLM, converters={"xlm-core": from_xlm_core})

__all__ = ["ILMCollator", "ILMConfig", "ILMForInsertionLM", "ILMGenerationConfig", "ILMLoss", "ILMOutput"]
