"""A pretended GPU: tensors on the CPU that count as a device's, and what would wait for it.

A tensor is the device's if any tensor that it was made of is; so weights and noise made on the CPU
become so as soon as they meet an image. `Tensor.cpu` brings a copy back, which is one wait.
(`another_device.py` refuses to mix devices instead; here tensors that meet are followed.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from callers import caller
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# operators whose answer, or its size, the program needs to go on
ASKING = (  # modules of ours that do otherwise on the CPU
    "appearance.contrast",
    "appearance.surroundings",
    "fetching",
    "intensity_check.shares",
    "pipeline.organ_search",
    "pipeline.paint",
    "placement.organ",
)
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")


class PretendedDevice(TorchDispatchMode):
    """Counts, by the function of ours that caused it, each wait for a tensor of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        # storages that are the device's, held weakly, so that memory is used again as ever
        self._memory: dict[int, StorageWeakRef] = {}

    def put(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._memory[storage._cdata] = StorageWeakRef(storage)

    def holds(self, tensor: Tensor) -> bool:
        known = self._memory.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def count(self) -> int:
        return sum(self.waits.values())

    def _note(self) -> None:
        self.waits[caller() or "test"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        there = any(self.holds(t) for t in given)
        name = str(func)
        if there and any(ask in name for ask in ASKS):
            self._note()
        if name.startswith(("aten.index.", "aten.index_put")):  # by a mask: its size is waited for
            masks = [i for i in args[1] if i is not None and i.dtype is torch.bool]
            if any(self.holds(i) for i in masks):
                self._note()
        out = func(*args, **(kwargs or {}))
        if there:
            self.put(*(t for t in tree_flatten(out)[0] if isinstance(t, Tensor)))
        return out


@contextmanager
def pretended(monkeypatch: Any, *tensors: Tensor) -> Iterator[PretendedDevice]:
    """Within, the tensors are a device's."""
    device, cpu, tolist = PretendedDevice(), Tensor.cpu, Tensor.tolist

    def to_cpu(self: Tensor) -> Tensor:
        if not device.holds(self):
            return cpu(self)
        device._note()
        with torch._C._DisableTorchDispatch():
            return self.detach().clone()

    def to_list(self: Tensor) -> Any:
        return tolist(to_cpu(self))

    with monkeypatch.context() as patch:
        for module in ASKING:
            patch.setattr(f"tumorsynth.{module}.on_cpu", lambda tensor: not device.holds(tensor))
        patch.setattr(Tensor, "cpu", to_cpu)
        patch.setattr(Tensor, "tolist", to_list)
        device.put(*tensors)
        with device:
            yield device
