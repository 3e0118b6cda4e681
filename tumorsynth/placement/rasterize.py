"""Rasterise a tumour: from a shape at a centre to the allowed voxels it takes.

Coarse voxels are divided first (`tumorsynth.subvoxels`). The label then holds the voxels of which
the tumour fills at least half, or more where those hold too little (`least_label_share`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tumorsynth.geometry import Box, Ints3, Rows3
from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.components import flood, lowest_connected
from tumorsynth.placement.shape import MAX_LEVEL, Shape
from tumorsynth.placement.types import (
    Bools,
    Floats,
    GrowthRegion,
    Indices,
    LocalMask,
    TumorParams,
)
from tumorsynth.subvoxels import (
    ONE,
    average_subvoxels,
    refine_box,
    repeat_voxels,
    subvoxel_factors,
)

MIN_SHAPED_VOXELS = 8  # tumours of fewer voxels have no shape to keep
# Tumours from this many voxels on keep close to their shape, and must not be slivers
MIN_SMOOTH_VOXELS = 4 * MIN_SHAPED_VOXELS
LIKELY_LEVEL_FACTOR = 1.06  # n voxels seldom need a level higher than the ellipsoid's times this
BOX_MARGIN = 1.05  # factor on MAX_LEVEL for the box around a tumour
MIN_LABEL_SHARE = 0.5  # of a voxel, or of the fullest voxel's share, that the tumour fills
MIN_LABEL_VOLUME = 0.5  # of the tumour's volume
# In voxels: a tumour up to the first is labelled by its visible outline, from the second on by its
# volume. Between two thick slices an outline holds twice the volume.
OUTLINED_THICKNESS = (0.95, 1.1)


def rasterize(
    params: TumorParams, shape: Shape, allowed: AllowedVoxels, growth: GrowthRegion | None = None
) -> LocalMask | float:
    """Find a tumour's voxels: the connected allowed voxels of lowest level, as many as it needs.

    The volume is thus exact to half a voxel (a subvoxel where voxels are coarse), also where the
    organ's surface cuts the shape.

    Args:
        params: the tumour, with its centre.
        shape: the shape of these params.
        allowed: where the tumour may be.
        growth: where it may grow beyond the organ.

    Returns:
        The tumour, or, if it does not fit, how many mm3 do.
    """
    factors = subvoxel_factors(allowed.spacing, params.diameter_mm)
    subvoxel_mm3 = allowed.voxel_mm3 / math.prod(factors)
    n = voxel_count(params.diameter_mm, subvoxel_mm3)
    box = box_around(params.centre, shape, allowed)
    grid = LevelGrid(shape, grid_mm(box, params.centre, shape, allowed.spacing, factors))
    free = repeat_voxels(torch.from_numpy(allowed.mask_in(box, growth)), factors).numpy()
    likely = _lowest_likely(grid, free, n)
    if likely is None:
        mask = _lowest(grid, free, n, voxel_count(params.diameter_mm, allowed.voxel_mm3))
    else:
        mask = likely
    if isinstance(mask, int):
        return mask * subvoxel_mm3
    index = mask.nonzero()
    x, y, z = (round(int(i.sum()) / n) for i in index)
    if not mask[x, y, z]:
        return 0.0  # a sickle around its own centre
    return local_mask(params, mask, box, factors, allowed.voxel_mm3, index)


def local_mask(
    params: TumorParams,
    mask: Bools,
    box: Box,
    factors: Ints3,
    voxel_mm3: float,
    index: Sequence[Indices] | None = None,
    label: Bools | None = None,
) -> LocalMask:
    """Return a tumour in the tight box around it.

    Args:
        params: what the voxels follow from.
        mask: bool, the tumour on the subvoxels of ``box``, with at least one.
        box: part of the sample.
        factors: subvoxels along each axis of a voxel.
        voxel_mm3: volume of a voxel.
        index: ``mask.nonzero()``, where the caller has it.
        label: bool, the voxels of ``box`` to label; None for those that the tumour fills by half.
    """
    tight = Box.of_slices(
        [
            slice(int(i.min()) // k, int(i.max()) // k + 1)
            for i, k in zip(mask.nonzero() if index is None else index, factors, strict=True)
        ]
    )
    start = [a + b for a, b in zip(box.start, tight.start, strict=True)]
    fine = torch.from_numpy(mask[refine_box(tight, factors).slices].copy())
    labelled = fine
    if factors != ONE:
        labelled = (
            _fullest_voxels(fine, factors)
            if label is None
            else torch.from_numpy(label[tight.slices].copy())
        )
    voxels = int(labelled.sum())
    return LocalMask(
        params=params,
        start=(start[0], start[1], start[2]),
        mask=labelled,
        voxels=voxels,
        diameter_mm=equivalent_diameter(voxels * voxel_mm3),
        factors=factors,
        subvoxels=None if factors == ONE else fine,
    )


def _fullest_voxels(fine: Tensor, factors: Ints3) -> Tensor:
    """Return the voxels to label (X, Y, Z): connected, and at least one.

    Args:
        fine: bool, the tumour on the box's subvoxels.
        factors: subvoxels along each axis of a voxel.
    """
    share = average_subvoxels(fine.double(), factors).numpy()
    least = least_label_share(fine, share, factors)
    return torch.from_numpy(flood(share >= least, int(share.argmax())))


def least_label_share(fine: Tensor, share: Floats, factors: Ints3) -> float:
    """Return the share of a voxel from which on it is labelled.

    It is half of a voxel; labels then hold, on average, as much as the tumours. Where that leaves
    much less, as of a tumour between two slices, it is that of the best-filled voxels that make up
    the volume. A tumour no thicker than a voxel gets the outline of what is visible, at half of the
    fullest voxel; in between, the label's volume goes smoothly from the one to the other.

    Args:
        fine: bool, the tumour on the box's subvoxels.
        share: of each voxel of the box.
        factors: subvoxels along each axis of a voxel.
    """
    levels, alike = np.unique(share[share > 0], return_counts=True)
    counts = alike[::-1].cumsum()[::-1]  # of the voxels from each share on
    half, outline = np.searchsorted(levels, [MIN_LABEL_SHARE, MIN_LABEL_SHARE * levels[-1]])
    volume = float(share.sum())
    too_few = counts < MIN_LABEL_VOLUME * volume
    thin, thick = OUTLINED_THICKNESS
    outlined = np.clip((thick - _thickness(fine, factors)) / (thick - thin), 0.0, 1.0)
    missed = np.abs(counts - volume - outlined * max(counts[outline] - volume, 0.0))
    missed[half + 1 :] = missed[too_few] = np.inf
    if not too_few[outline]:
        missed[:outline] = np.inf
    return float(levels[missed.argmin()])


def _thickness(fine: Tensor, factors: Ints3) -> float:
    """Return the least thickness of a tumour in voxels, along the axes of divided voxels.

    The thickest part of an ellipsoid is 1.5 times as thick as the mean of its chords.
    """
    voxels = int(fine.sum())
    return min(
        1.5 * voxels / (int(fine.any(axis).sum()) * k) for axis, k in enumerate(factors) if k > 1
    )


class LevelGrid:
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


def _lowest_likely(grid: LevelGrid, free: Bools, n: int) -> Bools | None:
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


def _lowest(grid: LevelGrid, free: Bools, n: int, whole_voxels: int) -> Bools | int:
    """Search as far as the shape may reach.

    Args:
        grid: levels.
        free: bool (X, Y, Z), where the tumour may be.
        n: voxels, or subvoxels, that it needs.
        whole_voxels: its volume in voxels of the scan.
    """
    # a few voxels count at any level, since on a coarse grid the nearest may lie beyond MAX_LEVEL
    farthest = MAX_LEVEL if whole_voxels >= MIN_SMOOTH_VOXELS else math.inf
    where = grid.shape.may_reach(grid.squares, farthest)
    level = grid.at(where)
    levels = level[where]
    if len(levels) == 0:  # a centre between slices too far apart
        return 0
    if whole_voxels >= MIN_SHAPED_VOXELS:
        nth = min(n, len(levels)) - 1
        limit = MAX_LEVEL * max(1.0, float(np.partition(levels, nth)[nth]))
        where &= level <= limit
    return lowest_connected(np.where(where & free, level, np.inf), n)


def box_around(
    centre: Sequence[int], shape: Shape, allowed: AllowedVoxels, level: float = MAX_LEVEL
) -> Box:
    """Return the part of the sample that a level may reach, and the centre's neighbours."""
    sphere = allowed.along_axes(shape.sphere)
    reach = sphere * (level * BOX_MARGIN) / allowed.spacing + shape.offset.numpy()
    low, high = np.floor(reach.min(0)).tolist(), np.ceil(reach.max(0)).tolist()
    start = [c + min(int(v), -1) for c, v in zip(centre, low, strict=True)]
    stop = [c + max(int(v), 1) + 1 for c, v in zip(centre, high, strict=True)]
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return box.within(allowed.sample_box)


def grid_mm(
    box: Box, centre: Sequence[int], shape: Shape, spacing: Sequence[float], factors: Ints3
) -> list[Floats]:
    """Return a box's subvoxels' coordinates along each axis, in mm from the shape's centre."""
    return [
        ((np.arange((a - c) * k, (b - c) * k) + 0.5) / k - 0.5 - offset) * s
        for a, b, c, offset, s, k in zip(
            box.start, box.stop, centre, shape.offset.numpy(), spacing, factors, strict=True
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


def flatness(mask: Tensor, spacing: Sequence[float], shear: Rows3 | None = None) -> float:
    """Return the shortest over the longest axis of a bool mask (X, Y, Z).

    An axis is a standard deviation in mm, with each voxel's own extent in it.

    Args:
        mask: with at least one voxel.
        spacing: mm per voxel.
        shear: of the grid's axes; see `tumorsynth.geometry.Frame`.
    """
    at = np.stack(mask.cpu().numpy().nonzero()) * np.array(spacing)[:, None]
    at -= at.mean(1, keepdims=True)
    covariance = at @ at.T / at.shape[1] + np.diag(np.square(spacing) / 12)
    if shear is not None:
        covariance = shear @ covariance @ np.transpose(shear)
    variance = np.linalg.eigvalsh(covariance)
    return math.sqrt(variance[0] / variance[-1])
