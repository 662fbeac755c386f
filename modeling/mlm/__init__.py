"""The masked language model (MLM) of the insertion-model papers: every share of the tokens is masked as often."""

from xlm_hf import register_family

from .collator_mlm import MLMCollator
from .configuration_mlm import MLMConfig
from .conversion_mlm import from_xlm_core
from .generation_mlm import MLMGenerationConfig
from .loss_mlm import MLMLoss
from .modeling_mlm import MLMForMaskedLM

register_family(
    MLMConfig,
    MLMForMaskedLM,
    auto_classes=("AutoModel", "AutoModelForMaskedLM"),
    converters={"xlm-core": from_xlm_core},
)

__all__ = ["MLMCollator", "MLMConfig", "MLMForMaskedLM", "MLMGenerationConfig", "MLMLoss"]
