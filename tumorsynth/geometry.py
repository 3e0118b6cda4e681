"""Between the user's grid and the generator's: 1 mm, x, y, z towards Right, Anterior, Superior.

Axes are permuted and flipped to the closest of the 48 axis-aligned orientations and then resampled
one axis at a time; a residual oblique rotation (a tilted gantry) is left as it is, since a tumour
looks the same from a few degrees aside. Resampling along an axis is one small matrix, an exact
selection where the spacing is 1 mm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tumorsynth.arguments import any_bool
from tumorsynth.devices import onto

Ints3 = tuple[int, int, int]
Floats3 = tuple[float, float, float]


@dataclass(frozen=True)
class Box:
    """Part of a volume: the voxels with start <= index < stop along each axis.

    Only `slices` needs the box to lie inside a volume; use `within` to get there.

    Example:
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

    spacing: mm per voxel along the tensor's axes.
    axes: for x, y, z of RAS in turn, the tensor axis that runs along it.
    flips: for x, y, z in turn, whether that tensor axis runs the other way.
    affine: 4x4 voxel-to-mm matrix, rows as tuples, or None when only the spacing is known (then
        the tensor's axes are taken to be x, y, z themselves).
    """

    spacing: Floats3
    axes: Ints3 = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    affine: tuple[tuple[float, ...], ...] | None = None

    def to_mm(self, voxel: Sequence[float]) -> Floats3:
        """Patient coordinates (RAS, mm) of a voxel; voxel x spacing when there is no affine."""
        if self.affine is None:
            x, y, z = (float(v) * s for v, s in zip(voxel, self.spacing, strict=True))
        else:
            x, y, z, _ = (np.asarray(self.affine) @ np.array([*voxel, 1.0])).tolist()
        return x, y, z


def frame_from_spacing(spacing: Sequence[float] | float) -> Frame:
    """A frame from mm per voxel alone; one number stands for all three axes."""
    try:
        values = [float(v) for v in np.atleast_1d(np.asarray(spacing, dtype=float))]
        values = [] if any_bool(spacing) else values
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not all(math.isfinite(v) and 0.01 <= v <= 25 for v in values):
        raise ValueError(
            f"spacing must be three numbers in mm between 0.01 and 25, got {spacing!r}; "
            "pass spacing=(dx, dy, dz) along the tensor's axes, or affine=..."
        )
    return Frame((values[0], values[1], values[2]))


def frame_from_affine(affine: Tensor | np.ndarray | Sequence[Sequence[float]]) -> Frame:
    """A frame from a 4x4 voxel-to-mm matrix (RAS+, as NIfTI, MONAI and TorchIO give it)."""
    try:
        matrix = np.asarray(
            affine.detach().cpu().numpy() if isinstance(affine, Tensor) else affine, dtype=float
        )
        good = matrix.shape == (4, 4) and bool(np.isfinite(matrix).all())
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(
            "affine must be a finite 4x4 voxel-to-mm matrix with last row 0 0 0 1, got "
            f"{affine!r}; pass nibabel's img.affine, or spacing=(dx, dy, dz)"
        )
    linear = matrix[:3, :3]
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(linear, axis=0)
    # |det| of the unit columns is the volume they span: 1 for a rotation, 0 when two coincide
    if (
        (spacing < 1e-6).any()
        or (spacing > 1e6).any()
        or abs(np.linalg.det(linear / spacing)) < 0.1
    ):
        raise ValueError(
            f"affine must map the voxel axes to three different directions, got "
            f"{matrix.tolist()}; its columns are zero, endless or (nearly) parallel"
        )
    cosines = np.abs(linear / spacing)
    axes = [-1, -1, -1]
    for _ in range(3):  # the strongest match first, as for nibabel's closest orientation
        ras, axis = np.unravel_index(int(np.argmax(cosines)), (3, 3))
        axes[ras] = int(axis)
        cosines[ras, :] = -1
        cosines[:, axis] = -1
    flips = tuple(bool(linear[ras, axes[ras]] < 0) for ras in range(3))
    base = frame_from_spacing(spacing.tolist())
    return Frame(
        base.spacing,
        (axes[0], axes[1], axes[2]),
        (flips[0], flips[1], flips[2]),
        tuple(tuple(row) for row in matrix.tolist()),
    )


@dataclass(frozen=True)
class CropGrid:
    """One crop's place on a sample's grid: ``side`` points, 1 mm apart, along each tensor axis.

    origin: position of the first point along each tensor axis, in mm from the first voxel's centre.
    """

    frame: Frame
    shape: Ints3
    origin: Floats3
    side: int

    @property
    def source(self) -> tuple[slice, slice, slice]:
        """The voxels of the sample that the crop is made of."""
        x, y, z = (
            slice(int(np.floor(at[0])), int(np.ceil(at[-1])) + 1)
            for at in (self._voxels(axis) for axis in range(3))
        )
        return x, y, z

    def _voxels(self, axis: int) -> np.ndarray:
        """The crop's points along a tensor axis, in (fractional) voxels, kept inside the sample."""
        at = (self.origin[axis] + np.arange(self.side)) / self.frame.spacing[axis]
        # rounding keeps 1 mm an exact selection where origin / spacing is off by one ulp
        return at.round(6).clip(0, self.shape[axis] - 1)

    def cut(self, local: Tensor) -> Tensor:
        """``volume[grid.source]`` -> (side, side, side) on the generator's grid, axes x, y, z.

        Beyond the sample's border its last voxels are repeated.
        """
        out = local
        for axis, part in enumerate(self.source):
            weights = _weights(
                self._voxels(axis) - part.start,
                part.stop - part.start,
                1 / self.frame.spacing[axis],
            )
            out = _along(out, axis, weights)
        out = out.permute(self.frame.axes)
        return out.flip([axis for axis in range(3) if self.frame.flips[axis]]).contiguous()

    def carry_back(self, crop: Tensor, region: tuple[slice, slice, slice]) -> Tensor:
        """(side, side, side) on the generator's grid -> the voxels of ``region`` of the sample."""
        out = crop.flip([axis for axis in range(3) if self.frame.flips[axis]])
        out = out.permute([self.frame.axes.index(axis) for axis in range(3)])
        for axis, (part, s, start) in enumerate(
            zip(region, self.frame.spacing, self.origin, strict=True)
        ):
            at = np.arange(part.start, part.stop) * s - start
            at = at.round(6).clip(0, self.side - 1)
            out = _along(out, axis, _weights(at, self.side, s))
        return out.contiguous()

    def near(self, region: tuple[slice, slice, slice]) -> tuple[slice, slice, slice]:
        """The crop's points, along its own axes x, y, z, that `carry_back` reads for a region."""
        found = []
        for part, s, start in zip(region, self.frame.spacing, self.origin, strict=True):
            reach = _half_width(s)
            first, last = part.start * s - start - reach, (part.stop - 1) * s - start + reach
            # beyond the crop its faces are repeated
            low = min(max(math.floor(first), 0), self.side - 1)
            found.append(slice(low, max(min(math.ceil(last) + 1, self.side), low + 1)))
        x, y, z = (
            slice(self.side - n.stop, self.side - n.start) if flip else n
            for n, flip in zip(
                (found[axis] for axis in self.frame.axes), self.frame.flips, strict=True
            )
        )
        return x, y, z


def plan_crop(
    frame: Frame,
    shape: Ints3,
    low: Sequence[int],
    high: Sequence[int],
    *,
    min_side: int,
    multiple: int,
    margin_mm: float,
) -> CropGrid:
    """The crop for a tumour that fills voxels [low, high) of a sample.

    The cube has at least ``min_side`` points, and ``margin_mm`` of surroundings on each side of the
    tumour, rounded up to ``multiple``. It is centred on the tumour but moved to stay inside the
    sample where that is large enough, and starts on a voxel's centre, so that at 1 mm the crop is
    the sample's own voxels.
    """
    spans = [(b - a) * s for a, b, s in zip(low, high, frame.spacing, strict=True)]
    side = max(float(min_side), max(spans) + 2 * margin_mm)
    side = multiple * math.ceil(side / multiple)
    origin = []
    for a, b, s, n in zip(low, high, frame.spacing, shape, strict=True):
        start = (a + b - 1) / 2 * s - (side - 1) / 2
        room = (n - 1) * s - (side - 1)  # mm by which the crop can move inside the sample
        start = min(max(start, 0.0), room) if room >= 0 else room / 2
        origin.append(math.floor(start / s + 0.5 - 1e-9) * s)
    return CropGrid(frame, shape, (origin[0], origin[1], origin[2]), side)


def _weights(at: np.ndarray, count: int, ratio: float) -> Tensor:
    """Rows of interpolation weights from ``count`` source points to the (fractional) points ``at``.

    Linear between source points; where a target point stands for several (``ratio`` source points,
    coarser target), a wider triangle averages them: as spread as a box of that many points, so that
    each of them counts (a half width of ratio / 2 would lose every other point at a ratio of 2).
    """
    distance = np.abs(at[:, None] - np.arange(count)[None, :])
    weights = np.clip(1 - distance / _half_width(ratio), 0, None)
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))


def _half_width(ratio: float) -> float:
    return max(1.0, ratio / math.sqrt(2))


def _along(volume: Tensor, axis: int, weights: Tensor) -> Tensor:
    rows, count = weights.shape
    if rows == count and torch.equal(weights, torch.eye(count, dtype=weights.dtype)):
        return volume
    weights = onto(weights.to(volume.dtype), volume.device)
    return torch.movedim(torch.tensordot(weights, volume, dims=([1], [axis])), 0, axis)


def box_around(mask: Tensor, margin: int) -> tuple[slice, slice, slice] | None:
    """The mask's bounding box and a margin in voxels; None for an empty mask."""
    plane = mask.any(0)
    lines = torch.cat([mask.any(2).any(1), plane.any(1), plane.any(0)]).cpu()  # one wait for a GPU
    found = []
    for line in lines.split(list(mask.shape)):
        hits = line.nonzero()
        if not len(hits):
            return None
        found.append(slice(max(0, int(hits[0]) - margin), int(hits[-1]) + margin + 1))
    return found[0], found[1], found[2]
