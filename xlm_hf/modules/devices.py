"""What the host waits for, and the shapes of a step of generation, which it reads from the device."""

import torch

# Types of device that are the host itself.
_HOST = ("cpu",)


def is_synchronous(device: torch.device) -> bool:
    """Whether the host has the results of `device` at once, since it computes them itself.

    Any other device works through a queue. To read a result the host waits until all queued work is done. The device
    then idles until the host queues something new. Nor can a graph be captured across such a read.
    """
    return device.type in _HOST


def keep_freed_memory() -> None:
    """Let a process keep the memory of the tensors that a CPU frees, up to 62 MiB, for the next ones.

    The C library of Linux gives what is free at the end of its heap back to the system beyond 128 KiB. The system hands
    it out again page by page, cleared, which took a sixth of the time of a forward pass of 16 x 128 tokens. The bound
    becomes twice the size of the largest block of its own that was freed, of up to 32 MiB. So one is allocated, and
    never touched.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def rounded_up(size: int, most: int, device: torch.device) -> int:
    """`size` where reads are free, as on a CPU; on an accelerator the next power of two, or `most` if that is less.

    So few shapes, and few graphs, compiled or captured, serve all steps of all decodes. The price is some work whose
    results are not used.
    """
    return size if is_synchronous(device) or not size else min(1 << (size - 1).bit_length(), most)


def true_indices(mask: torch.Tensor, num: int) -> torch.Tensor:
    """The first `num` of: flat indices of the True entries of `mask` in reading order, then those of the others."""
    return mask.flatten().logical_not().int().argsort(stable=True)[:num]


def shape_of_call(
    called: torch.Tensor, wanted: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, int, list[int]]:
    """The rows that take part in a forward pass and the positions that are looked at, by one reading of the device.

    Args:
        called: (B,) bool, the rows.
        wanted: (B, L) bool, the positions, in these rows alone.
        others: integers to be read with them.

    Returns:
        indices (R,) of the rows; the number of positions; the other integers. Both numbers are `rounded_up`: behind the
        rows that are called come some of the others.
    """
    num_rows, num_wanted, *read = torch.stack((called.sum(), wanted.sum(), *others)).tolist()
    num_rows = rounded_up(num_rows, len(called), called.device)
    return true_indices(called, num_rows), rounded_up(num_wanted, num_rows * wanted.shape[1], called.device), read
