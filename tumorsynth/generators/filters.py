"""Separable filters on a 1 mm grid, one matrix for each axis: blobs, distances, blurring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tumorsynth.devices import onto

MIN_WEIGHT = 1e-15  # smaller weights of a Gaussian count as 0; reached at 12.5 mm for distances


def blobs(shape: torch.Size, length_mm: float, rng: torch.Generator) -> Tensor:
    """Return dark blobs on a 1 mm grid, mean 0 and standard deviation 1 over the box, on the CPU.

    Salt noise on a coarse grid, whose density (about 15 %) varies over some 16 mm, is filtered and
    interpolated to 1 mm by cubic convolution, in one matrix for each axis.
    """
    step = length_mm / 2
    coarse = [math.ceil(n / step) + 3 for n in shape]
    uniform = torch.rand(2, *coarse, generator=rng)
    density = _apply(uniform[0], [_gauss(n, 8.0 / step) for n in coarse])
    density = (density - density.mean()) / density.std()
    salt = (uniform[1] < (0.15 + 0.035 * density).clamp(0.02, 0.4)).float()
    # A Gaussian of sigma s has autocorrelation 1/e at 2 s = 2 steps; the interpolation adds to it.
    sigma = 0.8
    field = _apply(
        salt,
        [_cubic(n, m, step) @ _gauss(m, sigma) for n, m in zip(shape, coarse, strict=True)],
    )
    return (field.mean() - field) / field.std().clamp(min=1e-6)


def distance_mm(mask: Tensor) -> Tensor:
    """Return the distance to the mask in mm, about 0 inside; inf beyond some 12 mm.

    The logarithm of a sum of Gaussians is a soft minimum of the squared distance: one separable
    filter, accurate to about half a millimetre from 3 mm on.
    """
    sigma = 1.5
    matrices = [onto(_gauss(n, sigma, normalised=False), mask.device) for n in mask.shape]
    total = _apply(mask.float() * 1e15, matrices)  # scaled against underflow
    # several voxels contribute: about 10 at a flat surface, fewer at a small mask
    total = total / total.amax().clamp(max=1e16)
    return (-2 * sigma**2 * total.log()).clamp(min=0.0).sqrt()


def blur(field: Tensor, sigma: float) -> Tensor:
    """Apply a Gaussian filter; weights beyond the border go to the voxels within."""
    return _apply(field, [onto(_gauss(n, sigma), field.device) for n in field.shape])


def _apply(field: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a separable linear filter, (x, y, z) -> (x', y', z'), given as one matrix per axis.

    For boxes of some 50 voxels, three matrix products are faster than convolutions.
    """
    a, b, c = matrices
    field = (a @ field.flatten(1)).unflatten(1, field.shape[1:])
    return (b @ field) @ c.T


def _gauss(n: int, sigma: float, normalised: bool = True) -> Tensor:
    """Return (n, n): entry (i, j) is the weight of voxel j in the filtered voxel i."""
    index = torch.arange(n, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    # products of three smaller weights would be subnormal, which is slow on a CPU
    weights = torch.where(weights < MIN_WEIGHT, 0.0, weights)
    return weights / weights.sum(1, keepdim=True) if normalised else weights


def _cubic(n: int, coarse: int, step: float) -> Tensor:
    """Return (n, coarse): cubic convolution (Keys 1981, a = -1/2) to n points 1 / step apart."""
    x = (torch.arange(n) / step + 1.0)[:, None] - torch.arange(coarse)
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, torch.zeros(())))


def ramp(x: Tensor, low: float, high: float) -> Tensor:
    """Return 0 up to ``low``, 1 from ``high``, smooth between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3 - 2 * t)
