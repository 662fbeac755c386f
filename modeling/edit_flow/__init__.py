"""The edit flow language model (Edit Flows, arXiv 2506.09018)."""

from xlm_hf import register_family

from .collator_edit_flow import EditFlowCollator
from .configuration_edit_flow import EditFlowConfig
from .generation_edit_flow import EditFlowGenerationConfig
from .loss_edit_flow import EditFlowLoss
from .modeling_edit_flow import EditFlowForEditLM

register_family(EditFlowConfig, EditFlowForEditLM)

__all__ = ["EditFlowCollator", "EditFlowConfig", "EditFlowForEditLM", "EditFlowGenerationConfig", "EditFlowLoss"]
