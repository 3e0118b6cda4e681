"""From the sample's grid to the generator's (1 mm; x, y, z towards Right, Anterior, Superior).

Axes are permuted and flipped to the closest of the 48 axis-aligned orientations, then resampled one
at a time, each by a small matrix, which at 1 mm is an exact selection. What is left of an oblique
or sheared affine stays in the crop: the generator sees tissue, and the tumour's mask with it,
turned or slanted by that angle, and what it paints is carried back the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tumorsynth.along_axis import multiply_along
from tumorsynth.devices import onto
from tumorsynth.geometry import Box, Floats3, Frame, Ints3, ints3
from tumorsynth.subvoxels import ONE, refine_frame


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

    def refined(self, factors: Ints3) -> CropGrid:
        """Return the same crop's place on the grid of the sample's subvoxels."""
        if factors == ONE:
            return self
        fine = refine_frame(self.frame, factors)
        x, y, z = (
            o + (s - t) / 2
            for o, s, t in zip(self.origin, self.frame.spacing, fine.spacing, strict=True)
        )
        shape = ints3(n * k for n, k in zip(self.shape, factors, strict=True))
        return CropGrid(fine, shape, (x, y, z), self.side)

    @property
    def source(self) -> Box:
        """The part of the sample that the crop is resampled from."""
        points = [self._points(axis) for axis in range(3)]
        return Box(
            ints3(int(np.floor(at[0])) for at in points),
            ints3(int(np.ceil(at[-1])) + 1 for at in points),
        )

    def _points(self, axis: int) -> np.ndarray:
        """The crop's points along a tensor axis, in (fractional) voxels, clipped to the sample."""
        at = (self.origin[axis] + np.arange(self.side)) / self.frame.spacing[axis]
        # rounding keeps 1 mm an exact selection where origin / spacing is off by one ulp
        return at.round(6).clip(0, self.shape[axis] - 1)

    def cut(self, local: Tensor, part: Box | None = None) -> Tensor:
        """Resample the sample to the crop; beyond the sample's border, repeat its last voxels.

        Args:
            local: a part of the sample.
            part: which part; elsewhere the sample counts as 0. None is `source`.

        Returns:
            (side, side, side) on the generator's grid, axes x, y, z.
        """
        source = self.source
        if part is not None:
            local = local[part.within(source).relative_to(part).slices]
            part = part.within(source).relative_to(source)
        out = local
        for axis in range(3):
            weights = interpolation_weights(
                self._points(axis) - source.start[axis],
                source.shape[axis],
                1 / self.frame.spacing[axis],
            )
            if part is not None:
                weights = weights[:, part.slices[axis]]
            out = apply_along(out, axis, weights)
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
            out = apply_along(out, axis, interpolation_weights(at, self.side, spacing))
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
        return Box(ints3(low), ints3(high))


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


def interpolation_weights(at: np.ndarray, count: int, ratio: float) -> Tensor:
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


def apply_along(volume: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Multiply a volume by a matrix along one axis."""
    rows, count = weights.shape
    if rows == count and torch.equal(weights, torch.eye(count, dtype=weights.dtype)):
        return volume
    weights = onto(weights.to(volume.dtype), volume.device)
    return multiply_along(weights, volume, axis)
