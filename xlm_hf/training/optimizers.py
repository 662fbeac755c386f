"""Muon for the weight matrices of the layers, AdamW for everything else, as one optimiser."""

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers that step, save and load as one.

    Muon (Jordan et al., 2024; `torch.optim.Muon`) moves a weight matrix along the orthogonalised momentum of its
    gradient. So all directions of the matrix learn at one speed. It is made for matrices between hidden states.
    Embeddings, heads, norms, biases and convolutions keep AdamW.

    Args:
        matrices: the 2-D weights that Muon trains.
        others: parameter groups for AdamW.
        muon_options: keyword arguments of `torch.optim.Muon`.
        adamw_options: keyword arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        muon_options: dict[str, Any],
        adamw_options: dict[str, Any],
    ):
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(others, **adamw_options),
            torch.optim.Muon(matrices, **muon_options),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Step both; `closure` is not supported and must be None."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading replaces the groups of a part; a schedule must reach the new ones.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear maps inside the repeated layers (`nn.ModuleList`s) of a model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    linears = [module for layers in lists for module in layers.modules() if isinstance(module, nn.Linear)]
    weights = dict.fromkeys(linear.weight for linear in linears)
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]
