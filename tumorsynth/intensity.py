"""Intensity scales: what a user's image values mean in Hounsfield units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tumorsynth.arguments import is_bool

# the window of the published generators and of those for abdominal organs (paper E.2), mapped to
# [0, 1]; a generator's own is ``generator.window``
HU_LOW, HU_HIGH = -175.0, 250.0
BONE_HU = 240.0  # tissue outside the organ counts as bone from here on


@runtime_checkable
class Intensity(Protocol):
    """An affine scale: HU = value x ``hu_per_unit`` + offset."""

    @property
    def hu_per_unit(self) -> float: ...

    @property
    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest value the scale can hold, in the user's units, where it clips."""

    def to_hu(self, image: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HU:
    """The image is in Hounsfield units."""

    @property
    def hu_per_unit(self) -> float:
        return 1.0

    @property
    def limits(self) -> None:
        return None

    def to_hu(self, image: Tensor) -> Tensor:
        return image


@dataclass(frozen=True)
class Scaled:
    """HU in [a_min, a_max] mapped linearly to [b_min, b_max], as MONAI's ScaleIntensityRange does.

    clip: values were clipped to [b_min, b_max] and shall stay inside.
    """

    a_min: float = -175.0
    a_max: float = 250.0
    b_min: float = 0.0
    b_max: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        values = (self.a_min, self.a_max, self.b_min, self.b_max)
        if not _numbers(*values) or not (self.a_min < self.a_max and self.b_min < self.b_max):
            raise ValueError(
                f"Scaled needs finite a_min < a_max (HU) and b_min < b_max, got {values}; "
                "pass the four numbers of the intensity scaling in front of this transform"
            )
        _check_unit("Scaled", self.hu_per_unit)

    @property
    def hu_per_unit(self) -> float:
        return (self.a_max - self.a_min) / (self.b_max - self.b_min)

    @property
    def limits(self) -> tuple[float, float] | None:
        return (self.b_min, self.b_max) if self.clip else None

    def to_hu(self, image: Tensor) -> Tensor:
        return (image - self.b_min) * self.hu_per_unit + self.a_min


@dataclass(frozen=True)
class ZScore:
    """(HU clipped to [low, high] - mean) / std, as nnU-Net's CTNormalization does.

    mean, std, low, high are in HU; low and high may be None when nothing was clipped.
    """

    mean: float
    std: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not (_numbers(self.mean, self.std) and self.std > 0):
            raise ValueError(
                f"ZScore needs a finite mean and a std > 0 in HU, got mean={self.mean}, "
                f"std={self.std}; take them from the dataset's fingerprint or plans"
            )
        _check_unit("ZScore", self.hu_per_unit)
        ends = [end for end in (self.low, self.high) if end is not None]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if (
            not all(isinstance(end, Real) and not is_bool(end) for end in ends) or not low < high
        ):  # NaN included
            raise ValueError(
                f"ZScore needs low < high in HU, got low={self.low}, high={self.high}; "
                "pass the values the image was clipped to, or None where it was not"
            )

    @property
    def hu_per_unit(self) -> float:
        return self.std

    @property
    def limits(self) -> tuple[float, float] | None:
        if self.low is None and self.high is None:
            return None
        low = -math.inf if self.low is None else (self.low - self.mean) / self.std
        high = math.inf if self.high is None else (self.high - self.mean) / self.std
        return low, high

    def to_hu(self, image: Tensor) -> Tensor:
        return image * self.std + self.mean


def _numbers(*values: Any) -> bool:
    """Numbers of a size that a HU or an image's value can have."""
    real: Any = Real
    return all(isinstance(v, real) and not is_bool(v) and -1e9 <= v <= 1e9 for v in values)


def _check_unit(kind: str, hu_per_unit: float) -> None:
    """Beyond these a change of a tumour's size is lost, or too large for the image's numbers."""
    if not 1e-6 <= hu_per_unit <= 1e9:
        raise ValueError(
            f"{kind} must make one unit of the image 1e-6 to 1e9 HU, got {hu_per_unit:g}; pass the "
            "numbers that the image was scaled with"
        )
