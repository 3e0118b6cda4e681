"""Check whether an image can be in Hounsfield units; if it is not, say what it is.

A sample of the voxels decides, so that the check costs the same for any volume. It looks for what
every CT has: air at -1000, fat at -100, soft tissue at 0 to 200, hardly anything from -450 to -200.
Each rule is about shares of the voxels, never about the highest or the lowest one: a single bright
voxel changes nothing. Where the values allow for HU (a liver alone at HU / 10 may be a cyst), the
check stays silent, and so it does for an image of one value, such as padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.intensity import HU, Intensity

MAX_SAMPLED = 2**14  # voxels of an image that are looked at, evenly spaced
MIN_VALUES = 1000  # voxels besides padding; fewer cannot tell
PADDING_SHARE = 0.005  # of voxels with exactly the lowest value, or 0: from here on, padding
RARE = 0.003  # share of voxels that metal, motion and noise take
WRAPPED_NOISE = 2.0**16 - 50  # 16-bit numbers from here on are negative noise
CT_RANGE_HU = (-1100.0, 3200.0)
MAX_MEDIAN_HU = 1500.0  # |HU| of half of a crop: no organ reaches it
# upper ends of windows from -1000 HU on: each 5 % wider than the one before
BYTE_WINDOW_ENDS_HU = tuple(1400 * 1.05**k - 1000 for k in range(23))


@dataclass(frozen=True)
class Fault:
    """What values are instead of HU, and what to do.

    Args:
        kind: short name.
        found: what the values look like.
        conversion: how to make HU of them.
        intensity: the Python argument to pass; empty if none describes them.
        option: the same for the command line.
    """

    kind: str
    found: str
    conversion: str
    intensity: str = ""
    option: str = ""


def _scaled(kind: str, found: str, conversion: str, *numbers: float) -> Fault:
    python, option = (sep.join(f"{n:g}" for n in numbers) for sep in (", ", ","))
    return Fault(kind, found, conversion, f"ts.Scaled({python})", f"--intensity={option}")


_NUMBERS = "with the numbers of your scaling, for example"
_UNKNOWN = "give the CT in HU"
DIVIDED = {
    by: _scaled(
        f"HU/{by}",
        f"look like HU divided by {by}, with air at {-1000 / by:g}",
        f"multiply them by {by}",
        -4000, 4000, -4000 / by, 4000 / by,
    )
    for by in (10, 100, 1000)
}  # fmt: skip
SHIFTED = _scaled(
    "HU+1024",
    "look like HU + 1024 (some devices: + 1000), with soft tissue at 1070",
    "subtract 1024",
    -1024, 3071, 0, 4095,
)  # fmt: skip
OFFSET = _scaled(
    "HU+32768", "look like HU + 32768", "subtract 32768", -1024, 3071, 31744, 35839
)  # fmt: skip
WRAPPED = Fault(
    "unsigned",
    "look like signed numbers read as unsigned ones, with air at 64536",
    "read them as int16, or subtract 65536 from those above 32767",
)
FLIPPED = Fault(
    "sign",
    "look like HU with their sign changed, with air at the bright end",
    "multiply them by -1",
)
UNIT = Fault(
    "[0, 1]",
    "lie in [0, 1], so the CT is scaled",
    _UNKNOWN,
    f"ts.Scaled(a_min, a_max, 0, 1) {_NUMBERS} ts.Scaled(-175, 250, 0, 1)",
    f"--intensity=HU_LOW,HU_HIGH,0,1 {_NUMBERS} -175,250,0,1",
)
SYMMETRIC = Fault(
    "[-1, 1]",
    "lie in [-1, 1], so the CT is scaled",
    _UNKNOWN,
    f"ts.Scaled(a_min, a_max, -1, 1) {_NUMBERS} ts.Scaled(-175, 250, -1, 1), or -1000, 1000 where "
    "it is HU / 1000",
    f"--intensity=HU_LOW,HU_HIGH,-1,1 {_NUMBERS} -175,250,-1,1, or -1000,1000,-1,1 where it is "
    "HU / 1000",
)
Z_SCORES = Fault(
    "z-scores",
    "look like z-scores or scaled otherwise",
    _UNKNOWN,
    "ts.ZScore(mean, std, low, high) or ts.Scaled(a_min, a_max, b_min, b_max) with the numbers of "
    "your scaling",
    "--intensity=A,B,-10,10 with, for z-scores, A = mean - 10 std and B = mean + 10 std in HU",
)
BYTES = Fault(
    "0-255",
    "look like a CT windowed to 0 to 255",
    _UNKNOWN,
    f"ts.Scaled(a_min, a_max, 0, 255) {_NUMBERS} ts.Scaled(-160, 240, 0, 255)",
    f"--intensity=HU_LOW,HU_HIGH,0,255 {_NUMBERS} -160,240,0,255",
)
NOT_CT = Fault(
    "no CT",
    "are all positive, with neither air at -1000 nor fat at -100, as in MR",
    "tumorsynth is for CT, not for MR; if it is a CT, give it in HU",
)
LABEL_MAP = Fault(
    "label map", "are few whole numbers, as in a label map", "give the CT as the image"
)
NO_TISSUE = Fault(
    "no tissue",
    "lie where no tissue does",
    "give the CT in HU: subtract what was added to them, or undo a change of sign",
)


class Shares:
    """Values in order, for shares and quantiles.

    Args:
        values: finite, one-dimensional, sorted.
    """

    def __init__(self, values: NDArray[np.float32]):
        self.values = values

    def share(self, low: float, high: float) -> float:
        """Return the share of values with low <= value <= high."""
        first = np.searchsorted(self.values, np.float32(low), "left")
        last = np.searchsorted(self.values, np.float32(high), "right")
        return float(last - first) / max(1, len(self.values))

    def below(self, limit: float) -> float:
        """Return the share of values below a limit."""
        return self.share(-math.inf, np.nextafter(np.float32(limit), np.float32(-math.inf)))

    def above(self, limit: float) -> float:
        """Return the share of values above a limit."""
        return self.share(np.nextafter(np.float32(limit), np.float32(math.inf)), math.inf)

    def quantiles(self, *at: float) -> list[float]:
        return [float(self.values[round(q * (len(self.values) - 1))]) for q in at]

    def mapped(self, slope: float, offset: float = 0.0) -> Shares:
        """Return slope x value + offset."""
        values = self.values * np.float32(slope) + np.float32(offset)
        return Shares(values if slope > 0 else values[::-1])

    def without_padding(self) -> Shares:
        """Return the values without those of the lowest one, and of 0, where they are many.

        A lowest value from lung to fat is none: HU are clipped there.
        """
        (lowest,), values = self.quantiles(RARE), self.values
        for padding in (0.0,) if -950 < lowest < -50 else (lowest, 0.0):
            at = np.float32(padding)
            first, last = (np.searchsorted(values, at, side) for side in ("left", "right"))
            if last - first >= PADDING_SHARE * len(values):
                values = np.concatenate([values[:first], values[last:]])
        return Shares(values)


@dataclass(frozen=True)
class Sample:
    """Sampled values of an image: all of them, and those that are no padding."""

    all: Shares
    inner: Shares

    def mapped(self, slope: float, offset: float = 0.0) -> Sample:
        """Return slope x value + offset."""
        return Sample(self.all.mapped(slope, offset), self.inner.mapped(slope, offset))


def check_intensity(image: Tensor, intensity: Intensity) -> None:
    """Check that an image can be in the scale that the user names.

    Args:
        image: (X, Y, Z), floating point; one host-device synchronisation.
        intensity: what its values are said to mean.

    Raises:
        ValueError: if they clearly mean something else.
    """
    values = sample_voxels(image)
    if not isinstance(intensity, HU):
        _check_scale(values, intensity)
    elif (fault := find_fault(values)) is not None:
        fix = f"pass intensity={fault.intensity}" if fault.intensity else fault.conversion
        raise ValueError(
            f"image must be in Hounsfield units with intensity=HU(), but its values, "
            f"{describe(values)}, {fault.found}; {fix}"
        )


def sample_voxels(image: Tensor) -> NDArray[np.float32]:
    """Return the sorted finite values of at most MAX_SAMPLED voxels, evenly spaced.

    Args:
        image: (X, Y, Z), any real dtype and device.
    """
    steps, counts = [1, 1, 1], list(image.shape)
    while math.prod(counts) > MAX_SAMPLED:
        axis = counts.index(max(counts))
        steps[axis] *= 2
        counts[axis] = -(-(image.shape[axis] - steps[axis] // 2) // steps[axis])
    x, y, z = (slice(step // 2, None, step) for step in steps)
    values: NDArray[np.float32] = image[x, y, z].to(torch.float32).flatten().cpu().numpy()
    return np.sort(values[np.isfinite(values)])


def describe(values: NDArray[np.float32]) -> str:
    """Return in words where most of the sorted values lie."""
    low, high = Shares(values).quantiles(0.01, 0.99)
    return f"98 % of them from {low:.4g} to {high:.4g}"


def find_fault(values: NDArray[np.float32]) -> Fault | None:
    """Return what sorted finite values are if they cannot be HU; None if they can.

    Args:
        values: of `sample_voxels`.
    """
    if len(values) < MIN_VALUES:
        return None
    if values[-1] > WRAPPED_NOISE:  # of air at 0, in unsigned numbers
        values = np.sort(np.where(values > WRAPPED_NOISE, values - 2**16, values))
    whole = Shares(values)
    sample = Sample(whole, whole.without_padding())
    if _is_label_map(whole):
        return LABEL_MAP
    if len(sample.inner.values) < MIN_VALUES or _is_ct(sample):
        return None
    return next(_faults(sample), None)


def _faults(sample: Sample) -> Iterator[Fault]:
    """Yield what the values of an image without air at -1000 can be, the surest first."""
    whole, inner = sample.all, sample.inner
    fractional = _has_fractions(inner)
    if fractional and _is_tiny(inner):
        yield _name_tiny(sample)
    for by in (100, 10):
        if _is_ct(sample.mapped(by)) and not _is_clipped_at_fat(sample):
            yield DIVIDED[by]
    if fractional and _is_fat_and_tissue(inner.mapped(10)):
        yield DIVIDED[10]
    if inner.share(860, 980) > 0.005 and _is_ct(sample.mapped(1, -1024)):  # fat, too
        yield SHIFTED
    if whole.share(600, 1040) > 0.07 and _is_ct(sample.mapped(-1)):  # more than bone
        yield FLIPPED
    if whole.share(64000, 65536) > PADDING_SHARE:
        yield WRAPPED
    if inner.above(20000) > 0.9:
        yield OFFSET
    if inner.share(880, 1300) > 0.5 and inner.above(1040) > 0.05 and inner.below(500) < RARE:
        yield SHIFTED
    if _is_clipped_and_flipped(whole):
        yield FLIPPED
    if whole.below(0) < RARE:
        if whole.above(255.01) < RARE:
            if whole.share(254.99, 255.01) >= RARE or _is_wide_window(inner):
                yield BYTES
        if _is_positive(whole, inner):
            yield NOT_CT
    (middle,) = inner.quantiles(0.5)
    if not -1100 < middle < 800:
        yield NO_TISSUE


def _is_ct(sample: Sample) -> bool:
    """Whether there is air or lung, and tissue, and hardly anything between the two."""
    hu = sample.all
    air, tissue = hu.share(-1040, -600), hu.share(-150, 250)
    if air < 0.04 or tissue < 0.1 or hu.above(400) > 0.4 * tissue:
        return False
    (lowest,) = hu.quantiles(RARE)
    if -940 < lowest < -500 and hu.share(lowest, lowest) > RARE:  # CT is not clipped there
        return False
    if hu.share(-450, -200) / 250 > 0.5 * min(air / 440, tissue / 400):
        return False
    return sample.inner.share(*CT_RANGE_HU) > 1 - RARE


def _is_label_map(whole: Shares) -> bool:
    """Whether the values are 0, 1, 2 and 3, but for a few."""
    marked = sum(whole.share(value, value) for value in (1, 2, 3))
    return marked > 0.02 and 1 - marked - whole.share(0, 0) < RARE


def _is_clipped_at_fat(sample: Sample) -> bool:
    """Whether this may be HU clipped at -100, as some clip an abdomen, with tissue above."""
    at_lowest = sample.all.share(-100.001, -99.999)
    return at_lowest > RARE and sample.inner.above(25) > 0.1 * sample.inner.share(-15, 25)


def _has_fractions(values: Shares) -> bool:
    """Whether more than rare values are no whole numbers."""
    return float((values.values != np.rint(values.values)).mean()) > RARE


def _is_tiny(inner: Shares) -> bool:
    """Whether values with fractions are so small that not even a fluid is as even in HU."""
    low, high = inner.quantiles(0.005, 0.995)
    if not -12 <= low < high <= 12:
        return False
    first, third = inner.quantiles(0.25, 0.75)
    return third - first < 1.6 or not _is_normal(inner)  # denoised CT has an SD of more than 1.2


def _is_normal(values: Shares) -> bool:
    """Whether values are about normally distributed, as noise in one fluid is."""
    lowest, low, first, middle, third, high, highest = values.quantiles(
        0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995
    )
    quartiles = third - first
    if quartiles <= 0 or abs(low + high - 2 * middle) > 0.15 * (high - low):
        return False
    return 3.2 < (highest - lowest) / quartiles < 5 and 2 < (high - low) / quartiles < 3


def _name_tiny(sample: Sample) -> Fault:
    """Return what tiny values are."""
    too_low, too_high = sample.all.below(-1.0001), sample.all.above(1.0001)
    if too_high < RARE and sample.all.below(0) < RARE:
        return UNIT
    if too_high < RARE and too_low < RARE and sample.all.share(-1.0001, -0.9999) > RARE:
        return SYMMETRIC
    for by in (1000, 100):
        if _is_ct(sample.mapped(by)):
            return DIVIDED[by]
    return SYMMETRIC if too_high < RARE and too_low < RARE else Z_SCORES


def _is_fat_and_tissue(hu: Shares) -> bool:
    """Whether fat and soft tissue stand apart, and all values lie near them."""
    fat, tissue, between = hu.share(-130, -70), hu.share(0, 130), hu.share(-50, -10)
    if fat < 0.1 or tissue < 0.15 or between / 40 > 0.5 * min(fat / 60, tissue / 130):
        return False
    if hu.share(25, 130) < 0.5 * tissue:
        return False
    low, most, high = hu.quantiles(0.005, 0.95, 0.995)
    return low > -160 and most < 300 and high < 1300


def _is_clipped_and_flipped(whole: Shares) -> bool:
    """Whether the highest value is that of air, clipped, and the tissue lies below 0."""
    lowest, top = whole.quantiles(RARE, 1 - RARE)
    at_lowest, at_top = whole.share(lowest, lowest), whole.share(top, top)
    if not 100 <= top <= 1100 or at_top < 0.05 or at_lowest > 0.3 * at_top:
        return False
    below = whole.share(0.8 * top, top) - at_top
    tissue = whole.share(-250, -10) - at_lowest
    return below < 0.1 * at_top and tissue > max(0.5, 0.8 - at_top) * (1 - at_top)


def _is_wide_window(inner: Shares) -> bool:
    """Whether values from 0 to 255 show lung and tissue in a wide window."""
    (highest,) = inner.quantiles(1 - RARE)
    if inner.share(highest, highest) > RARE:  # HU clipped at 0 and there
        return False
    if inner.share(0, 400 * 255 / (BYTE_WINDOW_ENDS_HU[0] + 1000)) < 0.05:  # no air in any
        return False
    near_air = inner.share(0, 6) > 0.01 and inner.share(20, 51) > 0.01  # no single fluid
    for high in BYTE_WINDOW_ENDS_HU:
        hu = inner.mapped((high + 1000) / 255, -1000)
        air, tissue = hu.share(-1000, -600), hu.share(0, 150)
        fat, trough = hu.share(-130, -70), hu.share(-450, -200)
        if air < 0.05 or trough / 250 > 0.5 * min(air / 400, tissue / 150):
            continue
        if fat > 0.03 and hu.share(-50, -10) / 40 < 0.6 * min(fat / 60, tissue / 150):
            return True
        between = hu.share(-550, -200) / 350
        rare = between < 0.5 * min(air / 400, hu.share(-150, 250) / 400)
        if near_air and tissue > 0.2 and rare and hu.above(400) < 0.2 * tissue:
            return True
    return False


def _is_positive(whole: Shares, inner: Shares) -> bool:
    """Whether positive values reach from a dark background to where few tissues lie in HU."""
    if inner.share(0, 15) > 0.05:  # noise of the background, which is above 0 in MR alone
        return inner.above(300) > 0.25 and inner.share(15, 300) > 0.1
    return whole.share(0, 0) > 0.05 and inner.above(600) > 0.15 and inner.share(15, 300) > 0.1


def _check_scale(values: NDArray[np.float32], intensity: Intensity) -> None:
    """Raise ValueError if sorted values show that ``intensity`` is not their scale."""
    if len(values) < MIN_VALUES:
        return
    raw = Shares(values)
    hu = Shares(np.sort(intensity.to_hu(torch.from_numpy(values)).float().numpy()))
    inner = hu.without_padding()
    if len(inner.values) < MIN_VALUES:
        inner = hu
    air = float(intensity.to_hu(torch.tensor(-1000.0)))
    is_hu = abs(air + 1000) > 200 and _is_ct(Sample(raw, raw.without_padding()))
    if is_hu or inner.share(-MAX_MEDIAN_HU, MAX_MEDIAN_HU) < 0.5:
        low, high = inner.quantiles(0.25, 0.75)
        raise ValueError(
            f"image must be in the scale of intensity={intensity!r}, but its values, "
            f"{describe(values)}, would be {low:.3g} to {high:.3g} HU in the middle half; pass "
            "intensity=HU() for Hounsfield units, or the numbers that the image was scaled with"
        )
