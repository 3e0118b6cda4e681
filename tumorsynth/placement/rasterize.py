"""The voxels that a tumour takes: its shape at a centre, within the room that there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tumorsynth.placement.allowed import Field
from tumorsynth.placement.components import lowest_connected
from tumorsynth.placement.exophytic import Surroundings
from tumorsynth.placement.shape import MAX_LEVEL, Bools, Shape, TumorParams

AS_FAR = 1.06  # of n voxels the level is seldom higher than this times the ellipsoid's
FEW = 8  # tumours of fewer voxels than this have no shape to keep to


@dataclass(frozen=True)
class LocalMask:
    """The voxels of one tumour: a bool tensor, tight around them, and where it starts."""

    params: TumorParams
    start: tuple[int, int, int]
    mask: Tensor
    voxels: int
    diameter_mm: float  # of what was drawn, exact

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in the sample: label[t.slices][t.mask] = tumor_label."""
        x, y, z = (slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))
        return x, y, z


def voxels(
    params: TumorParams, shape: Shape, field: Field, around: Surroundings | None
) -> LocalMask | int:
    """The tumour's voxels, or how many voxels there was room for."""
    n = max(1, round(math.pi / 6 * params.diameter_mm**3 / field.voxel_mm3))
    offset = shape.offset.numpy()
    reach = shape.sphere * (MAX_LEVEL * 1.05) / field.spacing + offset
    low, high = np.floor(reach.min(0)).tolist(), np.ceil(reach.max(0)).tolist()
    size = field.shape
    centre = params.centre
    start = [max(0, c + min(int(v), -1)) for c, v in zip(centre, low, strict=True)]
    stop = [min(m, c + max(int(v), 1) + 1) for c, v, m in zip(centre, high, size, strict=True)]
    millimetres = [
        (np.arange(a - c, b - c) - o) * s
        for a, b, c, o, s in zip(start, stop, centre, offset, field.spacing, strict=True)
    ]
    squares = shape.squares(millimetres)
    free = field.local(start, stop, around)
    level = np.full(free.shape, np.inf)  # where it has been looked at
    seen = np.zeros(free.shape, dtype=bool)
    mask: Bools | int = 0
    inside = squares[free]
    if len(inside) >= n >= 4 * FEW:
        # First no further than it is likely to reach: the ellipsoid alone tells how far that is.
        most = AS_FAR * math.sqrt(np.partition(inside, n - 1)[n - 1])
        if most < MAX_LEVEL:
            seen = shape.may_reach(squares, most) & free
            level[seen] = shape.level(millimetres, squares, seen)
            mask = lowest_connected(np.where(level <= most, level, np.inf), n)
    if isinstance(mask, int):
        # On a coarse grid even the nearest n voxels may lie beyond MAX_LEVEL; a few count wherever.
        where = shape.may_reach(squares, MAX_LEVEL if n >= 4 * FEW else math.inf)
        rest = where & ~seen
        level[rest] = shape.level(millimetres, squares, rest)
        levels = level[where]
        if len(levels) == 0:  # a centre between slices too far apart
            return 0
        if n >= FEW:
            nth = min(n, len(levels)) - 1
            where &= level <= MAX_LEVEL * max(1.0, float(np.partition(levels, nth)[nth]))
        level[~(where & free)] = np.inf
        mask = lowest_connected(level, n)
    if isinstance(mask, int):
        return mask
    index = mask.nonzero()
    x, y, z = (round(int(i.sum()) / n) for i in index)
    if not mask[x, y, z]:
        return 0  # a sickle
    x0, y0, z0 = (int(i.min()) for i in index)
    x1, y1, z1 = (int(i.max()) + 1 for i in index)
    return LocalMask(
        params=params,
        start=(start[0] + x0, start[1] + y0, start[2] + z0),
        mask=torch.from_numpy(mask[x0:x1, y0:y1, z0:z1].copy()),
        voxels=n,
        diameter_mm=equivalent_diameter(n * field.voxel_mm3),
    )


def flatness(mask: Tensor, spacing: Sequence[float]) -> float:
    """Shortest over longest axis (standard deviation in mm) of a bool mask (X, Y, Z)."""
    at = np.stack(mask.cpu().numpy().nonzero()) * np.array(spacing)[:, None]
    at -= at.mean(1, keepdims=True)
    variance = np.linalg.eigvalsh(at @ at.T / at.shape[1] + np.diag(np.square(spacing) / 12))
    return math.sqrt(variance[0] / variance[-1])


def equivalent_diameter(volume_mm3: float) -> float:
    """Equivalent diameter: of the sphere of this volume."""
    return (6 * volume_mm3 / math.pi) ** (1 / 3)


def on_grid(diameter_mm: float, lo: float, hi: float, voxel_mm3: float) -> float:
    """The diameter, moved if whole voxels would otherwise round it out of [lo, hi]."""
    n = max(1, round(math.pi / 6 * diameter_mm**3 / voxel_mm3))
    for better in (n, n + 1, n - 1):
        d = equivalent_diameter(better * voxel_mm3)
        if better >= 1 and lo - 1e-9 <= d <= hi + 1e-9:
            return diameter_mm if better == n else d
    return diameter_mm  # a coarse grid has no size in the range: the nearest one
