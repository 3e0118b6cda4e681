"""A sample of an image's values in order: shares and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.devices import on_cpu
from tumorsynth.fetching import Task

MAX_SAMPLED = 2**14  # voxels of an image that are looked at, evenly spaced
PADDING_SHARE = 0.005  # of voxels with exactly the lowest value, or 0: from here on, padding
RARE = 0.003  # share of voxels that metal, motion and noise take


class Shares:
    """Values in order, for shares and quantiles.

    Args:
        values: finite, one-dimensional, sorted.
    """

    def __init__(self, values: NDArray[np.float32]):
        self.values = values

    def share(self, low: float, high: float) -> float:
        """Return the share of values with low <= value <= high."""
        first = self.values.searchsorted(np.float32(low), "left")
        last = self.values.searchsorted(np.float32(high), "right")
        return float(last - first) / max(1, len(self.values))

    def below(self, limit: float) -> float:
        """Return the share of values below a limit."""
        return self.share(-math.inf, np.nextafter(np.float32(limit), np.float32(-math.inf)))

    def above(self, limit: float) -> float:
        """Return the share of values above a limit."""
        return self.share(np.nextafter(np.float32(limit), np.float32(math.inf)), math.inf)

    def quantiles(self, *at: float) -> list[float]:
        return [float(self.values[round(q * (len(self.values) - 1))]) for q in at]

    def mapped(self, slope: float, offset: float = 0.0) -> Shares:
        """Return slope x value + offset."""
        values = self.values * np.float32(slope) + np.float32(offset)
        return Shares(values if slope > 0 else values[::-1])

    def without(self, value: float) -> Shares:
        """Return the values without those of one value where they are many."""
        at = np.float32(value)
        first, last = (self.values.searchsorted(at, side) for side in ("left", "right"))
        if last - first < PADDING_SHARE * len(self.values):
            return self
        return Shares(np.concatenate([self.values[:first], self.values[last:]]))

    def without_padding(self) -> Shares:
        """Return the values without those of the lowest one, and of 0, where they are many.

        A lowest value from lung to fat is none: HU are clipped there.
        """
        (lowest,) = self.quantiles(RARE)
        inner = self if -950 < lowest < -50 else self.without(lowest)
        return inner.without(0.0)


@dataclass(frozen=True)
class Sample:
    """Sampled values of an image: all of them, and those that are no padding."""

    all: Shares
    inner: Shares

    def mapped(self, slope: float, offset: float = 0.0) -> Sample:
        """Return slope x value + offset."""
        return Sample(self.all.mapped(slope, offset), self.inner.mapped(slope, offset))


def sample_voxels(image: Tensor) -> NDArray[np.float32]:
    """Return the sorted finite values of at most MAX_SAMPLED voxels, evenly spaced.

    Args:
        image: (X, Y, Z), any real dtype and device.
    """
    values: NDArray[np.float32] = (
        image[_evenly(image.shape)].to(torch.float32).flatten().cpu().numpy()
    )
    return np.sort(values[np.isfinite(values)])


def sample_organ(image: Tensor, label: Tensor, organ_labels: Sequence[int]) -> NDArray[np.float32]:
    """Return those values of `sample_voxels` that lie under the organ's label, sorted.

    Args:
        image: (X, Y, Z), any real dtype, on the CPU.
        label: same shape.
        organ_labels: label values of the organ.
    """
    at = _evenly(image.shape)
    sampled = image[at].to(torch.float32)
    values: NDArray[np.float32] = sampled[_is_organ(label[at], organ_labels)].numpy()
    return np.sort(values[np.isfinite(values)])


def sampled_on_cpu(
    image: Tensor, label: Tensor, organ_labels: Sequence[int]
) -> Task[tuple[Tensor, Tensor, Sequence[int]]]:
    """Return the sampled voxels of image and label on the CPU, and the organ's values there.

    Args:
        image: (X, Y, Z), any real dtype and device.
        label: same shape.
        organ_labels: label values of the organ.
    """
    at = _evenly(image.shape)
    image, label = image[at], label[at]
    if on_cpu(image):
        return image, label, organ_labels
    organ = _is_organ(label, organ_labels)
    image, organ = yield [image.to(torch.float32), organ]
    return image, organ, (1,)


def _is_organ(label: Tensor, organ_labels: Sequence[int]) -> Tensor:
    label = label.to(torch.int64)
    organ = torch.zeros_like(label, dtype=torch.bool)
    for value in organ_labels:
        organ |= label == value
    return organ


def _evenly(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return slices to at most MAX_SAMPLED voxels."""
    steps, counts = [1, 1, 1], list(shape)
    while math.prod(counts) > MAX_SAMPLED:
        axis = counts.index(max(counts))
        steps[axis] *= 2
        counts[axis] = -(-(shape[axis] - steps[axis] // 2) // steps[axis])
    return tuple(slice(step // 2, None, step) for step in steps)


def describe(values: NDArray[np.float32]) -> str:
    """Return in words where most of the sorted values lie."""
    low, high = Shares(values).quantiles(0.01, 0.99)
    return f"98 % of them from {low:.4g} to {high:.4g}"
