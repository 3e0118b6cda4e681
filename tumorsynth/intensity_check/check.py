"""Check that an image can be in the scale that the user names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.fetching import Task, run_alone
from tumorsynth.intensity import HU, Intensity
from tumorsynth.intensity_check.landmarks import MIN_CLIPPED, Histogram
from tumorsynth.intensity_check.rules import MIN_VALUES, find_fault, is_ct
from tumorsynth.intensity_check.scales import AIR_HU, contradicts_hu
from tumorsynth.intensity_check.shares import (
    RARE,
    Sample,
    Shares,
    describe,
    sample_organ,
    sample_voxels,
    sampled_on_cpu,
)

MAX_MEDIAN_HU = 1500.0  # |HU| of half of a crop: no organ reaches it
MIN_SPAN_HU = 60.0  # of nearly all values that are not one fluid
MIN_EVEN_HU = 5.0  # of nearly all values besides padding; one denoised fluid spans 6
LOW_CLIP_HU, HIGH_CLIP_HU = 20.0, 45.0  # nobody clips HU above the one, or at less than the other
MIN_BESIDE_ORGAN = 0.05  # share of voxels with tissue besides the organ
BEYOND_LIMITS = 0.05  # of a scale's width: interpolation and noise after scaling


def check_intensity(
    image: Tensor,
    intensity: Intensity,
    label: Tensor | None = None,
    organ_labels: Sequence[int] = (),
) -> None:
    """Check that an image can be in the scale that the user names.

    Args:
        image: (X, Y, Z), floating point; one host-device synchronisation.
        intensity: what its values are said to mean.
        label: same shape; None if it is not known.
        organ_labels: label values of the organ.

    Raises:
        ValueError: if they clearly mean something else.
    """
    run_alone(checking_intensity(image, intensity, label, organ_labels))


def checking_intensity(
    image: Tensor, intensity: Intensity, label: Tensor | None, organ_labels: Sequence[int]
) -> Task[None]:
    """Return `check_intensity` as a task."""
    organ = None
    if label is not None:
        image, label, organ_labels = yield from sampled_on_cpu(image, label, organ_labels)
        organ = partial(sample_organ, image, label, organ_labels)
    values = sample_voxels(image)
    if not isinstance(intensity, HU):
        if (problem := scale_problem(values, intensity, organ)) is not None:
            raise ValueError(
                f"image must be in the scale of intensity={intensity!r}, but its values, "
                f"{describe(values)}, {problem}; pass intensity=HU() for Hounsfield units, or the "
                "numbers that the image was scaled with"
            )
    elif (fault := find_fault(values, organ)) is not None:
        fix = f"pass intensity={fault.intensity}" if fault.intensity else fault.conversion
        raise ValueError(
            f"image must be in Hounsfield units with intensity=HU(), but its values, "
            f"{describe(values)}, {fault.found}; {fix}"
        )


def scale_problem(
    values: NDArray[np.float32],
    intensity: Intensity,
    organ: Callable[[], NDArray[np.float32]] | None = None,
) -> str | None:
    """Return what shows that values are not in a scale, or None.

    Args:
        values: of `sample_voxels`.
        intensity: the scale.
        organ: returns those of them under the organ's label; None if it is not known.
    """
    if len(values) < MIN_VALUES:
        return None
    raw = Shares(values)
    inner = raw.without_padding()
    if len(inner.values) < MIN_VALUES:
        inner = raw
    limits = intensity.limits or (-math.inf, math.inf)
    tolerance = BEYOND_LIMITS * min(limits[1] - limits[0], 1e9)
    beyond = inner.below(limits[0] - tolerance) + inner.above(limits[1] + tolerance)
    offset = _in_hu(intensity, 0.0)
    hu, all_hu = (shares.mapped(intensity.hu_per_unit, offset) for shares in (inner, raw))
    low, high = hu.quantiles(0.25, 0.75)
    is_identity = abs(_in_hu(intensity, -1000.0) + 1000) <= 200
    is_hu = not is_identity and is_ct(Sample(raw, raw.without_padding()))
    if is_hu or hu.share(-MAX_MEDIAN_HU, MAX_MEDIAN_HU) < 0.5:
        return f"would be {low:.3g} to {high:.3g} HU in the middle half"
    if beyond > RARE:
        return f"lie beyond the {limits[0]:.4g} to {limits[1]:.4g} to which it clips"
    if is_identity:  # the way out
        return None
    ends = _in_hu(intensity, limits[0]), _in_hu(intensity, limits[1])
    least, most = all_hu.quantiles(0.005, 0.995)
    if 0 < most - least < MIN_SPAN_HU and most > AIR_HU + 60:  # scanners clip at air
        for end, limit in zip((least, most), ends, strict=True):
            if all_hu.share(end, end) > 0.02 and abs(end - limit) > 1:
                return f"would be {least:.4g} to {most:.4g} HU, clipped at {end:.4g} HU"
    if (problem := _uses_other_range(raw, inner, intensity, ends, organ)) is not None:
        return problem
    histogram = Histogram(all_hu)
    marks = histogram.landmarks() or histogram.window_landmarks()
    if marks is not None and contradicts_hu(histogram, marks, ends):
        return (
            f"would put fat at {marks.fat:.0f} HU and soft tissue at {marks.tissue:.0f} HU, if "
            "these are the peaks of its histogram"
        )
    return None


def _uses_other_range(
    raw: Shares,
    inner: Shares,
    intensity: Intensity,
    ends_hu: tuple[float, float],
    organ: Callable[[], NDArray[np.float32]] | None,
) -> str | None:
    """Return what shows that values were scaled to a part of the range that is said, or None.

    Args:
        raw: all values.
        inner: those that are no padding.
        intensity: the scale.
        ends_hu: HU at its ends.
        organ: returns the values under the organ's label.
    """
    (low,), (high,) = raw.quantiles(RARE), inner.quantiles(1 - RARE)
    low_hu, high_hu = _in_hu(intensity, low), _in_hu(intensity, high)
    if low_hu > max(LOW_CLIP_HU, ends_hu[0] + 60) and raw.share(low, low) > MIN_CLIPPED:
        # or 0 beside an organ that was cut out
        rest = raw.above(low) * len(raw.values)
        rest -= Shares(organ()).above(low) * len(organ()) if organ is not None else rest
        if rest > MIN_BESIDE_ORGAN * len(raw.values):
            return f"would be {low_hu:.4g} HU and more, clipped above the level of fluids"
    at_high = inner.share(high, high)
    if high_hu < min(HIGH_CLIP_HU, ends_hu[1] - 60) and high != 0 and at_high > RARE:
        # or padding, which no other values lie near
        near = inner.share(high - 100 / intensity.hu_per_unit, high) - at_high
        if near > 0.5 * at_high:
            return f"would be {high_hu:.4g} HU and less, clipped below the level of organs"
    least, most = (_in_hu(intensity, end) for end in inner.quantiles(0.005, 0.995))
    if 0 < most - least < MIN_EVEN_HU and most > AIR_HU + 60:
        return f"would be {least:.4g} to {most:.4g} HU, more even than any tissue"
    return None


def _in_hu(intensity: Intensity, value: float) -> float:
    return float(intensity.to_hu(torch.tensor(value, dtype=torch.float64)))
