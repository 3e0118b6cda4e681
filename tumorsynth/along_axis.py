"""Multiply a volume by a matrix along one of its axes: filters and resampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def multiply_along(matrix: Tensor, volume: Tensor, axis: int) -> Tensor:
    """Multiply by a matrix along one axis: one matrix product, and no copy of a whole volume.

    Args:
        matrix: (M, N).
        volume: of any shape, with N voxels along the axis.
        axis: from 0 on.

    Returns:
        A new tensor with M voxels along the axis.
    """
    rows, count = matrix.shape
    shape = (*volume.shape[:axis], rows, *volume.shape[axis + 1 :])
    if axis == volume.ndim - 1:
        return torch.mm(volume.reshape(-1, count), matrix.T).view(shape)
    parts = volume.reshape(math.prod(volume.shape[:axis]), count, -1)
    if len(parts) == 1:
        return torch.mm(matrix, parts[0]).view(shape)
    return torch.bmm(matrix.expand(len(parts), rows, count), parts).view(shape)
