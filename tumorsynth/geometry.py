"""From the sample's grid to the generator's (1 mm; x, y, z towards Right, Anterior, Superior).

Axes are permuted and flipped to the closest of the 48 axis-aligned orientations, then resampled one
at a time, each by a small matrix, which at 1 mm is an exact selection. A residual oblique rotation
(a tilted gantry) stays: a few degrees do not change how a tumour looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.arguments import any_bool
from tumorsynth.devices import onto

Ints3 = tuple[int, int, int]
Floats3 = tuple[float, float, float]

SPACING_RANGE_MM = (0.01, 25.0)
MIN_AXES_VOLUME = 0.1  # spanned by the unit columns of an affine; less means parallel axes


@dataclass(frozen=True)
class Box:
    """Part of a volume: the voxels with start <= index < stop along each axis.

    Only `slices` needs the box to lie inside a volume; use `within` to get there.

    Examples:
        >>> organ = Box((10, 0, 4), (30, 20, 9))
        >>> part = organ.grown(5).within(Box.whole(label.shape))
        >>> label[part.slices]
    """

    start: Ints3
    stop: Ints3

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of a whole volume of this shape."""
        return cls((0, 0, 0), _ints3(shape))

    @classmethod
    def at(cls, start: Sequence[int], shape: Sequence[int]) -> Box:
        """Return the box of this shape that starts at ``start``."""
        return cls(_ints3(start), _ints3(a + n for a, n in zip(start, shape, strict=True)))

    @classmethod
    def of_slices(cls, slices: Sequence[slice]) -> Box:
        """Return the box that three slices of step 1 select."""
        return cls(_ints3(s.start for s in slices), _ints3(s.stop for s in slices))

    @classmethod
    def hull(cls, boxes: Iterable[Box]) -> Box:
        """Return the smallest box that contains all of at least one box."""
        boxes = list(boxes)
        return cls(
            _ints3(map(min, zip(*(box.start for box in boxes), strict=True))),
            _ints3(map(max, zip(*(box.stop for box in boxes), strict=True))),
        )

    @property
    def shape(self) -> Ints3:
        """Voxels along each axis."""
        (x0, y0, z0), (x1, y1, z1) = self.start, self.stop
        return x1 - x0, y1 - y0, z1 - z0

    @property
    def is_empty(self) -> bool:
        return min(self.shape) <= 0

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in its volume: ``volume[box.slices]``."""
        if min(self.start) < 0:  # numpy and torch would count from the other end
            raise ValueError(f"{self} must start inside its volume; use .within(...) first")
        (x0, y0, z0), (x1, y1, z1) = self.start, self.stop
        return slice(x0, x1), slice(y0, y1), slice(z0, z1)

    def grown(self, voxels: int | Sequence[int]) -> Box:
        """Return the box with this many more voxels on each side, one number or one per axis."""
        by = [voxels] * 3 if isinstance(voxels, int) else voxels
        return Box(
            _ints3(a - n for a, n in zip(self.start, by, strict=True)),
            _ints3(b + n for b, n in zip(self.stop, by, strict=True)),
        )

    def grown_mm(self, mm: float, spacing: Sequence[float]) -> Box:
        """Return the box with a margin of at least this many mm, and one voxel more."""
        return self.grown([math.ceil(mm / s) + 1 for s in spacing])

    def within(self, outer: Box) -> Box:
        """Return the part of the box inside ``outer``; empty if they share no voxel."""
        (x0, y0, z0), (x1, y1, z1) = self.start, self.stop
        (a0, b0, c0), (a1, b1, c1) = outer.start, outer.stop
        x, y, z = max(x0, a0), max(y0, b0), max(z0, c0)
        return Box((x, y, z), (max(x, min(x1, a1)), max(y, min(y1, b1)), max(z, min(z1, c1))))

    def relative_to(self, outer: Box) -> Box:
        """Return the same voxels, counted from the start of ``outer``."""
        (x0, y0, z0), (x1, y1, z1), (x, y, z) = self.start, self.stop, outer.start
        return Box((x0 - x, y0 - y, z0 - z), (x1 - x, y1 - y, z1 - z))


def _ints3(values: Iterable[int]) -> Ints3:
    x, y, z = values
    return x, y, z


@dataclass(frozen=True)
class Frame:
    """How a sample's tensor axes lie in the patient.

    Args:
        spacing: mm per voxel along the tensor's axes.
        axes: the tensor axis that runs along x, y and z of RAS.
        flips: whether that tensor axis runs the other way, for x, y and z.
        affine: 4x4 voxel-to-mm matrix, rows as tuples. None if only the spacing is known; the
            tensor's axes then count as x, y, z.
    """

    spacing: Floats3
    axes: Ints3 = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    affine: tuple[tuple[float, ...], ...] | None = None

    def to_mm(self, voxel: Sequence[float]) -> Floats3:
        """Return a voxel's patient coordinates (RAS, mm); voxel x spacing without an affine."""
        if self.affine is None:
            x, y, z = (float(v) * s for v, s in zip(voxel, self.spacing, strict=True))
        else:
            x, y, z, _ = (np.asarray(self.affine) @ np.array([*voxel, 1.0])).tolist()
        return x, y, z


def frame_from_spacing(spacing: Sequence[float] | float) -> Frame:
    """Return the frame for a voxel size alone.

    Args:
        spacing: mm per voxel along the tensor's axes; one number stands for all three.

    Raises:
        ValueError: unless these are three numbers from 0.01 to 25.
    """
    try:
        values = [float(v) for v in np.atleast_1d(np.asarray(spacing, dtype=float))]
        values = [] if any_bool(spacing) else values
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) == 1:
        values *= 3
    low, high = SPACING_RANGE_MM
    if len(values) != 3 or not all(math.isfinite(v) and low <= v <= high for v in values):
        raise ValueError(
            f"spacing must be three numbers in mm between {low:g} and {high:g}, got {spacing!r}; "
            "pass spacing=(dx, dy, dz) along the tensor's axes, or affine=..."
        )
    return Frame((values[0], values[1], values[2]))


def frame_from_affine(affine: Tensor | np.ndarray | Sequence[Sequence[float]]) -> Frame:
    """Return the frame for a voxel-to-mm matrix.

    Args:
        affine: 4x4 (RAS+, as NIfTI, MONAI and TorchIO give it).

    Raises:
        ValueError: if this is not a finite, invertible voxel-to-mm matrix.
    """
    matrix = _check_matrix(affine)
    linear = matrix[:3, :3]
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(linear, axis=0)
    # |det| of the unit columns is the volume they span: 1 for a rotation, 0 when two coincide
    if (
        (spacing < 1e-6).any()
        or (spacing > 1e6).any()
        or abs(np.linalg.det(linear / spacing)) < MIN_AXES_VOLUME
    ):
        raise ValueError(
            f"affine must map the voxel axes to three different directions, got "
            f"{matrix.tolist()}; its columns are zero, infinite or (nearly) parallel"
        )
    axes = _closest_axes(np.abs(linear / spacing))
    x, y, z = (bool(linear[ras, axes[ras]] < 0) for ras in range(3))
    rows = tuple(tuple(row) for row in matrix.tolist())
    return Frame(frame_from_spacing(spacing.tolist()).spacing, axes, (x, y, z), rows)


def _check_matrix(affine: Any) -> np.ndarray:
    """Return the affine as a 4x4 array of floats."""
    try:
        matrix = np.asarray(
            affine.detach().cpu().numpy() if isinstance(affine, Tensor) else affine, dtype=float
        )
        valid = matrix.shape == (4, 4) and bool(np.isfinite(matrix).all())
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(
            "affine must be a finite 4x4 voxel-to-mm matrix with last row 0 0 0 1, got "
            f"{affine!r}; pass nibabel's img.affine, or spacing=(dx, dy, dz)"
        )
    return matrix


def _closest_axes(cosines: np.ndarray) -> Ints3:
    """Return the voxel axis closest to each RAS axis, the strongest match first, as nibabel does.

    Args:
        cosines: (3, 3), absolute cosine between each RAS axis and each voxel axis; overwritten.
    """
    axes = [-1, -1, -1]
    for _ in range(3):
        ras, axis = np.unravel_index(int(np.argmax(cosines)), (3, 3))
        axes[ras] = int(axis)
        cosines[ras, :] = -1
        cosines[:, axis] = -1
    return _ints3(axes)


@dataclass(frozen=True)
class CropGrid:
    """One crop's place on a sample's grid: ``side`` points, 1 mm apart, along each tensor axis.

    Args:
        frame: how the sample's axes lie in the patient.
        shape: voxels of the sample.
        origin: position of the first point along each tensor axis, in mm from the first voxel's
            centre.
        side: points along each axis.
    """

    frame: Frame
    shape: Ints3
    origin: Floats3
    side: int

    @property
    def source(self) -> Box:
        """The part of the sample that the crop is resampled from."""
        points = [self._points(axis) for axis in range(3)]
        return Box(
            _ints3(int(np.floor(at[0])) for at in points),
            _ints3(int(np.ceil(at[-1])) + 1 for at in points),
        )

    def _points(self, axis: int) -> np.ndarray:
        """The crop's points along a tensor axis, in (fractional) voxels, clipped to the sample."""
        at = (self.origin[axis] + np.arange(self.side)) / self.frame.spacing[axis]
        # rounding keeps 1 mm an exact selection where origin / spacing is off by one ulp
        return at.round(6).clip(0, self.shape[axis] - 1)

    def cut(self, local: Tensor) -> Tensor:
        """Resample the sample to the crop; beyond the sample's border, repeat its last voxels.

        Args:
            local: the `source` part of the sample.

        Returns:
            (side, side, side) on the generator's grid, axes x, y, z.
        """
        out, source = local, self.source
        for axis in range(3):
            weights = _interpolation_weights(
                self._points(axis) - source.start[axis],
                source.shape[axis],
                1 / self.frame.spacing[axis],
            )
            out = _apply_along(out, axis, weights)
        out = out.permute(self.frame.axes)
        return out.flip([axis for axis in range(3) if self.frame.flips[axis]]).contiguous()

    def carry_back(self, crop: Tensor, region: Box) -> Tensor:
        """Resample a crop to a region of the sample.

        Args:
            crop: (side, side, side) on the generator's grid.
            region: part of the sample.

        Returns:
            One value for each voxel of the region.
        """
        out = crop.flip([axis for axis in range(3) if self.frame.flips[axis]])
        out = out.permute([self.frame.axes.index(axis) for axis in range(3)])
        for axis, spacing in enumerate(self.frame.spacing):
            voxels = np.arange(region.start[axis], region.stop[axis])
            at = (voxels * spacing - self.origin[axis]).round(6).clip(0, self.side - 1)
            out = _apply_along(out, axis, _interpolation_weights(at, self.side, spacing))
        return out.contiguous()

    def near(self, region: Box) -> Box:
        """Return the part of the crop that `carry_back` reads for a region of the sample.

        Args:
            region: part of the sample.

        Returns:
            A box in the crop, along its own axes x, y, z.
        """
        start, stop = [], []
        for axis, spacing in enumerate(self.frame.spacing):
            half_width = _triangle_half_width(spacing)
            first = region.start[axis] * spacing - self.origin[axis] - half_width
            last = (region.stop[axis] - 1) * spacing - self.origin[axis] + half_width
            # beyond the crop its faces are repeated
            start.append(min(max(math.floor(first), 0), self.side - 1))
            stop.append(max(min(math.ceil(last) + 1, self.side), start[-1] + 1))
        low = [start[axis] for axis in self.frame.axes]
        high = [stop[axis] for axis in self.frame.axes]
        for ras, flipped in enumerate(self.frame.flips):
            if flipped:
                low[ras], high[ras] = self.side - high[ras], self.side - low[ras]
        return Box(_ints3(low), _ints3(high))


def plan_crop(
    frame: Frame,
    shape: Ints3,
    tumor: Box,
    *,
    min_side: int,
    multiple: int,
    margin_mm: float,
) -> CropGrid:
    """Plan the crop for a tumour.

    The crop is centred on the tumour but moved to stay inside the sample where that is large
    enough. It starts at a voxel's centre, so that at 1 mm the crop is the sample's own voxels.

    Args:
        frame: how the sample's axes lie in the patient.
        shape: voxels of the sample.
        tumor: box around the tumour in the sample.
        min_side: smallest number of points along an axis.
        multiple: the number of points is a multiple of this.
        margin_mm: surroundings on each side of the tumour, at least.
    """
    spans = [n * s for n, s in zip(tumor.shape, frame.spacing, strict=True)]
    side = max(float(min_side), max(spans) + 2 * margin_mm)
    side = multiple * math.ceil(side / multiple)
    origin = []
    for a, b, s, n in zip(tumor.start, tumor.stop, frame.spacing, shape, strict=True):
        start = (a + b - 1) / 2 * s - (side - 1) / 2
        slack = (n - 1) * s - (side - 1)  # mm by which the crop can move inside the sample
        start = min(max(start, 0.0), slack) if slack >= 0 else slack / 2
        origin.append(math.floor(start / s + 0.5 - 1e-9) * s)
    return CropGrid(frame, shape, (origin[0], origin[1], origin[2]), side)


def _interpolation_weights(at: np.ndarray, count: int, ratio: float) -> Tensor:
    """Return a row of weights over ``count`` source points for each (fractional) target point.

    Linear between source points. Where a target point stands for ``ratio`` > 1 source points, a
    wider triangle averages them, with the variance of a box of that many points. A half width of
    ratio / 2 would skip every other point at a ratio of 2.
    """
    distance = np.abs(at[:, None] - np.arange(count)[None, :])
    weights = np.clip(1 - distance / _triangle_half_width(ratio), 0, None)
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))


def _triangle_half_width(ratio: float) -> float:
    return max(1.0, ratio / math.sqrt(2))


def _apply_along(volume: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Multiply a volume by a matrix along one axis."""
    rows, count = weights.shape
    if rows == count and torch.equal(weights, torch.eye(count, dtype=weights.dtype)):
        return volume
    weights = onto(weights.to(volume.dtype), volume.device)
    return torch.movedim(torch.tensordot(weights, volume, dims=([1], [axis])), 0, axis)


def bounding_box(mask: Tensor, margin: int = 0) -> Box | None:
    """Return the box around a mask and a margin, clipped to the volume.

    Args:
        mask: bool (X, Y, Z).
        margin: voxels on each side.

    Returns:
        The box, or None for an empty mask.
    """
    plane = mask.any(0)
    lines = torch.cat([mask.any(2).any(1), plane.any(1), plane.any(0)])
    start, stop = [], []
    for line in lines.cpu().split(list(mask.shape)):  # one host-device synchronisation
        hits = line.nonzero()
        if not len(hits):
            return None
        start.append(int(hits[0]))
        stop.append(int(hits[-1]) + 1)
    return Box(_ints3(start), _ints3(stop)).grown(margin).within(Box.whole(mask.shape))
