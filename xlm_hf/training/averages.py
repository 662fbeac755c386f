"""The exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

EMA_FILE = "ema.safetensors"


class ExponentialMovingAverage:
    """A float32 average of the parameters: s <- d s + (1 - d) w after each optimiser step, from s = the first weights.

    d = min(decay, (1 + n) / (10 + n)) after n steps, so that the average follows the weights while it is young (the
    warm-up of TensorFlow's `ExponentialMovingAverage`). Buffers are not averaged. Sharded parameters are averaged shard
    by shard.

    Args:
        model: its parameters that require a gradient are averaged.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Average over the weights after `num_steps` (>= 1) optimiser steps."""
        decay = min(self.decay, (1 + num_steps) / (10 + num_steps))
        weights = [parameter.float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        with torch.no_grad():
            raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self._write(self.shadow)
        try:
            yield
        finally:
            self._write(raw)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.parameters.values()), list(values.values()))

    def save(self, folder: Path, is_writer: bool) -> None:
        """Write `ema.safetensors` into a folder; every rank must call this, and one of them writes."""
        whole = {name: s.full_tensor() if isinstance(s, DTensor) else s for name, s in self.shadow.items()}
        if is_writer:
            save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Read `ema.safetensors` of a folder.

        Raises:
            ValueError: if it averages other parameters than the model has.
        """
        saved = load_file(folder / EMA_FILE)
        _check_names(folder, saved.keys() ^ self.shadow.keys())
        for name, shadow in self.shadow.items():
            value = saved[name].to(shadow.device)
            if isinstance(shadow, DTensor):
                value = distribute_tensor(value, shadow.device_mesh, shadow.placements)
            shadow.copy_(value)


def load_average(model: nn.Module, folder: Path) -> bool:
    """Give a model the averaged weights of a checkpoint, if there are any; returns whether there were."""
    if not (folder / EMA_FILE).exists():
        return False
    _check_names(folder, set(model.load_state_dict(load_file(folder / EMA_FILE), strict=False).unexpected_keys))
    return True


def _check_names(folder: Path, strange: set[str]) -> None:
    if strange:
        raise ValueError(f"{folder / EMA_FILE} is the average of another model: they differ in {min(strange)!r}.")
