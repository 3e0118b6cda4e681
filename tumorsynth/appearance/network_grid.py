"""From a sample's grid to that of a segmentation network, around one tumour, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tumorsynth.crop_grid import apply_along, interpolation_weights
from tumorsynth.geometry import Box, Floats3, Frame, Ints3, ints3

DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
SAME_SPACING = 0.01  # relative difference up to which two spacings count as one


@dataclass(frozen=True)
class NetworkGrid:
    """A network's grid in a sample. It starts at the sample's first voxel.

    Args:
        axes: the sample's axis along each of the network's.
        flips: whether it runs the other way, for each axis of the network.
        steps: the sample's voxels per voxel of the network, along the sample's axes.
        shape: voxels of the grid along the sample's axes.
    """

    axes: Ints3
    flips: tuple[bool, bool, bool]
    steps: Floats3
    shape: Ints3

    @classmethod
    def of(
        cls,
        frame: Frame,
        sample_shape: Sequence[int],
        spacing: Floats3 | None,
        orientation: str | None,
    ) -> NetworkGrid:
        """Return the grid.

        Args:
            frame: how the sample's axes lie in the patient.
            sample_shape: its voxels.
            spacing: mm per voxel along the network's axes; None for the sample's.
            orientation: where the network's axes run to, as in "RAS"; None for the sample's axes.
        """
        axes, flips = (0, 1, 2), (False, False, False)
        if orientation is not None:
            ends = [DIRECTIONS[letter] for letter in orientation]
            axes = ints3(frame.axes[ras] for ras, _ in ends)
            x, y, z = ((sign < 0) != frame.flips[ras] for ras, sign in ends)
            flips = (x, y, z)
        steps = [1.0, 1.0, 1.0]
        for axis, mm in zip(axes, spacing or (), strict=False):
            step = mm / frame.spacing[axis]
            steps[axis] = 1.0 if abs(step - 1) < SAME_SPACING else step
        shape = ints3(
            math.floor((n - 1) / step + 1e-6) + 1
            for n, step in zip(sample_shape, steps, strict=True)
        )
        return cls(axes, flips, (steps[0], steps[1], steps[2]), shape)

    def windows(self, tumor: Box, patch_size: Sequence[int]) -> list[Box]:
        """Return the windows of the grid, along the sample's axes, that cover a tumour.

        It is one, with the tumour in the middle, unless the tumour is larger. At the sample's
        border the window moves inside; where the sample is smaller, so is the window.

        Args:
            tumor: part of the sample.
            patch_size: voxels of the network's input, along its axes.
        """
        starts, sides = [], []
        for axis, (a, b, step, n) in enumerate(
            zip(tumor.start, tumor.stop, self.steps, self.shape, strict=True)
        ):
            side = min(patch_size[self.axes.index(axis)], n)
            low = min(math.floor(a / step), n - 1)
            high = min(math.ceil((b - 1) / step), n - 1) + 1
            count = math.ceil((high - low) / side)
            first, last = low, high - side
            if count == 1:
                first = last = round((low + high - side) / 2)
            at = np.linspace(first, last, count).round().astype(int).clip(0, n - side)
            starts.append(sorted(set(at.tolist())))
            sides.append(side)
        return [Box.at(start, sides) for start in itertools.product(*starts)]

    def source(self, part: Box, sample_shape: Sequence[int]) -> Box:
        """Return the part of the sample that a part of the grid is resampled from."""
        start = [math.floor(a * s - s) for a, s in zip(part.start, self.steps, strict=True)]
        stop = [math.ceil((b - 1) * s + s) + 1 for b, s in zip(part.stop, self.steps, strict=True)]
        return Box(ints3(start), ints3(stop)).within(Box.whole(sample_shape))

    def cut(self, values: Tensor, source: Box, part: Box) -> Tensor:
        """Resample a part of the sample to a part of the grid, along the sample's axes."""
        for axis, step in enumerate(self.steps):
            at = np.arange(part.start[axis], part.stop[axis]) * step - source.start[axis]
            count = source.shape[axis]
            weights = interpolation_weights(at.round(6).clip(0, count - 1), count, step)
            values = apply_along(values, axis, weights)
        return values

    def carry_back(self, values: Tensor, part: Box, box: Box) -> Tensor:
        """Resample a part of the grid to a box of the sample."""
        for axis, step in enumerate(self.steps):
            at = np.arange(box.start[axis], box.stop[axis]) / step - part.start[axis]
            count = part.shape[axis]
            weights = interpolation_weights(at.round(6).clip(0, count - 1), count, 1 / step)
            values = apply_along(values, axis, weights)
        return values

    def to_network(self, values: Tensor) -> Tensor:
        """Turn (X, Y, Z) from the sample's axes to the network's."""
        turned = values.permute(self.axes)
        return turned.flip([axis for axis in range(3) if self.flips[axis]])

    def to_sample(self, values: Tensor) -> Tensor:
        """Turn (X, Y, Z) from the network's axes to the sample's."""
        turned = values.flip([axis for axis in range(3) if self.flips[axis]])
        return turned.permute([self.axes.index(axis) for axis in range(3)])


def pad_to(values: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad (C, X, Y, Z) with zeros on both sides, as MONAI's and nnU-Net's inference do.

    Returns:
        The padded tensor, and where in its last three axes the values are.
    """
    missing = [n - m for n, m in zip(patch_size, values.shape[1:], strict=True)]
    inner = tuple(slice(k // 2, k // 2 + m) for k, m in zip(missing, values.shape[1:], strict=True))
    if not any(missing):
        return values, inner
    margins: Iterator[int] = itertools.chain.from_iterable(
        (k // 2, k - k // 2) for k in reversed(missing)
    )
    return torch.nn.functional.pad(values, list(margins)), inner
