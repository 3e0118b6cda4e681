"""Contrast by organ and phase: hypo-, iso- and hyperattenuating tumours, rims, necrotic cores.

The named priors are assumptions from radiology textbooks. benchmarks/realism/contrasts.py compares
"liver-portal" with 20 real tumours of four patients, which it agrees with, and "liver-arterial"
with three of one patient, which are too few to tell. For the others no annotated tumours were
available.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.contrast import (
    CONTRAST_SCALE_RANGE,
    FLUID_HU,
    MAX_CONTRAST_HU,
    core,
)
from tumorsynth.appearance.noise import MATCH_MARGIN_VOXELS, filtered_noise
from tumorsynth.appearance.surroundings import grown
from tumorsynth.arguments import is_bool, keywords_of
from tumorsynth.devices import onto
from tumorsynth.geometry import bounding_box
from tumorsynth.placement.types import PARAM_BOUNDS
from tumorsynth.random_streams import substream

HURange = tuple[float, float]

RIM_DEPTH_MM, RIM_SIGMA_MM = 1.5, 1.0  # below the outline; the rim is 2 to 3 mm wide
CORE_DEPTH_SHARE = 0.5  # of the largest depth, where a necrotic core begins
CORE_EDGE_SHARE = 0.06  # width of its border, of the largest depth
CORE_ROUGHNESS = 0.12  # standard deviation of where its border lies, of the largest depth
CORE_ROUGHNESS_SIGMA_MM = 3.0
RIM_VARIATION, RIM_VARIATION_SIGMA_MM = 0.5, 5.0  # of a rim around its tumour, of its HU
MAX_HETEROGENEITY_HU = PARAM_BOUNDS["heterogeneity_hu"].high
# lowest, highest and an example of each range in HU
RANGES_HU = {
    "hypo": (-MAX_CONTRAST_HU, MAX_CONTRAST_HU, "(-50, -20)"),
    "iso": (-MAX_CONTRAST_HU, MAX_CONTRAST_HU, "(-8, 8)"),
    "hyper": (-MAX_CONTRAST_HU, MAX_CONTRAST_HU, "(10, 35)"),
    "rim": (-MAX_CONTRAST_HU, MAX_CONTRAST_HU, "(8, 25)"),
    "core_hu": (-MAX_CONTRAST_HU, MAX_CONTRAST_HU, "(-35, -15)"),
    "heterogeneity": (0.0, MAX_HETEROGENEITY_HU, "(3, 12)"),
}
SCALAR_RANGES = {
    "core_from_mm": (0.0, 1000.0, "mm"),
    "reference_hu": (1.0, 3000.0, "HU, or be None"),
    "floor_hu": (-2000.0, 3000.0, "HU, or be None"),
}
HETEROGENEOUS_FROM_MM = 30.0
LUMPS_FROM_MM = (20.0, 40.0)  # diameters at which lumps begin, and reach full strength
LUMPS_OVER_CONTRAST = (0.2, 0.6)  # standard deviation over contrast, as in annotated tumours
MAX_LUMPS_HU = 18.0
LUMP_SIGMA_SHARE = 0.08  # of the diameter: standard deviation of the Gaussian that makes lumps
LUMP_SIGMA_MM = (1.5, 4.0)  # its limits
FINE_SIGMA_SHARE = 0.4  # of it, for finer lumps, which have half the weight
STRUCTURE_SIGMA_MM = 0.7  # softness of rim and core
OUTLINE_SIGMA_MM = 1.0  # softness of a change at the outline
MAX_DEPTH_VOXELS = 24
# 6-neighbourhood dilation as three max-pools: (kernel, padding)
CROSS_KERNELS = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))


class SampledContrast(NamedTuple):
    """Contrast of one tumour, in HU.

    Args:
        contrast_hu: the whole tumour, without its outermost voxels, minus the tissue around it.
        structure_hu: (rim, core) minus the rest of the tumour; 0 for none.
        heterogeneity_hu: standard deviation of the lumps inside.
    """

    contrast_hu: float
    structure_hu: tuple[float, float]
    heterogeneity_hu: float


@keywords_of()
@dataclass(frozen=True)
class ContrastPrior:
    """A distribution of contrasts, for ``contrast_hu=``; all HU are relative to what is around.

    A tumour is hypo-, iso- or hyperattenuating; its contrast is uniform in that range. Rim and
    necrotic core leave the tumour's mean contrast as it is.

    Args:
        name: for messages.
        hypo: contrast in HU of darker tumours, (low, high).
        iso: contrast of tumours as bright as the tissue around.
        hyper: contrast of brighter tumours.
        shares: how often each of the three is sampled; any sum.
        rim: HU of a rim at the outline above the rest, (low, high).
        rim_share: share of tumours with a rim.
        core_hu: HU of a necrotic core against the rest, negative for darker, (low, high).
        core_share: share of the tumours of at least ``core_from_mm`` with a core.
        core_from_mm: equivalent diameter.
        heterogeneity: standard deviation in HU of lumps inside a tumour of at least 30 mm,
            (low, high); in smaller ones less, in proportion to the diameter. 0 leaves lumps to
            generators that are matched to the scan.
        reference_hu: the tissue for which these hold. They scale with the tissue's own level, by
            0.3 to 1.5. None turns this off.
        floor_hu: no tumour becomes darker than this (fluid). None turns this off.

    Raises:
        ValueError: for ranges that are not (low, high) and shares that are out of range.

    Examples:
        >>> prior = ts.ContrastPrior(hypo=(-45, -25), rim_share=0.3)
        >>> synth = ts.SynthesizeTumor(contrast_hu=prior)
    """

    name: str = "custom"
    hypo: HURange = (-50.0, -20.0)
    iso: HURange = (-8.0, 8.0)
    hyper: HURange = (10.0, 35.0)
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0)
    rim: HURange = (8.0, 25.0)
    rim_share: float = 0.0
    core_hu: HURange = (-35.0, -15.0)
    core_share: float = 0.0
    core_from_mm: float = 30.0
    heterogeneity: HURange = (0.0, 0.0)
    reference_hu: float | None = None
    floor_hu: float | None = FLUID_HU

    def __post_init__(self) -> None:
        for name, (lowest, highest, example) in RANGES_HU.items():
            given = getattr(self, name)
            pair = _numbers(given, 2)
            if pair is None or not lowest <= pair[0] <= pair[1] <= highest:
                raise ValueError(
                    f"{name} must be (low, high) in HU, the lower first, from {lowest:g} to "
                    f"{highest:g}, got {given!r}; pass for example {name}={example}"
                )
            object.__setattr__(self, name, tuple(pair))
        shares = _numbers(self.shares, 3)
        if shares is None or min(shares) < 0 or sum(shares) == 0:
            raise ValueError(
                f"shares must be three numbers of at least 0, not all 0, got {self.shares!r}; "
                "pass for example (0.85, 0.1, 0.05) of darker, alike and brighter tumours"
            )
        object.__setattr__(self, "shares", tuple(shares))
        for name in ("rim_share", "core_share"):
            share = _numbers([getattr(self, name)], 1)
            if share is None or not 0 <= share[0] <= 1:
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)!r}; pass 0 for none"
                )
        for name, (lowest, highest, words) in SCALAR_RANGES.items():
            given = getattr(self, name)
            if given is None and name != "core_from_mm":
                continue
            level = _numbers([given], 1)
            if level is None or not lowest <= level[0] <= highest:
                raise ValueError(
                    f"{name} must lie in {lowest:g} to {highest:g} {words}, got {given!r}; leave "
                    "it out for the default"
                )

    def sample(self, seed: int, diameter_mm: float, level_hu: float) -> SampledContrast:
        """Sample the contrast of one tumour.

        Args:
            seed: the tumour's noise seed.
            diameter_mm: its equivalent diameter.
            level_hu: level of the tissue around it.
        """
        # always all seven, so that one setting does not change another's number
        kind, contrast, has_rim, rim, has_core, core_contrast, lumps = torch.rand(
            7, generator=substream(seed, "contrast_prior"), dtype=torch.float32
        ).tolist()
        bounds = torch.tensor(self.shares, dtype=torch.float64).cumsum(0) / sum(self.shares)
        hu_range = (self.hypo, self.iso, self.hyper)[int((bounds <= kind).sum().clamp(max=2))]
        scale = 1.0
        if self.reference_hu is not None:
            lowest, highest = CONTRAST_SCALE_RANGE
            scale = min(max(level_hu / self.reference_hu, lowest), highest)
        contrast_hu = scale * _interpolate(hu_range, contrast)
        if self.floor_hu is not None:  # tissue that is darker already keeps its level
            contrast_hu = max(contrast_hu, min(self.floor_hu - level_hu, 0.0))
        rim_hu = core_hu = 0.0
        if has_rim < self.rim_share:
            rim_hu = scale * _interpolate(self.rim, rim)
        if diameter_mm >= self.core_from_mm and has_core < self.core_share:
            core_hu = scale * _interpolate(self.core_hu, core_contrast)
        share = scale * min(diameter_mm / HETEROGENEOUS_FROM_MM, 1.0)
        lumps_hu = share * _interpolate(self.heterogeneity, lumps)
        # a bright tissue's scale must not lead beyond what params hold
        contrast_hu, rim_hu, core_hu = (
            min(max(hu, -MAX_CONTRAST_HU), MAX_CONTRAST_HU) for hu in (contrast_hu, rim_hu, core_hu)
        )
        lumps_hu = min(lumps_hu, MAX_HETEROGENEITY_HU)
        return SampledContrast(contrast_hu, (rim_hu, core_hu), lumps_hu)


def _numbers(values: Any, count: int) -> list[float] | None:
    """Return so many finite numbers; None for anything else."""
    try:
        numbers = [float(v) for v in values if isinstance(v, Real) and not is_bool(v)]
        given = len(values)
    except (TypeError, ValueError):
        return None
    finite = all(math.isfinite(n) for n in numbers)
    return numbers if len(numbers) == given == count and finite else None


def get_contrast_prior(name: str) -> ContrastPrior:
    """Return a named prior.

    Args:
        name: an organ and a phase, as in "liver-arterial"; an organ alone is its portal phase.

    Raises:
        ValueError: for other names.
    """
    prior = CONTRAST_PRIORS.get(name) or CONTRAST_PRIORS.get(f"{name}-portal")
    if prior is None:
        raise ValueError(
            f"a contrast prior must be one of {', '.join(sorted(CONTRAST_PRIORS))}, got {name!r}; "
            "or pass HU, (low, high), or a tumorsynth.ContrastPrior"
        )
    return prior


def add_structure(
    change: Tensor,
    tumor_mask: Tensor,
    structure_hu: tuple[float, float],
    seed: int,
    heterogeneity_hu: float = 0.0,
    diameter_mm: float = 0.0,
    lumps_share: float = 0.0,
) -> Tensor:
    """Add rim, necrotic core and lumps to a change, leaving the mean of the tumour's core as it is.

    Args:
        change: (X, Y, Z) in HU, 1 mm voxels.
        tumor_mask: bool, same shape.
        structure_hu: HU of rim and core; 0 for none.
        seed: the tumour's noise seed, from which the uneven rim, the core's border and the lumps
            follow.
        heterogeneity_hu: standard deviation of the lumps; 0 for none.
        diameter_mm: of the tumour, which gives the lumps' width.
        lumps_share: the lumps' standard deviation over the tumour's mean change, at most 18 HU, for
            ``heterogeneity_hu`` 0.

    Returns:
        A new change, or ``change`` itself where nothing is added.
    """
    if structure_hu == (0.0, 0.0) and heterogeneity_hu == lumps_share == 0:
        return change
    box = bounding_box(tumor_mask, MATCH_MARGIN_VOXELS)
    if box is None:
        return change
    change = change.clone()
    mask = tumor_mask[box.slices]
    structure = _rim_and_core(mask, structure_hu, seed)
    inside = core(mask[None, None])[0, 0]
    if heterogeneity_hu > 0 or lumps_share > 0:
        spread: float | Tensor = heterogeneity_hu
        if heterogeneity_hu == 0:
            spread = lumps_share * _mean_in(change[box.slices], inside).abs()
            spread = spread.clamp(max=MAX_LUMPS_HU)
        structure = structure + spread * _lumps(mask, diameter_mm, seed)
    structure = gaussian_filter(structure * mask, [STRUCTURE_SIGMA_MM] * 3)
    # subtract the mean, as soft at the outline as the change itself
    soft = gaussian_filter(mask.to(structure.dtype), [OUTLINE_SIGMA_MM] * 3)
    change[box.slices] += structure - soft * (_mean_in(structure, inside) / _mean_in(soft, inside))
    return change


def sample_lumps_share(seed: int, diameter_mm: float) -> float:
    """Return the standard deviation of a tumour's lumps over its contrast, where no prior sets it.

    Early tumours are even, large ones are not.

    Args:
        seed: of the tumour's noise.
        diameter_mm: equivalent diameter.
    """
    u = float(torch.rand((), generator=substream(seed, "heterogeneity"), dtype=torch.float64))
    low, high = LUMPS_FROM_MM
    growth = min(max((diameter_mm - low) / (high - low), 0.0), 1.0)
    return growth * _interpolate(LUMPS_OVER_CONTRAST, u)


def _mean_in(values: Tensor, inside: Tensor) -> Tensor:
    """Mean of the voxels of a mask, without a host-device synchronisation."""
    return (values * inside).sum() / inside.sum().clamp(min=1)


def _rim_and_core(mask: Tensor, structure_hu: tuple[float, float], seed: int) -> Tensor:
    rim_hu, core_hu = structure_hu
    structure = torch.zeros_like(mask, dtype=torch.float32)
    if structure_hu == (0.0, 0.0):
        return structure
    depth = _depth(mask)
    if rim_hu != 0:
        stream = substream(seed, "rim")
        uneven = 1 + RIM_VARIATION * _smooth_noise(mask, RIM_VARIATION_SIGMA_MM, stream)
        rim = torch.exp(-0.5 * ((depth - RIM_DEPTH_MM) / RIM_SIGMA_MM).square())
        structure = structure + rim_hu * uneven.clamp(min=0) * rim
    if core_hu != 0:
        stream = substream(seed, "structure")
        roughness = _smooth_noise(mask, CORE_ROUGHNESS_SIGMA_MM, stream)
        within = depth / depth.max() - CORE_DEPTH_SHARE + CORE_ROUGHNESS * roughness
        structure = structure + core_hu * torch.sigmoid(within / CORE_EDGE_SHARE)
    return structure


def _lumps(mask: Tensor, diameter_mm: float, seed: int) -> Tensor:
    """Coarse and fine lumps with standard deviation 1."""
    smallest, largest = LUMP_SIGMA_MM
    sigma, stream = LUMP_SIGMA_SHARE * diameter_mm, substream(seed, "lumps")
    sigma = min(max(sigma, smallest), largest)
    coarse, fine = (_smooth_noise(mask, mm, stream) for mm in (sigma, FINE_SIGMA_SHARE * sigma))
    return (coarse + 0.5 * fine) / math.hypot(1, 0.5)


def _smooth_noise(mask: Tensor, sigma_mm: float, stream: torch.Generator) -> Tensor:
    """Filtered noise with standard deviation 1, on the mask's device but drawn on the CPU."""
    return onto(filtered_noise(mask.shape, stream, [sigma_mm] * 3), mask.device)


def _depth(mask: Tensor) -> Tensor:
    """Depth below the outline in voxels: how many erosions a voxel survives, 0 outside."""
    outside, depth = (~mask).float()[None, None], torch.zeros_like(mask, dtype=torch.float32)
    for layer in range(MAX_DEPTH_VOXELS):
        depth += 1 - outside[0, 0]
        # alternating cubes and diamonds approximates a ball
        if layer % 2:
            outside = grown(outside, 1)
        else:
            crosses = [
                F.max_pool3d(outside, kernel, 1, padding) for kernel, padding in CROSS_KERNELS
            ]
            outside = torch.stack(crosses).amax(0)
        if bool(outside.all()):
            break
    return depth


def _interpolate(hu_range: HURange, share: float) -> float:
    low, high = hu_range
    return low + (high - low) * share


_LIVER = ContrastPrior(
    "liver-portal",
    hypo=(-60.0, -20.0),
    iso=(-8.0, 8.0),
    hyper=(10.0, 35.0),
    shares=(0.85, 0.1, 0.05),
    rim_share=0.15,
    core_share=0.5,
    heterogeneity=(2.0, 12.0),
    reference_hu=110.0,
)
_KIDNEY = ContrastPrior(
    "kidney-portal",
    hypo=(-110.0, -40.0),
    iso=(-12.0, 12.0),
    hyper=(10.0, 35.0),
    shares=(0.95, 0.05, 0.0),
    rim_share=0.1,
    core_share=0.5,
    heterogeneity=(2.0, 20.0),
    reference_hu=170.0,
)
_PANCREAS = replace(
    _LIVER,
    name="pancreas-portal",
    hypo=(-50.0, -15.0),
    hyper=(10.0, 40.0),
    rim_share=0.05,
    core_share=0.3,
    reference_hu=95.0,
)
CONTRAST_PRIORS: dict[str, ContrastPrior] = {
    prior.name: prior
    for prior in (
        _LIVER,
        replace(
            _LIVER,
            name="liver-arterial",
            hypo=(-40.0, -12.0),
            hyper=(15.0, 50.0),
            shares=(0.5, 0.15, 0.35),
            rim=(10.0, 35.0),
            rim_share=0.25,
            heterogeneity=(6.0, 25.0),
            reference_hu=70.0,
        ),
        replace(
            _LIVER,
            name="liver-unenhanced",
            hypo=(-25.0, -8.0),
            shares=(0.8, 0.2, 0.0),
            rim_share=0.0,
            core_hu=(-15.0, -6.0),
            heterogeneity=(0.0, 4.0),
            reference_hu=55.0,
        ),
        _KIDNEY,
        replace(
            _KIDNEY,
            name="kidney-arterial",
            hypo=(-70.0, -20.0),
            hyper=(10.0, 50.0),
            shares=(0.65, 0.1, 0.25),
            reference_hu=130.0,
        ),
        replace(
            _KIDNEY,
            name="kidney-unenhanced",
            hypo=(-12.0, -5.0),
            iso=(-5.0, 8.0),
            hyper=(8.0, 25.0),
            shares=(0.3, 0.5, 0.2),
            rim_share=0.0,
            core_hu=(-12.0, -5.0),
            heterogeneity=(0.0, 4.0),
            reference_hu=33.0,
        ),
        _PANCREAS,
        replace(
            _PANCREAS,
            name="pancreas-arterial",
            hypo=(-60.0, -20.0),
            hyper=(20.0, 60.0),
            shares=(0.85, 0.05, 0.1),
            reference_hu=105.0,
        ),
        replace(
            _PANCREAS,
            name="pancreas-unenhanced",
            hypo=(-12.0, -4.0),
            iso=(-5.0, 5.0),
            shares=(0.5, 0.5, 0.0),
            rim_share=0.0,
            core_hu=(-12.0, -5.0),
            heterogeneity=(0.0, 4.0),
            reference_hu=40.0,
        ),
    )
}
