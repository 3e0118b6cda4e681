"""Rasterise a tumour: from a shape at a centre to the allowed voxels it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tumorsynth.geometry import Box
from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.components import lowest_connected
from tumorsynth.placement.shape import MAX_LEVEL, Shape
from tumorsynth.placement.types import Bools, Floats, GrowthRegion, LocalMask, TumorParams

MIN_SHAPED_VOXELS = 8  # tumours of fewer voxels have no shape to keep
# Tumours from this many voxels on keep close to their shape, and must not be slivers
MIN_SMOOTH_VOXELS = 4 * MIN_SHAPED_VOXELS
LIKELY_LEVEL_FACTOR = 1.06  # n voxels seldom need a level higher than the ellipsoid's times this
BOX_MARGIN = 1.05  # factor on MAX_LEVEL for the box around a tumour


def rasterize(
    params: TumorParams, shape: Shape, allowed: AllowedVoxels, growth: GrowthRegion | None = None
) -> LocalMask | int:
    """Find a tumour's voxels: the connected allowed voxels of lowest level, as many as it needs.

    The volume is thus exact to half a voxel, also where the organ's surface cuts the shape.

    Args:
        params: the tumour, with its centre.
        shape: the shape of these params.
        allowed: where the tumour may be.
        growth: where it may grow beyond the organ.

    Returns:
        The tumour, or, if it does not fit, how many voxels do.
    """
    n = voxel_count(params.diameter_mm, allowed.voxel_mm3)
    box = _box_around(params.centre, shape, allowed)
    grid = _LevelGrid(shape, _grid_mm(box, params.centre, shape, allowed.spacing))
    free = allowed.mask_in(box, growth)
    likely = _lowest_likely(grid, free, n)
    mask = _lowest(grid, free, n) if likely is None else likely
    if isinstance(mask, int):
        return mask
    index = mask.nonzero()
    x, y, z = (round(int(i.sum()) / n) for i in index)
    if not mask[x, y, z]:
        return 0  # a sickle around its own centre
    tight = Box.of_slices([slice(int(i.min()), int(i.max()) + 1) for i in index])
    start = [a + b for a, b in zip(box.start, tight.start, strict=True)]
    return LocalMask(
        params=params,
        start=(start[0], start[1], start[2]),
        mask=torch.from_numpy(mask[tight.slices].copy()),
        voxels=n,
        diameter_mm=equivalent_diameter(n * allowed.voxel_mm3),
    )


class _LevelGrid:
    """Levels of a shape on a grid, each computed once, on first use."""

    def __init__(self, shape: Shape, grid_mm: Sequence[Floats]) -> None:
        self.shape, self._grid_mm = shape, grid_mm
        self.squares = shape.ellipsoid_squares(grid_mm)
        self._level = np.full(self.squares.shape, np.inf)
        self._known = np.zeros(self.squares.shape, dtype=bool)

    def at(self, where: Bools) -> Floats:
        """Return levels (X, Y, Z) that are valid where the mask is True."""
        missing = where & ~self._known
        self._level[missing] = self.shape.level(self._grid_mm, self.squares, missing)
        self._known |= missing
        return self._level


def _lowest_likely(grid: _LevelGrid, free: Bools, n: int) -> Bools | None:
    """Search only as far as n voxels are likely to reach, judged by the ellipsoid; None if they
    are not found there."""
    squares = grid.squares[free]
    if not len(squares) >= n >= MIN_SMOOTH_VOXELS:
        return None
    limit = LIKELY_LEVEL_FACTOR * math.sqrt(np.partition(squares, n - 1)[n - 1])
    if limit >= MAX_LEVEL:
        return None
    where = grid.shape.may_reach(grid.squares, limit) & free
    level = grid.at(where)
    mask = lowest_connected(np.where(where & (level <= limit), level, np.inf), n)
    return None if isinstance(mask, int) else mask


def _lowest(grid: _LevelGrid, free: Bools, n: int) -> Bools | int:
    """Search as far as the shape may reach."""
    # a few voxels count at any level, since on a coarse grid the nearest may lie beyond MAX_LEVEL
    farthest = MAX_LEVEL if n >= MIN_SMOOTH_VOXELS else math.inf
    where = grid.shape.may_reach(grid.squares, farthest)
    level = grid.at(where)
    levels = level[where]
    if len(levels) == 0:  # a centre between slices too far apart
        return 0
    if n >= MIN_SHAPED_VOXELS:
        nth = min(n, len(levels)) - 1
        limit = MAX_LEVEL * max(1.0, float(np.partition(levels, nth)[nth]))
        where &= level <= limit
    return lowest_connected(np.where(where & free, level, np.inf), n)


def _box_around(centre: Sequence[int], shape: Shape, allowed: AllowedVoxels) -> Box:
    """Return the part of the sample that a shape may reach, and the centre's neighbours."""
    reach = shape.sphere * (MAX_LEVEL * BOX_MARGIN) / allowed.spacing + shape.offset.numpy()
    low, high = np.floor(reach.min(0)).tolist(), np.ceil(reach.max(0)).tolist()
    start = [c + min(int(v), -1) for c, v in zip(centre, low, strict=True)]
    stop = [c + max(int(v), 1) + 1 for c, v in zip(centre, high, strict=True)]
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return box.within(allowed.sample_box)


def _grid_mm(
    box: Box, centre: Sequence[int], shape: Shape, spacing: Sequence[float]
) -> list[Floats]:
    """Return the coordinates of a box's voxels along each axis, in mm from the shape's centre."""
    return [
        (np.arange(a - c, b - c) - offset) * s
        for a, b, c, offset, s in zip(
            box.start, box.stop, centre, shape.offset.numpy(), spacing, strict=True
        )
    ]


def voxel_count(diameter_mm: float, voxel_mm3: float) -> int:
    """Return how many voxels a tumour of this equivalent diameter has, at least one."""
    return max(1, round(math.pi / 6 * diameter_mm**3 / voxel_mm3))


def equivalent_diameter(volume_mm3: float) -> float:
    """Return the diameter in mm of the sphere of this volume."""
    return (6 * volume_mm3 / math.pi) ** (1 / 3)


def snap_diameter(diameter_mm: float, low_mm: float, high_mm: float, voxel_mm3: float) -> float:
    """Return the diameter, or a similar one if whole voxels would round it out of the range.

    A coarse grid may have no size in the range; the diameter is then returned as it is.
    """
    n = voxel_count(diameter_mm, voxel_mm3)
    for count in (n, n + 1, n - 1):
        snapped = equivalent_diameter(count * voxel_mm3)
        if count >= 1 and low_mm - 1e-9 <= snapped <= high_mm + 1e-9:
            return diameter_mm if count == n else snapped
    return diameter_mm


def flatness(mask: Tensor, spacing: Sequence[float]) -> float:
    """Return the shortest over the longest axis of a bool mask (X, Y, Z).

    An axis is a standard deviation in mm, with each voxel's own extent in it.
    """
    at = np.stack(mask.cpu().numpy().nonzero()) * np.array(spacing)[:, None]
    at -= at.mean(1, keepdims=True)
    variance = np.linalg.eigvalsh(at @ at.T / at.shape[1] + np.diag(np.square(spacing) / 12))
    return math.sqrt(variance[0] / variance[-1])
