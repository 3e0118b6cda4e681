"""Equalised histograms, as picture libraries make them: of a whole image, and in parts (CLAHE)."""

from __future__ import annotations

import numpy as np

PARTS = 8  # along each axis, as scikit-image divides an image by default
BINS = 256
CLIP_LIMIT = 0.01  # of a part's voxels in one bin; the rest is spread over all bins


def equalised(values: np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
    """Return the ranks of values, from 0 to 255; equal values have one rank.

    Args:
        values: any shape.
        of: sorted values of the whole scan, among which they rank; None for their own.
    """
    ordered = np.sort(values, axis=None) if of is None else of
    return np.searchsorted(ordered, values) / max(1, len(ordered) - 1) * 255


def equalised_in_bins(values: np.ndarray) -> np.ndarray:
    """Return values from 0 to 255 by their cumulative histogram, as scikit-image equalises."""
    counts, edges = np.histogram(values, BINS)
    return np.interp(values, (edges[:-1] + edges[1:]) / 2, counts.cumsum() / values.size) * 255


def equalised_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values windowed to 0 to 255 and then equalised, whole, as OpenCV does."""
    windowed = np.rint((values.clip(low, high) - low) / (high - low) * 255).astype(np.int64)
    summed = np.bincount(windowed.ravel()).cumsum()
    first = summed[windowed.min()]
    return np.rint((summed[windowed] - first) / max(1, values.size - first) * 255)


def equalised_in_parts(volume: np.ndarray) -> np.ndarray:
    """Return a volume from 0 to 255, each part of it equalised with limited contrast.

    Args:
        volume: (X, Y, Z).
    """
    low, high = float(volume.min()), float(volume.max())
    bins = ((volume - low) * ((BINS - 1) / max(high - low, 1e-6))).astype(np.int64)
    sides = [-(-n // PARTS) for n in volume.shape]
    counts = [-(-n // side) for n, side in zip(volume.shape, sides, strict=True)]
    part = np.ravel_multi_index(
        np.ix_(*(np.arange(n) // side for n, side in zip(volume.shape, sides, strict=True))), counts
    )
    shares = np.bincount((part * BINS + bins).ravel(), minlength=int(np.prod(counts)) * BINS)
    shares = shares.reshape(-1, BINS) / np.bincount(part.ravel())[:, None]
    clipped = shares.clip(max=CLIP_LIMIT)
    clipped += (1 - clipped.sum(1, keepdims=True)) / BINS
    curves = (clipped.cumsum(1) * 255).reshape(*counts, BINS)
    return _interpolate(curves, bins, sides)


def _interpolate(curves: np.ndarray, bins: np.ndarray, sides: list[int]) -> np.ndarray:
    """Return each voxel's value by the curves of the parts around it, by distance from them."""
    result = np.zeros(bins.shape, dtype=np.float32)
    at = [
        ((np.arange(n) + 0.5) / side - 0.5).clip(0, count - 1)
        for n, side, count in zip(bins.shape, sides, curves.shape, strict=False)
    ]
    for corner in np.ndindex(2, 2, 2):
        index, weight = [], []
        for along, upper, count in zip(at, corner, curves.shape, strict=False):
            lower = np.floor(along).astype(np.int64)
            index.append(np.minimum(lower + upper, count - 1))
            weight.append((along - lower if upper else lower + 1 - along).astype(np.float32))
        x, y, z = np.ix_(*index)
        u, v, w = np.ix_(*weight)
        result += curves[x, y, z, bins] * (u * v * w)
    return result
