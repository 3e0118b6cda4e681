"""Intensity scales: what a user's image values mean in Hounsfield units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tumorsynth.arguments import is_bool, keywords_of

# HU that are 0 and 1 for the published generators and those for abdominal organs (paper E.2);
# other generators have their own ``window``
HU_LOW, HU_HIGH = -175.0, 250.0
BONE_HU = 240.0  # tissue outside the organ counts as bone from here on

HU_PER_UNIT_RANGE = (1e-6, 1e9)  # beyond, an image's numbers cannot hold a tumour's change
MAX_VALUE = 1e9  # of the numbers that define a scale


@runtime_checkable
class Intensity(Protocol):
    """An affine scale: HU = value x ``hu_per_unit`` + offset."""

    @property
    def hu_per_unit(self) -> float:
        """HU in one unit of the image."""

    @property
    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest value the scale can hold, in image units; None if it does not clip."""

    def to_hu(self, image: Tensor) -> Tensor:
        """Return an image in HU, in its own dtype."""


@keywords_of()
@dataclass(frozen=True)
class HU:
    """The image is in Hounsfield units.

    Examples:
        >>> synth = ts.SynthesizeTumor(intensity=ts.HU())
    """

    @property
    def hu_per_unit(self) -> float:
        """HU in one unit of the image: 1."""
        return 1.0

    @property
    def limits(self) -> None:
        """None: nothing is clipped."""
        return None

    def to_hu(self, image: Tensor) -> Tensor:
        """Return the image itself."""
        return image


@keywords_of()
@dataclass(frozen=True)
class Scaled:
    """HU in [a_min, a_max] mapped linearly to [b_min, b_max], as MONAI's ScaleIntensityRange does.

    Args:
        a_min: HU that become ``b_min``.
        a_max: HU that become ``b_max``.
        b_min: lower end of the image's range.
        b_max: upper end of the image's range.
        clip: whether values are clipped to [b_min, b_max]; synthetic tumours then stay inside too.

    Raises:
        ValueError: unless a_min < a_max and b_min < b_max, all finite.

    Examples:
        >>> synth = ts.SynthesizeTumor(intensity=ts.Scaled(-175, 250, 0, 1))
    """

    a_min: float = -175.0
    a_max: float = 250.0
    b_min: float = 0.0
    b_max: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        values = (self.a_min, self.a_max, self.b_min, self.b_max)
        if not _are_numbers(*values) or not (self.a_min < self.a_max and self.b_min < self.b_max):
            raise ValueError(
                f"Scaled needs finite a_min < a_max (HU) and b_min < b_max, got {values}; "
                "pass the four numbers of the intensity scaling in front of this transform"
            )
        _check_unit("Scaled", self.hu_per_unit)

    @property
    def hu_per_unit(self) -> float:
        """HU in one unit of the image."""
        return (self.a_max - self.a_min) / (self.b_max - self.b_min)

    @property
    def limits(self) -> tuple[float, float] | None:
        """(b_min, b_max), or None without ``clip``."""
        return (self.b_min, self.b_max) if self.clip else None

    def to_hu(self, image: Tensor) -> Tensor:
        """Return an image in HU."""
        return (image - self.b_min) * self.hu_per_unit + self.a_min


@keywords_of()
@dataclass(frozen=True)
class ZScore:
    """(HU clipped to [low, high] - mean) / std, as nnU-Net's CTNormalization does.

    Args:
        mean: in HU.
        std: in HU.
        low: HU that the image was clipped to from below; None if it was not.
        high: HU that the image was clipped to from above; None if it was not.

    Raises:
        ValueError: unless mean is finite, std > 0 and low < high.

    Examples:
        >>> synth = ts.SynthesizeTumor(intensity=ts.ZScore(mean=100, std=40, low=-160, high=240))
    """

    mean: float
    std: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not (_are_numbers(self.mean, self.std) and self.std > 0):
            raise ValueError(
                f"ZScore needs a finite mean and a std > 0 in HU, got mean={self.mean}, "
                f"std={self.std}; take them from the dataset's fingerprint or plans"
            )
        _check_unit("ZScore", self.hu_per_unit)
        ends = [end for end in (self.low, self.high) if end is not None]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        real: Any = Real
        numbers = all(isinstance(end, real) and not is_bool(end) for end in ends)
        # "not low < high" refuses NaN, too; a whole number may be larger than any float
        if not numbers or not low < high or any(1e300 < abs(end) != math.inf for end in ends):
            raise ValueError(
                f"ZScore needs low < high in HU, got low={self.low}, high={self.high}; "
                "pass the values the image was clipped to, or None where it was not"
            )

    @property
    def hu_per_unit(self) -> float:
        """HU in one unit of the image: the standard deviation."""
        return self.std

    @property
    def limits(self) -> tuple[float, float] | None:
        """Normalised ``low`` and ``high``, or None if nothing was clipped."""
        if self.low is None and self.high is None:
            return None
        low = -math.inf if self.low is None else (self.low - self.mean) / self.std
        high = math.inf if self.high is None else (self.high - self.mean) / self.std
        return low, high

    def to_hu(self, image: Tensor) -> Tensor:
        """Return an image in HU."""
        return image * self.std + self.mean


def _are_numbers(*values: Any) -> bool:
    """Whether all are finite numbers of a plausible size."""
    real: Any = Real
    return all(
        isinstance(v, real) and not is_bool(v) and -MAX_VALUE <= v <= MAX_VALUE for v in values
    )


def _check_unit(kind: str, hu_per_unit: float) -> None:
    low, high = HU_PER_UNIT_RANGE
    if not low <= hu_per_unit <= high:
        raise ValueError(
            f"{kind} must make one unit of the image 1e-6 to 1e9 HU, got {hu_per_unit!r}; pass the "
            "numbers that the image was scaled with"
        )
