"""Allowed voxels: the organ, without forbidden voxels and without other tumours and their gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.geometry import Box, Floats3, Frame, Rows3
from tumorsynth.placement.organ import OrganRegion, as_array, carries, is_outside
from tumorsynth.placement.types import Bools, Floats, GrowthRegion, Indices, LocalMask
from tumorsynth.subvoxels import ONE


class PointLookup(NamedTuple):
    """What `AllowedVoxels.lookup` knows of some voxels.

    allowed: whether a tumour may take the voxel.
    unobstructed: whether the voxel lies in the sample and is neither forbidden nor taken. A tumour
        that is cut where this is False ends in a flat face, unlike at the organ's own surface.
    """

    allowed: Bools
    unobstructed: Bools


class AllowedVoxels:
    """Where tumours may be placed in one sample.

    Voxel indices and boxes are those of the whole sample, also where the region is a part of it.
    Methods that take a ``growth`` region also allow the voxels where a tumour may grow beyond the
    organ.

    Args:
        region: the organ, on the CPU.
        spacing: mm per voxel.
        gap_mm: distance between two tumours, at least one voxel.
        shear: of the sample's axes; see `tumorsynth.geometry.Frame`.
    """

    def __init__(
        self,
        region: OrganRegion,
        spacing: Floats3,
        gap_mm: float,
        shear: Rows3 | None = None,
    ) -> None:
        self.organ_box, self.part = region.organ_box, region.part
        self.sample_box = Box.whole(region.sample_shape)
        frame = Frame(spacing, shear=shear)
        self.spacing, self.shear, self.gap_mm = spacing, shear, gap_mm
        self.voxel_mm3, self.plane_distance = frame.voxel_mm3, frame.plane_distance
        self._label, self._labels = as_array(region.label, region.organ_labels)
        self._flat_label = _FlatView(self._label)
        self._forbidden = None if region.forbidden is None else region.forbidden.numpy()
        self._image_range = region.image_range
        self._image = None if region.image is None else region.image.numpy()
        self._flat_image = None if self._image is None else _FlatView(self._image)
        self._taken: list[_Taken] = []
        self._blocked: Bools | None = None  # shaped like the region's label
        self._blocked_by = 0  # how many of ``_taken`` are in ``_blocked``

    def keep_clear_of(self, tumor: LocalMask) -> None:
        """Forbid a tumour's voxels, and the gap around its label, to all later tumours."""
        # no further than the sample: a wide gap in small voxels would need endless memory
        box = tumor.box.grown(gap_voxels(self.gap_mm, self.plane_distance)).within(self.sample_box)
        (x, y, z), (x1, y1, z1) = (
            [a - b for a, b in zip(tumor.start, box.start, strict=True)],
            [b - a for a, b in zip(tumor.box.stop, box.stop, strict=True)],
        )
        margin = (z, z1, y, y1, x, x1)
        blocked = dilate(F.pad(tumor.mask.cpu(), margin), self.gap_mm, self.plane_distance)
        if tumor.factors != ONE:  # voxels of which it fills less than half
            blocked |= F.pad(tumor.share > 0, margin)
        self._taken.append(_Taken(box, blocked.numpy()))

    def along_axes(self, points: Floats) -> Floats:
        """Return points (N, 3) at right angles, in mm, as mm along the sample's axes."""
        return points if self.shear is None else points @ np.linalg.inv(self.shear)

    def lookup(self, index: Indices, growth: GrowthRegion | None = None) -> PointLookup:
        """Look up scattered voxels (3, ...), which may lie outside the sample.

        Of a growth region this uses the quick estimate.
        """
        local = _LocalIndex(index, self.part)
        allowed = self._organ_at(local)
        unsuited = None
        if self._flat_image is not None:
            unsuited = allowed & is_outside(self._flat_image.take(local.index), self._image_range)
        if growth is not None:
            allowed |= growth.likely_at(torch.from_numpy(index)).numpy()
        unobstructed = local.inside
        if self.part != self.sample_box:
            unobstructed = _LocalIndex(index, self.sample_box).inside
        if unsuited is not None:
            unobstructed = unobstructed & ~unsuited
        blocked = self._blocked_voxels()
        if blocked is not None:
            hits = _FlatView(blocked).take(local.index)
            unobstructed = unobstructed & ~(local.inside & hits)
        return PointLookup(allowed & unobstructed, unobstructed)

    def is_organ_at(self, index: Indices) -> Bools:
        """Return which voxels (3, ...), which may lie outside the sample, are the organ."""
        return self._organ_at(_LocalIndex(index, self.part))

    def mask_in(self, box: Box, growth: GrowthRegion | None = None) -> Bools:
        """Return which voxels of a box inside the sample a tumour may take."""
        allowed = np.zeros(box.shape, dtype=bool)
        here, there = _common_slices(box, self.part)
        allowed[here] = carries(self._label[there], self._labels)
        if self._image is not None:
            allowed[here] &= ~is_outside(self._image[there], self._image_range)
        if growth is not None:
            allowed |= growth.mask_in(box).numpy()
        if self._forbidden is not None:
            allowed[here] &= ~self._forbidden[there]
        for taken in self._taken:
            if not box.within(taken.box).is_empty:
                here, there = _common_slices(box, taken.box)
                allowed[here] &= ~taken.mask[there]
        return allowed

    def forbidden_in(self, box: Box) -> Bools:
        """Return which voxels of a box inside the sample are forbidden, whatever their label."""
        forbidden = np.zeros(box.shape, dtype=bool)
        if self._forbidden is not None:
            here, there = _common_slices(box, self.part)
            forbidden[here] = self._forbidden[there]
        return forbidden

    def organ_on_grid(self, slices: Sequence[slice]) -> Bools:
        """Return which voxels of strided slices, from the region's start on, are the organ."""
        starts = zip(slices, self.part.start, strict=True)
        local = tuple(slice(s.start - a, s.stop - a, s.step) for s, a in starts)
        return carries(self._label[local], self._labels)

    def _organ_at(self, local: _LocalIndex) -> Bools:
        organ = carries(self._flat_label.take(local.index), self._labels)
        organ &= local.inside
        return organ

    def _blocked_voxels(self) -> Bools | None:
        """Forbidden and taken voxels in one array, so that a lookup costs the same for many
        tumours as for one."""
        if self._blocked is None:
            if not self._taken:
                return self._forbidden
            forbidden = self._forbidden
            self._blocked = (
                np.zeros(self._label.shape, bool) if forbidden is None else forbidden.copy()
            )
        for taken in self._taken[self._blocked_by :]:
            here, there = _common_slices(taken.box, self.part)
            self._blocked[there] |= taken.mask[here]
        self._blocked_by = len(self._taken)
        return self._blocked


class _Taken(NamedTuple):
    """A tumour and the gap around it."""

    box: Box
    mask: Bools


class _LocalIndex:
    """Voxel indices (3, ...) counted from a box's start, and which of them lie inside the box."""

    def __init__(self, index: Indices, box: Box) -> None:
        self.index = [i - a for i, a in zip(index, box.start, strict=True)]
        # as unsigned numbers, indices below 0 are huge: one comparison covers both ends
        x, y, z = (i.view(np.uint64) < n for i, n in zip(self.index, box.shape, strict=True))
        x &= y
        x &= z
        self.inside: Bools = x


class _FlatView:
    """A flat view of an array (X, Y, Z) in any memory layout.

    Looking up many voxels by one index each is several times as fast as by three.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._steps = [stride // values.itemsize for stride in values.strides]
        length = 1 + sum((n - 1) * s for n, s in zip(values.shape, self._steps, strict=True))
        self._flat = as_strided(values, (length,), (values.itemsize,), writeable=False)

    def take(self, index: Sequence[Indices]) -> NDArray[Any]:
        """Return the values at indices along X, Y, Z; of those outside, some other value."""
        x, y, z = (i * step for i, step in zip(index, self._steps, strict=True))
        x += y
        x += z
        return self._flat.take(x, mode="clip")


def _common_slices(box: Box, other: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the voxels that two boxes share, as slices of either."""
    common = box.within(other)
    return common.relative_to(box).slices, common.relative_to(other).slices


def gap_voxels(gap_mm: float, spacing: Sequence[float]) -> list[int]:
    """Return a gap in voxels, at least one: whatever lies further apart than this keeps it."""
    return [max(1, math.ceil(gap_mm / s - 1e-6)) for s in spacing]


def dilate(mask: Tensor, gap_mm: float, spacing: Sequence[float]) -> Tensor:
    """Return a bool mask (X, Y, Z) grown by a box of gap_mm, at least one voxel, on each side."""
    out = mask.clone()
    for axis, gap in enumerate(gap_voxels(gap_mm, spacing)):
        size = out.shape[axis]
        wanted, reached = min(gap, size - 1), 0
        while reached < wanted:  # a mask grown by k can grow by 2 k + 1 at once
            step = min(2 * reached + 1, wanted - reached, size - 1)
            before = out.clone()
            out.narrow(axis, step, size - step).logical_or_(before.narrow(axis, 0, size - step))
            out.narrow(axis, 0, size - step).logical_or_(before.narrow(axis, step, size - step))
            reached += step
    return out
