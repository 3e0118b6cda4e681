"""The room for a tumour: which voxels it may take, and which of them hang together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tumorsynth.bulge import Surroundings
    from tumorsynth.masks import LocalMask


class Ground(NamedTuple):
    """What tumours are placed on: a sample's label and forbidden voxels, or the part of both that
    has every voxel of the organ and every forbidden one.

    label: (X, Y, Z), of which ``labels`` are the organ. forbid: bool, the same shape. start: where
    they lie in the sample, of ``shape`` voxels.
    """

    label: Tensor
    labels: tuple[int, ...]
    forbid: Tensor | None
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    @classmethod
    def whole(cls, label: Tensor, labels: tuple[int, ...], forbid: Tensor | None) -> Ground:
        x, y, z = label.shape
        return cls(label, labels, forbid, (0, 0, 0), (x, y, z))

    def on_cpu(self) -> Ground:
        """The same on the CPU: one wait for a GPU."""
        code = is_organ(self.label, self.labels).to(torch.uint8)
        if self.forbid is not None:
            code += 2 * self.forbid.to(torch.uint8)
        code = code.cpu()
        forbid = None if self.forbid is None else code > 1
        return Ground(code & 1, (1,), forbid, self.start, self.shape)


class Field:
    """Where a tumour may be: organ, less forbidden voxels, less other tumours and their gap.

    Voxels are counted from the sample's first, also where the ground is a part of it.

    around: for a tumour that bulges, where it may be beyond the organ.
    """

    def __init__(
        self,
        ground: Ground,
        spacing: tuple[float, float, float],
        others: Sequence[LocalMask],
        gap_mm: float,
        around: Surroundings | None = None,
    ) -> None:
        self.ground, self.spacing = ground, spacing
        self.shape, self.device = ground.shape, ground.label.device
        self.around = around
        self.voxel_mm3 = math.prod(spacing)
        # A box-shaped dilation by ceil(gap / spacing): whatever is left is more than gap away.
        gap = [max(1, math.ceil(gap_mm / s - 1e-6)) for s in spacing]
        self.others = []
        for other in others:
            # no further than the volume: a wide gap in small voxels has no end
            below = [min(g, s) for g, s in zip(gap, other.start, strict=True)]
            above = [
                max(0, min(g, n - s - m))
                for g, n, s, m in zip(gap, self.shape, other.start, other.mask.shape, strict=True)
            ]
            (x, y, z), (x1, y1, z1) = below, above
            padded = F.pad(other.mask, (z, z1, y, y1, x, x1))
            start = [s - g for s, g in zip(other.start, below, strict=True)]
            self.others.append((start, dilate(padded, gap_mm, spacing)))

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """For voxel indices (3, ...): may a tumour be there, and is only the organ in the way.

        Both bool. The second is False beyond the volume, and where a voxel is forbidden or taken: a
        tumour cut there ends in a straight line, which the organ's own surface does not make.
        """
        label, forbid = self.ground.label, self.ground.forbid
        (x, y, z), known = _within(index, self.ground.start, label.shape)
        open_ = known
        if self.shape != label.shape:
            _, open_ = _within(index, (0, 0, 0), self.shape)
        if forbid is not None:
            open_ = open_ & ~(known & forbid[x, y, z])
        for start, mask in self.others:
            (i, j, k), near = _within(index, start, mask.shape)
            open_ = open_ & ~(near & mask[i, j, k])
        organ = is_organ(label[x, y, z], self.ground.labels).logical_and_(known)
        if self.around is not None:
            organ |= self.around.near(index)
        return organ.logical_and_(open_), open_

    def of_organ(self) -> Field:
        """The same without what lies beyond the organ."""
        inner = copy(self)
        inner.around = None
        return inner

    def organ_at(self, index: Tensor) -> Tensor:
        """Which voxels (3, ...) are the organ's, of indices that may lie beyond the volume."""
        label = self.ground.label
        (x, y, z), known = _within(index, self.ground.start, label.shape)
        return is_organ(label[x, y, z], self.ground.labels).logical_and_(known)

    def local(self, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """The same for a whole box, which must lie in the volume."""
        label, forbid = self.ground.label, self.ground.forbid
        here, there = _common(start, stop, self.ground.start, label.shape)
        sides = [b - a for a, b in zip(start, stop, strict=True)]
        free = torch.zeros(sides, dtype=torch.bool, device=self.device)
        free[here] = is_organ(label[there], self.ground.labels)
        if self.around is not None:
            free |= self.around.local(start, stop)
        if forbid is not None:
            free[here] &= ~forbid[there]
        for other_start, mask in self.others:
            here, there = _common(start, stop, other_start, mask.shape)
            free[here] &= ~mask[there]
        return free


def _within(
    index: Tensor, start: Sequence[int], shape: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Indices (3, ...) counted from ``start`` and kept in the shape; which of them are in it."""
    local = [i - s for i, s in zip(index, start, strict=True)]
    kept = [t.clamp(0, n - 1) for t, n in zip(local, shape, strict=True)]
    a, b, c = (t == k for t, k in zip(local, kept, strict=True))
    return kept, a & b & c


def _common(
    start: Sequence[int], stop: Sequence[int], there: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a box shares with a volume that starts ``there``: its slices in either."""
    box, volume = [], []
    for a, b, s, n in zip(start, stop, there, shape, strict=True):
        first, last = max(a, s), min(b, s + n)
        box.append(slice(first - a, max(last, first) - a))
        volume.append(slice(first - s, max(last, first) - s))
    return tuple(box), tuple(volume)


def lowest_connected(level: Tensor, where: Tensor, n: int) -> Tensor | int:
    """The n voxels of lowest level that hang together (X, Y, Z), or how many if there are fewer.

    Every connected part of a sublevel set has a lowest voxel. So one local minimum means one
    part, which is the rule; the flood is for shapes that the organ's surface cuts apart.
    level: (N,), infinite where no tumour may be. where: (X, Y, Z) bool, the voxels of level.
    """
    found = 0
    for _ in range(3):
        enough = int(level.isfinite().sum()) >= n
        lowest = level <= level.kthvalue(n).values if enough else level.isfinite()
        grid = level.new_full(where.shape, math.inf)
        grid[where] = level.masked_fill(~lowest, math.inf)
        mask = grid.isfinite()
        lowest_near = -F.max_pool3d(-grid[None, None], 3, 1, 1)[0, 0]
        parts = int((mask & (grid <= lowest_near)).sum())
        if enough and parts == 1:
            return mask
        if parts == 0:
            return 0
        if parts == 1:  # all that there is, and too little
            return int(mask.sum())
        part = flood(mask, int(grid.argmin()))
        found = int(part.sum())
        if found == n:
            return part
        if not enough:
            break
        level = level.masked_fill(lowest & ~part[where], math.inf)
    return found


def flood(mask: Tensor, seed: int) -> Tensor:
    """The 26-connected part of a bool mask (X, Y, Z) that holds the voxel of flat index seed."""
    part = torch.zeros(mask.numel(), dtype=torch.float32, device=mask.device)
    part[seed] = 1.0
    allowed = mask.float()[None, None]
    part = part.view_as(allowed)
    size = 1
    for _ in range(sum(mask.shape)):  # a path that winds more than this is not followed
        for _ in range(4):
            part = F.max_pool3d(part, 3, 1, 1) * allowed
        grown = int(part.sum())
        if grown == size:
            break
        size = grown
    return part[0, 0] > 0


def largest_part(ground: Ground, where: tuple[slice, ...]) -> int:
    """Voxels of the largest connected part of an organ (one kidney of two), to a few per cent.

    where: the organ's box. It is looked at on a grid of at most 24 points along each axis.
    """
    steps = [max(1, math.ceil((s.stop - s.start) / 24)) for s in where]
    coarse = [
        slice(s.start + n // 2 - first, s.stop - first, n)
        for s, n, first in zip(where, steps, ground.start, strict=True)
    ]
    left = is_organ(ground.label[tuple(coarse)], ground.labels)
    largest = 0
    for _ in range(8):  # what is smaller than so many parts is no organ
        if not bool(left.any()):
            break
        part = flood(left, int(left.flatten().to(torch.uint8).argmax()))
        largest = max(largest, int(part.sum()))
        left &= ~part
    return largest * math.prod(steps)


def dilate(mask: Tensor, gap_mm: float, spacing: Sequence[float]) -> Tensor:
    """A bool mask (X, Y, Z) grown by a box of gap_mm, at least one voxel, to each side."""
    out = mask.clone()
    for axis, s in enumerate(spacing):
        size = out.shape[axis]
        wanted, reached = min(max(1, math.ceil(gap_mm / s - 1e-6)), size - 1), 0
        while reached < wanted:  # what is grown by k to both sides grows by up to 2 k + 1 at once
            step = min(2 * reached + 1, wanted - reached, size - 1)
            before = out.clone()
            out.narrow(axis, step, size - step).logical_or_(before.narrow(axis, 0, size - step))
            out.narrow(axis, 0, size - step).logical_or_(before.narrow(axis, step, size - step))
            reached += step
    return out


def is_organ(label: Tensor, labels: tuple[int, ...]) -> Tensor:
    """Where the label (X, Y, Z) has one of the values: bool."""
    organ = None
    for value in labels:
        if holds(label.dtype, value):  # or torch would compare with what it wraps or rounds to
            here = label == value
            organ = here if organ is None else organ.logical_or_(here)
    return torch.zeros_like(label, dtype=torch.bool) if organ is None else organ


def marked(label: Tensor, labels: tuple[int, ...]) -> Tensor:
    """As `is_organ`, with numbers that are not 0 where it is True: on a CPU torch compares into the
    label's own number format up to eight times as fast as into bool."""
    if label.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32):
        return is_organ(label, labels).view(torch.uint8)
    found = None
    for value in labels:
        if holds(label.dtype, value):
            here = label.clone().eq_(value)
            found = here if found is None else torch.maximum(found, here)
    return torch.zeros_like(label) if found is None else found


def holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a dtype has this very number; 257 in uint8 would be 1."""
    return torch.tensor(value).to(dtype).item() == value
