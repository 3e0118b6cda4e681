"""Contrast of a tumour: measure it in a painted crop, sample it, and shift a crop to it.

Volumes here are (B, 1, X, Y, Z) in HU with 1 mm voxels. Contrast is the mean of a tumour's core
minus the median of the tissue 2 to 6 mm away from it. On a GPU nothing here synchronises.

Two other places measure contrast, each with the data it has. This module steers a painted crop on
the 1 mm grid, where no organ label is at hand. `gate.measure` judges the tumour as written, at any
spacing, against the organ's label 2 to 8 mm away. `tumor_statistics` of the training reports uses
this module's shell, as do the figures of annotated tumours. In an even organ the three agree to
within the noise; near vessels and other organs their shells differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from tumorsynth.along_axis import multiply_along
from tumorsynth.appearance.surroundings import (
    Surroundings,
    around_tumors,
    count_voxels,
    grown,
)
from tumorsynth.arguments import any_bool
from tumorsynth.devices import on_cpu, onto, stream_of
from tumorsynth.random_streams import substream

MIN_CORE_VOXELS = 20  # a smaller tumour is measured with its outermost layer
SOFT_REACH_VOXELS = 2  # cutoff of the Gaussian of 1 voxel that softens a shift
SOFT_KERNEL_SUM = 1 + 2 * math.exp(-0.5) + 2 * math.exp(-2)
FLUID_HU = 10.0  # solid tissue does not become darker than this
MIN_DARKER_HU = 8.0  # a tumour that is darker than its organ is so by at least this
MAX_SOLID_HU = 150.0  # a tumour in a lung does not become brighter than this
CONTRAST_SCALE_RANGE = (0.3, 1.5)  # of the scale by the tissue's own level
MAX_CONTRAST_HU = 1500.0


@dataclass(frozen=True)
class ContrastConfig:
    """What a generator knows about contrast.

    Args:
        low: lowest contrast in HU that is sampled where none is requested.
        high: highest one.
        reference_hu: the tissue for which low and high hold. They scale with the tissue's own
            level, so that a tumour in an unenhanced organ is fainter. None turns this off.
        tissue: HU that count as tissue around a tumour; fat, air and bone are not measured.
        even: whether noise, slow variation and edge of a painted tumour are matched to the scan and
            to real tumours (`tumorsynth.appearance.noise`).

    Raises:
        ValueError: if the numbers are not finite and in order.
    """

    low: float = -55.0
    high: float = -20.0
    reference_hu: float | None = 110.0
    tissue: tuple[float, float] = (20.0, 220.0)
    even: bool = True

    @property
    def darkens(self) -> bool:
        """Whether every contrast that is sampled is darker than the tissue."""
        return self.high <= 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tissue", tuple(float(hu) for hu in self.tissue))
        numbers = [self.low, self.high, *self.tissue, self.reference_hu or 1.0]
        valid = len(self.tissue) == 2 and all(math.isfinite(n) for n in numbers)
        if not (valid and self.low <= self.high and self.tissue[0] < self.tissue[1]):
            raise ValueError(f"contrast needs finite low <= high and tissue low < high, got {self}")


def check_contrast(contrast_hu: float | Sequence[float] | None) -> tuple[float, float] | None:
    """Return (low, high) of a ``contrast_hu=`` argument.

    Args:
        contrast_hu: a number, (low, high), or None for the generator's own contrast.

    Raises:
        ValueError: for anything else, and beyond 1500 HU.
    """
    if contrast_hu is None:
        return None
    try:
        if isinstance(contrast_hu, str):
            raise TypeError("letters")
        values = [float(contrast_hu)] * 2 if isinstance(contrast_hu, Real) else list(contrast_hu)  # type: ignore[arg-type]
        low, high = (float(v) for v in values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -MAX_CONTRAST_HU <= low <= high <= MAX_CONTRAST_HU or any_bool(contrast_hu):
        raise ValueError(
            "contrast_hu must be HU above (or, negative, below) the tissue around the tumour, a "
            "number or (low, high) with -1500 <= low <= high <= 1500, the darker first, got "
            f"{contrast_hu!r}; pass for example "
            "(-50, -20), or None for the generator's own"
        )
    return low, high


class ContrastFrom(NamedTuple):
    """What a tumour's core is painted at: (B,) each, in HU.

    Args:
        level: of the tissue around.
        contrast: relative to it.
    """

    level: Tensor
    contrast: Tensor


def requested_contrast(healthy: Tensor, tumor_mask: Tensor, contrast_hu: Tensor) -> ContrastFrom:
    """Return requested contrasts with the level that they are relative to.

    Where another organ next to the tumour raises or lowers the level so far that a tumour that
    should be darker than what it replaces would be brighter, or the reverse, the level is that of
    the replaced tissue as it goes on around the tumour.

    Args:
        healthy: (B, 1, X, Y, Z), before the tumour.
        tumor_mask: bool, same shape.
        contrast_hu: (B,).
    """
    around = Surroundings.of(healthy, tumor_mask)
    level = around.similar_level()
    wrong = contrast_hu.sign() * (level + contrast_hu - around.replaced) < 0
    if not on_cpu(wrong) or bool(wrong.any()):
        own = around.own_level()
        level = torch.where(wrong & own.isfinite(), own, level)
    return ContrastFrom(level, contrast_hu)


def sampled_contrast(
    healthy: Tensor, tumor_mask: Tensor, config: ContrastConfig, seeds: Sequence[int] | None
) -> ContrastFrom:
    """Sample a contrast for each tumour, with the level that it is relative to.

    A generator that only darkens makes no tumour brighter than what it replaces minus
    `MIN_DARKER_HU`. Next to a brighter organ the level is therefore that of the replaced tissue as
    it goes on around the tumour. A place that is darker than all that is around stays as it is: no
    solid tumour is darker.

    Args:
        healthy: (B, 1, X, Y, Z), before the tumour.
        tumor_mask: bool, same shape.
        config: the range.
        seeds: one for each tumour; None for the middle of the range.
    """
    around = Surroundings.of(healthy, tumor_mask)
    level = around.healthy_level(config.tissue)
    shares = _contrast_shares(level, seeds)
    contrast = _contrast_at(config, level, shares)
    if not config.darkens:
        return ContrastFrom(level, contrast)
    brightest = around.replaced - MIN_DARKER_HU
    wrong = level + contrast > brightest
    if not on_cpu(wrong) or bool(wrong.any()):
        own = around.own_level()
        wrong &= own.isfinite()
        level = torch.where(wrong, own, level)
        contrast = torch.where(wrong, _contrast_at(config, level, shares), contrast)
        level = torch.where(wrong, torch.minimum(level, brightest - contrast), level)
    return ContrastFrom(level, contrast)


def core(tumor_mask: Tensor) -> Tensor:
    """Return each tumour without its outermost voxels, or all of a small one.

    Args:
        tumor_mask: bool (B, 1, X, Y, Z).
    """
    eroded = ~(grown((~tumor_mask).float(), 1) > 0)
    return torch.where(count_voxels(eroded) >= MIN_CORE_VOXELS, eroded, tumor_mask)


def contrast_of(hu: Tensor, tumor_mask: Tensor, level: Tensor) -> Tensor:
    """Return the mean of each tumour's core minus the level around it, (B,)."""
    box = around_tumors(tumor_mask, 2)
    hu, tumor_mask = hu[box], tumor_mask[box]
    inside = core(tumor_mask).to(hu.dtype)
    return (hu * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1) - level


def sample_contrast(config: ContrastConfig, level: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Sample a contrast for each tumour from its generator's range.

    Args:
        config: the range.
        level: (B,), HU of the tissue around each tumour.
        seeds: one for each tumour; None for the middle of the range.

    Returns:
        (B,) in HU.
    """
    return _contrast_at(config, level, _contrast_shares(level, seeds))


def shift_to_contrast(hu: Tensor, tumor_mask: Tensor, level: Tensor, contrast_hu: Tensor) -> Tensor:
    """Return what to add to painted crops so that their tumours have the requested contrast.

    The shift is as soft at the outline as the edges that generators paint: half there. A wider one
    would leave a rim, bright in a kidney, where generators paint too dark by tens of HU.

    Args:
        hu: (B, 1, X, Y, Z), painted.
        tumor_mask: bool, same shape.
        level: (B,), HU of the tissue around each tumour.
        contrast_hu: (B,), requested.

    Returns:
        HU, shaped like ``hu``.
    """
    box = around_tumors(tumor_mask, SOFT_REACH_VOXELS + 1)
    change, hu, tumor_mask = torch.zeros_like(hu), hu[box], tumor_mask[box]
    missing = contrast_hu - contrast_of(hu, tumor_mask, level)
    soft = tumor_mask.to(hu.dtype)
    for axis in (2, 3, 4):
        soft = _soften(soft, axis)
    inside = core(tumor_mask).to(hu.dtype)
    share = (soft * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    change[box] = soft * (missing / share.clamp(min=0.1))[:, None, None, None, None]
    return change


def _contrast_shares(level: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Sample where in its generator's range each tumour's contrast lies: (B,), 0 to 1."""
    shares = [
        float(torch.rand((), generator=stream, dtype=torch.float32))
        for stream in (substream(seed, "contrast_condition") for seed in seeds or [])
    ]
    share = onto(torch.tensor(shares or [0.5], dtype=level.dtype), level.device)
    return share.expand(level.shape)


def _contrast_at(config: ContrastConfig, level: Tensor, shares: Tensor) -> Tensor:
    """Return the contrasts at these shares of a generator's range, in tissue of a level: (B,)."""
    contrast = config.low + (config.high - config.low) * shares
    if config.reference_hu is None:
        return torch.minimum(contrast, (MAX_SOLID_HU - level).clamp(min=0.0))
    contrast = contrast * (level / config.reference_hu).clamp(*CONTRAST_SCALE_RANGE)
    contrast = torch.maximum(contrast, (FLUID_HU - level).clamp(max=-MIN_DARKER_HU))
    return contrast.clamp(max=-MIN_DARKER_HU) if config.darkens else contrast


def _soften(volume: Tensor, axis: int) -> Tensor:
    """Filter along an axis with a Gaussian of 1 voxel; beyond the border lies 0."""
    device = volume.device
    kernel = _soft_kernel(device, stream_of(device), volume.shape[axis], volume.dtype)
    return multiply_along(kernel, volume, axis)


@lru_cache(maxsize=64)
def _soft_kernel(device: torch.device, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    """(count, count) matrix of `_soften` on a device; kept, so do not change it."""
    with torch.inference_mode(False):  # a caller's may end before the matrix is used again
        at = torch.arange(count, dtype=dtype, device="cpu")
        squared = (at[:, None] - at).square()
        kernel = torch.where(squared <= SOFT_REACH_VOXELS**2, torch.exp(-0.5 * squared), 0.0)
        return onto(kernel / SOFT_KERNEL_SUM, device)
