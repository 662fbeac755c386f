"""Muon for the weight matrices of the layers, AdamW for everything else, as one optimiser."""

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers that step, save and load as one: AdamW and Muon.

    Muon (Jordan et al., 2024; `torch.optim.Muon`) moves a weight matrix along the orthogonalised momentum of its
    gradient. So all directions of the matrix learn at one speed. It is made for matrices between hidden states.
    Embeddings, heads, norms, biases and convolutions keep AdamW.

    Args:
        parts: the two, each with the parameters that it trains.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

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
