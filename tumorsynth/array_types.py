"""Numpy arrays as tensors, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_tensor(x: Any) -> Any:
    """Return a numpy array as a tensor of the same values; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    native = x.astype(x.dtype.newbyteorder("="), copy=False)
    # torch refuses read-only memory and negative strides, which numpy keeps on axes of one voxel
    if min(native.strides, default=0) < 0:
        native = native.copy()
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def to_type_of(old: Any, new: torch.Tensor) -> Any:
    """Return a tensor as a numpy array if the old value was one."""
    return new.numpy().astype(old.dtype, copy=False) if isinstance(old, np.ndarray) else new
