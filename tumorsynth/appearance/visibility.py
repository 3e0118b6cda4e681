"""Visibility: a tumour's contrast over the noise of its scan, for the tumour's size.

The Rose model (A. Rose, J. Opt. Soc. Am. 38, 196, 1948; A. E. Burgess, J. Opt. Soc. Am. A 16, 633,
1999): a disc in white noise is seen with the signal-to-noise ratio

    visibility = |contrast| / noise x sqrt(area / area of one independent noise sample)

and is told from the noise with certainty from 5 on (the Rose criterion). The area is that of the
tumour's section in the orthogonal plane of the finest grain, which shows it best: that of a ball of
its volume and, in thick slices, not more than the largest section that one slice shows. Filters and
interpolation correlate neighbouring voxels, so that an independent sample is wider than a voxel:
the noise of a Gaussian filter of standard deviation s is correlated over 2 sqrt(pi) s along an
axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tumorsynth.appearance.noise import GRAIN_PER_NOISE_SIGMA, ScanNoise, measure_noise
from tumorsynth.arguments import format_beside
from tumorsynth.geometry import Frame, Rows3
from tumorsynth.placement.rasterize import equivalent_diameter
from tumorsynth.subvoxels import subvoxel_factors

VISIBLE_FROM = 5.0  # the Rose criterion; 28 of 30 annotated tumours are above


class FaintTumorWarning(UserWarning):
    """A synthetic tumour is hardly visible over the noise of its scan."""


def faint_warning(visibility: float, diameter_mm: float) -> str:
    """Return the words of the warning about a tumour that is hardly visible."""
    found = format_beside(visibility, [VISIBLE_FROM])
    return (
        f"a synthetic tumour of {diameter_mm:.1f} mm is hardly visible over the scan's noise: its "
        f"visibility must be {VISIBLE_FROM:g} or more, got {found}; set a stronger contrast_hu or "
        "a larger size_mm, or gate=True to skip such tumours (this warning comes "
        "once; the report has the visibility of every tumour)"
    )


def section_mm2(tumor_mask: Tensor, diameter_mm: float, spacing: Sequence[float]) -> float:
    """Return the area of a tumour's largest section: a ball's, or what thick slices show of it.

    Args:
        tumor_mask: bool, (X, Y, Z).
        diameter_mm: equivalent diameter.
        spacing: mm per voxel.
    """
    ball, thickest = math.pi / 4 * diameter_mm**2, max(spacing)
    if max(subvoxel_factors(spacing, diameter_mm)) == 1:
        return ball
    across = [axis for axis in range(3) if spacing[axis] > 0.99 * thickest]
    voxels = max(
        int(tumor_mask.sum([other for other in range(3) if other != axis]).max()) for axis in across
    )
    return min(ball, voxels * math.prod(spacing) / thickest)


def visibility(
    contrast_hu: float, section_mm2: float, noise: ScanNoise, spacing: Sequence[float]
) -> float | None:
    """Return the visibility of a tumour; None where the noise could not be measured.

    Args:
        contrast_hu: mean of the tumour's voxels minus the level of the tissue around.
        section_mm2: of the tumour.
        noise: of the tissue around.
        spacing: mm per voxel.
    """
    unit = contrast_for(1.0, section_mm2, noise, spacing)
    return None if unit is None or not math.isfinite(contrast_hu) else abs(contrast_hu) / unit


def is_faint(visibility: float | None) -> bool:
    """Whether a tumour of this visibility is hardly visible; one that is not measured is not."""
    return visibility is not None and visibility < VISIBLE_FROM


def contrast_for(
    visibility: float, section_mm2: float, noise: ScanNoise, spacing: Sequence[float]
) -> float | None:
    """Return the absolute contrast in HU that gives a tumour a visibility; None as above."""
    if not noise.sd_hu:
        return None
    widths = (
        max(s, 2 * math.sqrt(math.pi) * grain / GRAIN_PER_NOISE_SIGMA)
        for s, grain in zip(spacing, noise.grain_mm, strict=True)
    )
    finest, second, _ = sorted(widths)
    samples = max(section_mm2 / (finest * second), 1.0)
    return visibility * noise.sd_hu / math.sqrt(samples)


def measure_visibility(
    hu: Tensor,
    tumor_mask: Tensor,
    around: Tensor,
    spacing: Sequence[float],
    shear: Rows3 | None = None,
) -> float | None:
    """Measure the visibility of a tumour that is in a scan, for example an annotated one.

    Args:
        hu: (X, Y, Z), the scan with the tumour and some tissue around it.
        tumor_mask: bool, same shape.
        around: bool, same shape: the tissue to compare with, without any tumour.
        spacing: mm per voxel.
        shear: of the scan's axes; see `tumorsynth.geometry.Frame`.
    """
    noise = measure_noise(hu, around, spacing)
    x, y, z = spacing
    volume_mm3 = int(tumor_mask.sum()) * Frame((x, y, z), shear=shear).voxel_mm3
    if noise.level_hu is None or volume_mm3 == 0:
        return None
    contrast = float(hu[tumor_mask].mean()) - noise.level_hu
    section = section_mm2(tumor_mask, equivalent_diameter(volume_mm3), spacing)
    return visibility(contrast, section, noise, spacing)
