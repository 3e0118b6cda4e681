"""The room for a tumour: which voxels it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.placement.organ import as_array, carries
from tumorsynth.placement.organ import is_organ as is_organ
from tumorsynth.placement.shape import Bools

if TYPE_CHECKING:
    from tumorsynth.placement.exophytic import Surroundings
    from tumorsynth.placement.rasterize import LocalMask

Indices = NDArray[np.int64]


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

    Voxels are counted from the sample's first, also where the ground is a part of it. ``around``,
    of a tumour that bulges, is where it may be beyond the organ.
    """

    def __init__(self, ground: Ground, spacing: tuple[float, float, float], gap_mm: float) -> None:
        self.label, self.labels = as_array(ground.label, ground.labels)
        self._memory, self._steps = _in_memory(self.label)
        self.forbid = None if ground.forbid is None else ground.forbid.numpy()
        self.start, self.shape = ground.start, ground.shape
        self.spacing, self.gap_mm = spacing, gap_mm
        self.voxel_mm3 = math.prod(spacing)
        self.others: list[tuple[list[int], Bools]] = []
        self._taken: Bools | None = None  # of the ground's shape: by ``others``, or forbidden
        self._known = 0  # how many of them are in it

    def take(self, other: LocalMask) -> None:
        """From here on no tumour may lie within the gap of this one, or next to it."""
        # A box-shaped dilation by ceil(gap / spacing): whatever is left is more than gap away;
        # no further than the volume: a wide gap in small voxels has no end
        gap = [max(1, math.ceil(self.gap_mm / s - 1e-6)) for s in self.spacing]
        below = [min(g, s) for g, s in zip(gap, other.start, strict=True)]
        above = [
            max(0, min(g, n - s - m))
            for g, n, s, m in zip(gap, self.shape, other.start, other.mask.shape, strict=True)
        ]
        (x, y, z), (x1, y1, z1) = below, above
        padded = F.pad(other.mask.cpu(), (z, z1, y, y1, x, x1))
        start = [s - g for s, g in zip(other.start, below, strict=True)]
        self.others.append((start, dilate(padded, self.gap_mm, self.spacing).numpy()))

    def at(self, index: Indices, around: Surroundings | None = None) -> tuple[Bools, Bools]:
        """For voxel indices (3, ...): may a tumour be there, and is only the organ in the way.

        The second is False beyond the volume, and where a voxel is forbidden or taken: a tumour cut
        there ends in a straight line, which the organ's own surface does not make.
        """
        local, known = _within(index, self.start, self.label.shape)
        organ = self._organ(local, known)
        if around is not None:
            organ |= around.near(torch.from_numpy(index)).numpy()
        open_ = known
        if self.shape != self.label.shape:
            _, open_ = _within(index, (0, 0, 0), self.shape)
        taken = self._map()
        if taken is not None:
            memory, steps = _in_memory(taken)
            open_ = open_ & ~(known & memory.take(_position(local, steps), mode="clip"))
        return organ & open_, open_

    def organ_at(self, index: Indices) -> Bools:
        """Which voxels (3, ...) are the organ's, of indices that may lie beyond the volume."""
        return self._organ(*_within(index, self.start, self.label.shape))

    def _organ(self, local: list[Indices], known: Bools) -> Bools:
        values = self._memory.take(_position(local, self._steps), mode="clip")
        organ = carries(values, self.labels)
        organ &= known
        return organ

    def local(
        self, start: Sequence[int], stop: Sequence[int], around: Surroundings | None = None
    ) -> Bools:
        """Where in a box, which must lie in the volume, a tumour may be."""
        here, there = _common(start, stop, self.start, self.label.shape)
        free = np.zeros([b - a for a, b in zip(start, stop, strict=True)], dtype=bool)
        free[here] = carries(self.label[there], self.labels)
        if around is not None:
            free |= around.local(start, stop).numpy()
        if self.forbid is not None:
            free[here] &= ~self.forbid[there]
        for other_start, mask in self.others:
            here, there = _common(start, stop, other_start, mask.shape)
            free[here] &= ~mask[there]
        return free

    def organ(self, where: Sequence[slice]) -> Bools:
        """Which voxels of a part of the sample are the organ's; the ground must reach its start."""
        begin = zip(where, self.start, strict=True)
        part = tuple(slice(w.start - s, w.stop - s, w.step) for w, s in begin)
        return carries(self.label[part], self.labels)

    def _map(self) -> Bools | None:
        """Forbidden and taken voxels of the ground: to look up many points in, however many others
        there are."""
        if self._taken is None:
            if not self.others:
                return self.forbid
            shape = self.label.shape
            self._taken = np.zeros(shape, bool) if self.forbid is None else self.forbid.copy()
        for start, mask in self.others[self._known :]:
            stop = [a + n for a, n in zip(start, mask.shape, strict=True)]
            here, there = _common(start, stop, self.start, self.label.shape)
            self._taken[there] |= mask[here]
        self._known = len(self.others)
        return self._taken


def _within(
    index: Indices, start: Sequence[int], shape: Sequence[int]
) -> tuple[list[Indices], Bools]:
    """Indices (3, ...) counted from ``start``, along each axis; which of them are in the shape."""
    local = [i - s for i, s in zip(index, start, strict=True)]
    # seen as unsigned, what lies below 0 lies far beyond the shape: one comparison for both ends
    x, y, z = (i.view(np.uint64) < n for i, n in zip(local, shape, strict=True))
    x &= y
    x &= z
    return local, x


def _in_memory(values: NDArray[Any]) -> tuple[NDArray[Any], list[int]]:
    """An array (X, Y, Z) as a line, whatever its layout, and how far apart neighbours lie in it.

    To look up many voxels by one index each is several times as fast as by three.
    """
    steps = [stride // values.itemsize for stride in values.strides]
    length = 1 + sum((n - 1) * step for n, step in zip(values.shape, steps, strict=True))
    return as_strided(values, (length,), (values.itemsize,), writeable=False), steps


def _position(local: Sequence[Indices], steps: Sequence[int]) -> Indices:
    """Where voxels lie in the line of `_in_memory`."""
    x, y, z = (i * step for i, step in zip(local, steps, strict=True))
    x += y
    x += z
    return x


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
