"""Where voxels lie: boxes of voxels, and how a sample's axes lie in the patient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.arguments import any_bool

Ints3 = tuple[int, int, int]
Floats3 = tuple[float, float, float]
Rows3 = tuple[Floats3, Floats3, Floats3]

SPACING_RANGE_MM = (0.01, 25.0)
THICK_SLICES = 1.5  # times as thick as their pixels are long
MIN_SHEAR = 1e-4  # smaller entries of a shear are rounding
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
        return cls((0, 0, 0), ints3(shape))

    @classmethod
    def at(cls, start: Sequence[int], shape: Sequence[int]) -> Box:
        """Return the box of this shape that starts at ``start``."""
        return cls(ints3(start), ints3(a + n for a, n in zip(start, shape, strict=True)))

    @classmethod
    def of_slices(cls, slices: Sequence[slice]) -> Box:
        """Return the box that three slices of step 1 select."""
        return cls(ints3(s.start for s in slices), ints3(s.stop for s in slices))

    @classmethod
    def hull(cls, boxes: Iterable[Box]) -> Box:
        """Return the smallest box that contains all of at least one box."""
        boxes = list(boxes)
        return cls(
            ints3(map(min, zip(*(box.start for box in boxes), strict=True))),
            ints3(map(max, zip(*(box.stop for box in boxes), strict=True))),
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
            ints3(a - n for a, n in zip(self.start, by, strict=True)),
            ints3(b + n for b, n in zip(self.stop, by, strict=True)),
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


def ints3(values: Iterable[int]) -> Ints3:
    """Return three whole numbers as a tuple."""
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
        shear: 3x3, rows as tuples, where the tensor's axes are not at right angles, as with a
            tilted gantry: ``shear @ (voxel * spacing)`` are mm along right-angled axes, those
            nearest to the tensor's. None for right angles.
    """

    spacing: Floats3
    axes: Ints3 = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    affine: tuple[tuple[float, ...], ...] | None = None
    shear: Rows3 | None = None

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel: the determinant of the affine."""
        volume = math.prod(self.spacing)
        return volume if self.shear is None else volume * float(np.linalg.det(self.shear))

    @property
    def slice_axis(self) -> int:
        """The tensor axis across slices: that of the longest voxels, else that of the patient."""
        longest = max(self.spacing)
        others = sorted(self.spacing)[:2]
        if longest > THICK_SLICES * max(others):
            return self.spacing.index(longest)
        return self.axes[2]

    @property
    def plane_distance(self) -> Floats3:
        """Distance in mm between neighbouring planes of voxels, along each tensor axis.

        It is the spacing where axes are at right angles, and less where they are not. So many
        voxels further along an axis are at least that many times this away.
        """
        return plane_distance(self.spacing, self.shear)

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
    spacing3 = frame_from_spacing(spacing.tolist()).spacing
    return Frame(spacing3, axes, (x, y, z), rows, shear_of(linear))


def shear_of(affine: np.ndarray) -> Rows3 | None:
    """Return how the axes of an affine, 4x4 or its linear part, are sheared; see `Frame`.

    None for axes at right angles. By the polar decomposition, the axes are a rotation of the
    shear's columns.
    """
    linear = affine[:3, :3]
    _, scale, rows = np.linalg.svd(linear / np.linalg.norm(linear, axis=0))
    shear = (rows.T * scale) @ rows
    if np.abs(shear - np.eye(3)).max() < MIN_SHEAR:
        return None
    a, b, c = ((float(x), float(y), float(z)) for x, y, z in shear)
    return a, b, c


def plane_distance(spacing: Sequence[float], shear: Rows3 | None) -> Floats3:
    """Return the distance between neighbouring planes of voxels; see `Frame.plane_distance`."""
    x, y, z = (float(s) for s in spacing)
    if shear is None:
        return x, y, z
    a, b, c = (1 / np.linalg.norm(np.linalg.inv(shear), axis=1)).tolist()
    return x * a, y * b, z * c


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
    return ints3(axes)


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
    return Box(ints3(start), ints3(stop)).grown(margin).within(Box.whole(mask.shape))
