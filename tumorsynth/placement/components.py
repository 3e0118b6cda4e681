"""Which voxels hang together, over faces, edges and corners."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tumorsynth.placement.shape import Bools, Floats

# along each axis, all but the last voxel and all but the first
_NEXT = [
    tuple((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
    for axis in range(3)
]


def lowest_connected(level: Floats, n: int) -> Bools | int:
    """The n voxels of lowest level that hang together, or how many if there are fewer.

    Every connected part of a sublevel set has a lowest voxel. So one local minimum means one
    part, which is the rule; the flood is for shapes that the organ's surface cuts apart.
    level: (X, Y, Z), infinite where no tumour may be.
    """
    found = 0
    for _ in range(3):
        finite = level[np.isfinite(level)]
        enough = len(finite) >= n
        grid = level
        if enough:
            grid = np.where(level <= np.partition(finite, n - 1)[n - 1], level, np.inf)
        mask = np.isfinite(grid)
        parts = int(np.count_nonzero(mask & (grid <= _around(grid, np.minimum))))
        if enough and parts == 1:
            return mask
        if parts == 0:
            return 0
        if parts == 1:  # all that there is, and too little
            return len(finite)
        part = flood(mask, int(grid.argmin()))
        found = int(part.sum())
        if found == n:
            return part
        if not enough:
            break
        level = np.where(mask & ~part, np.inf, level)
    return found


def flood(mask: Bools, seed: int) -> Bools:
    """The connected part of a mask (X, Y, Z) that holds the voxel of flat index seed."""
    part = np.zeros(mask.shape, dtype=bool)
    part.flat[seed] = True
    size = 1
    for _ in range(sum(mask.shape)):  # a path that winds more than this is not followed
        for _ in range(4):
            part = _around(part, np.logical_or) & mask
        grown = int(part.sum())
        if grown == size:
            break
        size = grown
    return part


def largest_part(mask: Bools) -> int:
    """Voxels of the largest connected part (X, Y, Z), among the first eight."""
    left, largest = mask.copy(), 0
    for _ in range(8):  # what is smaller than so many parts is no organ
        if not left.any():
            break
        part = flood(left, int(left.argmax()))
        largest = max(largest, int(part.sum()))
        left &= ~part
    return largest


def _around(grid: NDArray[Any], combine: np.ufunc) -> NDArray[Any]:
    """Of each voxel (X, Y, Z): its value combined with those of its 26 neighbours."""
    for to, since in _NEXT:
        before, grid = grid, grid.copy()
        combine(grid[since], before[to], out=grid[since])
        combine(grid[to], before[since], out=grid[to])
    return grid
