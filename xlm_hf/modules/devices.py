"""What the host waits for."""

import torch

# Types of device that are the host itself.
_HOST = ("cpu",)


def is_synchronous(device: torch.device) -> bool:
    """Whether the host has the results of `device` at once, since it computes them itself.

    Any other device works off a queue. To read a result the host waits until all that was queued before is done, and
    until it has queued anything new the device idles; nor can a graph be captured of what is read in between.
    """
    return device.type in _HOST
