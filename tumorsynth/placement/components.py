"""26-connected components of small masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tumorsynth.placement.types import Bools, Floats

MAX_REMOVED_COMPONENTS = 3  # components that `lowest_connected` may find too small, one by one
MAX_COMPONENTS = 8  # of which `largest_component_voxels` takes the largest
STEPS_PER_CHECK = 4  # dilations of a flood between two checks whether it still grows
# along each axis: all but the last voxel, and all but the first
_SHIFTED = [
    tuple((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
    for axis in range(3)
]


def lowest_connected(level: Floats, n: int) -> Bools | int:
    """Find n connected voxels of lowest level.

    Every component of a sublevel set has a local minimum, so a single minimum, the usual case,
    proves the set connected. Only shapes that the organ's surface cuts apart need a flood.

    Args:
        level: (X, Y, Z), infinite where no tumour may be.
        n: number of voxels.

    Returns:
        A bool mask (X, Y, Z), or, if no n voxels are connected, how many are.
    """
    found = 0
    for _ in range(MAX_REMOVED_COMPONENTS):
        finite = level[np.isfinite(level)]
        enough = len(finite) >= n
        grid = level
        if enough:
            grid = np.where(level <= np.partition(finite, n - 1)[n - 1], level, np.inf)
        mask = np.isfinite(grid)
        minima = int(np.count_nonzero(mask & (grid <= over_neighbours(grid, np.minimum))))
        if enough and minima == 1:
            return mask
        if minima == 0:
            return 0
        if minima == 1:
            return len(finite)
        component = flood(mask, int(grid.argmin()))
        found = int(component.sum())
        if found == n:
            return component
        if not enough:
            break
        level = np.where(mask & ~component, np.inf, level)
    return found


def flood(mask: Bools, seed: int) -> Bools:
    """Return the component of a mask (X, Y, Z) that holds the voxel of flat index ``seed``."""
    component = np.zeros(mask.shape, dtype=bool)
    component.flat[seed] = True
    size = 1
    for _ in range(sum(mask.shape)):  # bounds the time that a winding path can take
        for _ in range(STEPS_PER_CHECK):
            component = over_neighbours(component, np.logical_or) & mask
        grown = int(component.sum())
        if grown == size:
            break
        size = grown
    return component


def largest_component_voxels(mask: Bools) -> int:
    """Return the number of voxels of the largest of the first MAX_COMPONENTS components."""
    left, largest = mask.copy(), 0
    for _ in range(MAX_COMPONENTS):
        if not left.any():
            break
        component = flood(left, int(left.argmax()))
        largest = max(largest, int(component.sum()))
        left &= ~component
    return largest


def over_neighbours(grid: NDArray[Any], combine: np.ufunc) -> NDArray[Any]:
    """Combine each voxel's value with those of its 26 neighbours."""
    for before_last, after_first in _SHIFTED:
        before, grid = grid, grid.copy()
        combine(grid[after_first], before[before_last], out=grid[after_first])
        combine(grid[before_last], before[after_first], out=grid[before_last])
    return grid
