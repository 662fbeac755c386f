"""A loss that is not finite: noticed on the device, and kept with what reproduces it."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


class NotFiniteError(ValueError):
    """A loss or gradient was infinite or not a number."""


@dataclass
class Step:
    """What an optimiser step was trained on, a micro-batch at a time.

    Attributes:
        number: of the step, from 1.
        batches: micro-batches, on the device.
        losses: of each of them.
        random_states: states of torch's generators before each micro-batch, by device.
    """

    number: int
    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    random_states: list[dict[str, torch.Tensor]] = field(default_factory=list)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's global generators, of the CPU and of `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Undo whatever was drawn since `random_states` returned `states`."""
    torch.set_rng_state(states["cpu"])
    for device, state in states.items():
        if device != "cpu":
            torch.get_device_module(torch.device(device)).set_rng_state(state)


class FiniteGuard:
    """Keeps the last two optimiser steps and whether all losses and gradients so far were finite.

    The answer stays on the device. The fused optimiser gets it as its `found_inf`. So a step that is not finite, and
    every later one, leaves the weights as they were. The host may learn of it a step later.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: deque[Step] = deque(maxlen=2)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)

    def start_step(self, number: int) -> None:
        """Forget the step before the last."""
        self.steps.append(Step(number))

    def start_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Keep a micro-batch."""
        self.steps[-1].batches.append(batch)
        self.steps[-1].random_states.append(random_states(self.device))

    def end_batch(self, loss: torch.Tensor) -> None:
        """Keep its loss."""
        self.steps[-1].losses.append(loss.detach())
        self.failed |= ~torch.isfinite(self.steps[-1].losses[-1])

    def check_gradient(self, norm: torch.Tensor | float) -> None:
        """Look at the norm of the gradient of the step."""
        self.failed |= ~torch.isfinite(torch.as_tensor(norm, device=self.device))

    def protect(self, optimizer: Any) -> bool:
        """Let a fused optimiser leave the weights alone once something was not finite; whether it can."""
        fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        if fused:
            optimizer.found_inf = self.failed.float()
        return fused

    def save_batches(self, step: Step, folder: Path, rank: int) -> list[int]:
        """Write the micro-batches that are to blame, `batch-<rank>-<number>.safetensors`; returns their example ids.

        Beside the tensors of the batch a file has `random_state_<device>`, the generator's state before it.
        """
        bad = [number for number, loss in enumerate(step.losses) if not loss.isfinite()]
        examples: list[int] = []
        for number in bad or range(len(step.batches)):
            batch, states = step.batches[number], step.random_states[number]
            tensors = {**batch, **{f"random_state_{device}": state for device, state in states.items()}}
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_host, folder / f"batch-{rank}-{number}.safetensors")
            examples += batch["example_id"].flatten().tolist() if "example_id" in batch else []
        return examples
