"""Where a host would wait for its accelerator, found on a CPU: what it must read to go on, and what it must send."""

from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xlm_hf.modules import devices

aten = torch.ops.aten
# The size or the branch taken of what these return depends on the values of their inputs.
_READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim),
}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._waits(func, args, kwargs or {}):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _waits(func, args, kwargs) -> bool:
        packet = func.overloadpacket
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            # A single value is filled in where the mask says.
            return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)
        return packet in _READS


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # On a CPU every device is one; where the code says so itself it means the host.
        to_host = func is torch.Tensor.to and args[1:2] == ("cpu",) and not (kwargs or {}).get("non_blocking")
        # A number or a list goes to a device by a copy that is waited for, behind all that the device has still to do.
        sent = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        to_device = sent and (kwargs or {}).get("device") is not None
        if to_host or to_device or func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class HostReads:
    """Within it, `found` lists every operation for which the host would wait; inside a custom operator it is blind."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Operations(self.found), _Methods(self.found))

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


def as_on_an_accelerator() -> AbstractContextManager[object]:
    """Within it the CPU is taken for a device whose results the host must wait for."""
    return mock.patch.object(devices, "_HOST", ())
