"""Sharpness and slow variation of a change, matched to the scan that it goes into."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.contrast import core
from tumorsynth.geometry import box_around

# Kernels make noise less alike than edges wide: a scan blurred to 1.3 mm had a grain of 0.97 mm.
WIDER = 1.4
OWN_MM = 0.7  # the sharpness of thin slices (0.45 mm of grain), which generators' changes have
SAMPLED = 0.29  # standard deviation of a box one voxel wide: no scan is sharper along an axis
MOST_MM = 2.5  # a gradient without noise looks like endless grain

LEAST_MM = 0.2  # softer by less than this is not softer

REGION_MM, REGION_VOXELS = 14.0, 24  # on each side of a tumour's centre, where grain is measured
PAIRS = 300  # of neighbouring voxels of the organ that it takes
SLOW_MM = 1.5  # what a Gaussian of this width leaves varies slowly
PROFILE_MM = 2.5  # of the filtered mask, which tells how deep a voxel lies
LUMPS = 2.5  # robust standard deviations that a scan's slow variation keeps; beyond are vessels
LEAST_VOXELS = 64  # of a tumour that has any inside to be evened
MARGIN = 6  # voxels around a tumour that its change is softened with


def neighbourhood(
    start: Sequence[int], size: Sequence[int], spacing: Sequence[float]
) -> tuple[slice, slice, slice]:
    """The voxels around the middle of a tumour in which :func:`grain` is to be measured."""
    x, y, z = (
        slice(max(0, a + n // 2 - wide), a + n // 2 + wide + 1)
        for a, n, wide in zip(
            start,
            size,
            (min(REGION_VOXELS, math.ceil(REGION_MM / s)) for s in spacing),
            strict=True,
        )
    )
    return x, y, z


def grain(hu: Tensor, organ: Tensor, spacing: Sequence[float]) -> tuple[float, float, float]:
    """How sharp a scan is along each axis, in mm, told by the grain of its noise.

    hu: (X, Y, Z), organ: bool, the tissue to measure in. 1.4 times the standard deviation of the
    Gaussian that makes white noise as alike from voxel to voxel as this scan's; at least a voxel's
    own width (0.29 of it) and at most 2.5 mm. Where there is too little organ or no noise: the
    least. Smooth kernels, thick slices and interpolation all widen it.
    """
    hu = hu.float()
    organ = organ & hu.isfinite()
    middle, enough = _median(hu, organ), organ.sum()
    spread = 1.4826 * _median((hu - middle).abs(), organ)
    fits = organ & ((hu - middle).abs() <= 3 * spread)  # no vessels
    hu = torch.where(fits, hu - middle, 0.0)
    sums = [_unlike(hu, fits, axis, step) for axis in range(3) for step in (1, 2, 4)]
    told = torch.stack([number.to(hu.dtype) for number in (*sum(sums, ()), enough)])
    *numbers, enough_voxels = told.tolist()  # one wait for a GPU
    unlike = [
        total / pairs if pairs >= PAIRS else 0.0
        for total, pairs in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    least = [SAMPLED * s for s in spacing]
    if enough_voxels < PAIRS:
        return least[0], least[1], least[2]
    found = []
    for axis, s in enumerate(spacing):
        one, two, four = unlike[3 * axis : 3 * axis + 3]
        sigma = WIDER * s * _width(two / one, 2) if one > 0 else 0.0
        if sigma > s and four > 0:  # between interpolated slices noise is alike over more voxels
            sigma = WIDER * s * _width(four / one, 4)
        found.append(min(max(sigma, least[axis]), max(MOST_MM, least[axis])))
    return found[0], found[1], found[2]


def softening(grain_mm: Sequence[float]) -> tuple[float, float, float]:
    """What a scan of this grain is softer by than a generator's changes, in mm along each axis."""
    found = (math.sqrt(max(g**2 - OWN_MM**2, 0.0)) for g in grain_mm)
    a, b, c = (sigma if sigma >= LEAST_MM else 0.0 for sigma in found)
    return a, b, c


def feather_mm(sigma_mm: float, grain_mm: Sequence[float]) -> tuple[float, float, float]:
    """Return the feather along each axis: as drawn, and never sharper than the scan.

    Args:
        sigma_mm: standard deviation drawn for the tumour.
        grain_mm: :func:`grain` of the scan.
    """
    a, b, c = (
        max(math.hypot(sigma_mm, softer), g)
        for softer, g in zip(softening(grain_mm), grain_mm, strict=True)
    )
    return a, b, c


def match(
    crop: Tensor, change: Tensor, tumor_mask: Tensor, grain_mm: Sequence[float], even: bool
) -> Tensor:
    """A change no sharper than its scan and, with ``even``, no lumpier inside than the tissue.

    crop, change: (X, Y, Z) in HU, 1 mm voxels. tumor_mask: bool. grain_mm: :func:`grain` along
    these axes. The mean of the tumour's core stays what it was.

    What a denoiser paints varies more, over a few mm, than real tumours do. With ``even`` that
    slow variation, around the tumour's own profile from outline to middle, is replaced by what
    the scan had there, without its vessels.
    """
    box = box_around(tumor_mask, MARGIN)
    if box is None:
        return change
    mask, old = tumor_mask[box], change[box]
    new, where = old, mask.nonzero().unbind(1)  # indices: a GPU is waited for once, not at each use
    if even and len(where[0]) >= LEAST_VOXELS:
        new = new + _evening(crop[box], old, mask, where)
    radius = (3 * len(where[0]) / (4 * math.pi)) ** (1 / 3)
    new = gaussian_filter(new, [min(sigma, radius / 3) for sigma in softening(grain_mm)])
    if new is old:
        return change
    inside = core(mask[None, None])[0, 0].nonzero().unbind(1)
    before, after = old[inside].mean(), new[inside].mean()
    small = (before * after <= 0) | (before.abs() <= 1.0)  # its edge reaches its middle
    change = change.clone()
    change[box] = new * torch.where(small, 1.0, (before / after).clamp(0.5, 2.0))
    return change


def _evening(hu: Tensor, change: Tensor, mask: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """What to add to a change so that the tumour is as even as the tissue was.

    where: the mask's voxels, as indices along each axis.
    """
    inside = mask.to(torch.float32)
    depth = gaussian_filter(inside, [PROFILE_MM] * 3)[where].double()
    depth = (depth - depth.mean()) / depth.std().clamp(min=1e-6)
    powers = torch.stack([depth**k for k in range(4)], dim=1)
    square = powers.T @ powers + 1e-3 * torch.eye(4, dtype=depth.dtype, device=depth.device)
    share = gaussian_filter(inside, [SLOW_MM] * 3).clamp(min=1e-3)

    def slow(values: Tensor) -> Tensor:
        """How far values are, over some mm, from their profile from outline to middle."""
        here = values[where].double()
        fitted, _ = torch.linalg.solve_ex(square, powers.T @ here)  # solve would wait for its check
        rest = here - powers @ fitted
        field = torch.zeros_like(inside)
        field[where] = rest.float()
        return gaussian_filter(field, [SLOW_MM] * 3) / share

    painted, was = slow(hu + change), slow(hu)
    most = LUMPS * 1.4826 * was[where].abs().median()
    was = was.clamp(-most, most)
    # nothing at the outline, where the filter sees the mask end; all of it 1.5 mm further in
    weight = (2 * gaussian_filter(inside, [1.0] * 3) - 1).clamp(min=0) * inside
    return weight * (was - painted)


def _median(values: Tensor, where: Tensor) -> Tensor:
    """Of the voxels of a mask, without waiting for their number; NaN where there are none."""
    return torch.where(where, values, torch.nan).nanmedian()


def _unlike(hu: Tensor, fits: Tensor, axis: int, step: int) -> tuple[Tensor, Tensor]:
    """Sum of the squared differences of voxels ``step`` apart, and the number of pairs."""
    n = max(0, hu.shape[axis] - step)
    last = hu.shape[axis] - n
    both = fits.narrow(axis, 0, n) & fits.narrow(axis, last, n)
    apart = hu.narrow(axis, last, n) - hu.narrow(axis, 0, n)
    return (apart.square() * both).sum(), both.sum()


def _width(ratio: float, far: int) -> float:
    """Standard deviation, in voxels, of the Gaussian that filtered white noise.

    ratio: of the mean squared differences ``far`` voxels and one voxel apart. Such noise is alike
    by p^(far^2) and p at these distances, so that the ratio is (1 - p^(far^2)) / (1 - p).
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        p = (low + high) / 2
        low, high = (p, high) if (1 - p**far**2) / (1 - p) < ratio else (low, p)
    return 0.0 if p < 1e-6 else 0.5 / math.sqrt(-math.log(min(p, 1 - 1e-6)))
