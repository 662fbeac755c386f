"""Block diffusion (BD3-LM, arXiv 2503.09573): masked diffusion within blocks, left to right from block to block."""

from xlm_hf import register_family

from .collator_bd3lm import BD3LMCollator
from .configuration_bd3lm import BD3LMConfig
from .conversion_bd3lm import from_paper
from .generation_bd3lm import BD3LMGenerationConfig
from .loss_bd3lm import BD3LMLoss
from .modeling_bd3lm import BD3LMForBlockDiffusion

register_family(
    BD3LMConfig,
    BD3LMForBlockDiffusion,
    auto_classes=("AutoModel", "AutoModelForMaskedLM"),
    converters={"bd3lm": from_paper},
)

__all__ = ["BD3LMCollator", "BD3LMConfig", "BD3LMForBlockDiffusion", "BD3LMGenerationConfig", "BD3LMLoss"]
