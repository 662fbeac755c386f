"""The left-to-right language model (ARLM): the autoregressive baseline on the shared backbone."""

from xlm_hf import register_family

from .collator_arlm import ARLMCollator
from .configuration_arlm import ARLMConfig
from .conversion_arlm import from_xlm_core
from .generation_arlm import ARLMGenerationConfig, ARLMGenerationOutput
from .loss_arlm import ARLMLoss
from .modeling_arlm import ARLMForCausalLM

register_family(
    ARLMConfig,
    ARLMForCausalLM,
    auto_classes=("AutoModel", "AutoModelForCausalLM"),
    converters={"xlm-core": from_xlm_core},
)

__all__ = ["ARLMCollator", "ARLMConfig", "ARLMForCausalLM", "ARLMGenerationConfig", "ARLMGenerationOutput", "ARLMLoss"]
