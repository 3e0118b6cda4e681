"""Check that an image can be in the scale that the user names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.intensity import HU, Intensity
from tumorsynth.intensity_check.landmarks import Histogram
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
    organ = None
    if label is not None:
        image, label, organ_labels = sampled_on_cpu(image, label, organ_labels)
        organ = partial(sample_organ, image, label, organ_labels)
    values = sample_voxels(image)
    if not isinstance(intensity, HU):
        if (problem := scale_problem(values, intensity)) is not None:
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


def scale_problem(values: NDArray[np.float32], intensity: Intensity) -> str | None:
    """Return what shows that sorted values are not in the scale ``intensity``, or None."""
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
    histogram = Histogram(all_hu)
    marks = histogram.landmarks() or histogram.window_landmarks()
    if marks is not None and contradicts_hu(histogram, marks, ends):
        return (
            f"would put fat at {marks.fat:.0f} HU and soft tissue at {marks.tissue:.0f} HU, if "
            "these are the peaks of its histogram"
        )
    return None


def _in_hu(intensity: Intensity, value: float) -> float:
    return float(intensity.to_hu(torch.tensor(value, dtype=torch.float64)))
