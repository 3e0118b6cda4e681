"""Check whether an image can be in Hounsfield units; if it is not, say what it is.

A sample of the voxels decides, so that the check costs the same for any volume. It looks for what
every CT has: air at -1000, fat at -100, soft tissue at 0 to 200, hardly anything from -450 to -200.
Each rule is about shares of the voxels, never about the highest or the lowest one: a single bright
voxel changes nothing. Where the values allow for HU (a liver alone at HU / 10 may be a cyst), the
check stays silent, and so it does for an image of one value, such as padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tumorsynth.intensity_check.faults import (
    BYTES,
    DIVIDED,
    EQUALISED,
    FLIPPED,
    LABEL_MAP,
    LOWERED,
    NO_TISSUE,
    NOT_CT,
    OFFSET,
    SHIFTED,
    SYMMETRIC,
    UNIT,
    WRAPPED,
    Z_SCORES,
    Fault,
)
from tumorsynth.intensity_check.landmarks import Histogram
from tumorsynth.intensity_check.scales import name_by_organ, name_scale
from tumorsynth.intensity_check.shares import RARE, Sample, Shares

MIN_VALUES = 1000  # voxels besides padding; fewer cannot tell
WRAPPED_NOISE = 2.0**16 - 50  # 16-bit numbers from here on are negative noise
CT_RANGE_HU = (-1100.0, 3200.0)
# of an equalised histogram, as a Kolmogorov distance: 0.01 is chance, HU clipped to 0-250 have 0.08
MAX_UNEVENNESS = 0.05
# of the values besides 0, of which HU from 0 to 250 have 0.04 where all others were set to 0
MAX_INNER_UNEVENNESS = 0.025
MIN_EVEN_VALUES = 4000  # besides 0; fewer may be edges of an organ that was cut out
MAX_LABEL = 39  # of the label maps that are told from a fluid
# upper ends of windows from -1000 HU on: each 5 % wider than the one before
BYTE_WINDOW_ENDS_HU = tuple(1400 * 1.05**k - 1000 for k in range(23))


def find_fault(
    values: NDArray[np.float32], organ: Callable[[], NDArray[np.float32]] | None = None
) -> Fault | None:
    """Return what sorted finite values are if they cannot be HU; None if they can.

    Args:
        values: of `sample_voxels`.
        organ: returns those of them under the organ's label; None if it is not known.
    """
    if len(values) < MIN_VALUES:
        return None
    if values[-1] > WRAPPED_NOISE:  # of air at 0, in unsigned numbers
        values = np.sort(np.where(values > WRAPPED_NOISE, values - 2**16, values))
    whole = Shares(values)
    sample = Sample(whole, whole.without_padding())
    if _is_label_map(whole):
        return LABEL_MAP
    if len(sample.inner.values) < MIN_VALUES or is_ct(sample) and not _may_be_shifted(whole):
        return None
    fault = next(_faults(sample), None)
    return name_by_organ(whole, Shares(organ())) if fault is None and organ is not None else fault


def _faults(sample: Sample) -> Iterator[Fault]:
    """Yield what the values of an image without air at -1000 can be, the surest first."""
    whole, inner = sample.all, sample.inner
    fractional = _has_fractions(inner)
    if fractional and _is_tiny(inner):
        yield _name_tiny(sample)
    if (scale := name_scale(Histogram(whole))) is not None:
        yield scale
    if is_ct(sample):
        return
    unmasked = Sample(whole.without(0.0), inner)  # zeros would count as tissue at any scale
    for by in (100, 10):
        if is_ct(unmasked.mapped(by)) and not _is_clipped_at_fat(sample):
            yield DIVIDED[by]
    if fractional and _is_fat_and_tissue(inner.mapped(10)):
        yield DIVIDED[10]
    has_tissue = inner.share(860, 980) > 0.005 and inner.share(1024, 1274) > 0.03
    if has_tissue and is_ct(sample.mapped(1, -1024)):
        yield SHIFTED
    if whole.share(600, 1040) > 0.07 and is_ct(sample.mapped(-1)):  # more than bone
        yield FLIPPED
    if whole.share(64000, 65536) > 0.005:
        yield WRAPPED
    if inner.above(20000) > 0.9:
        yield OFFSET
    if inner.share(880, 1300) > 0.5 and inner.above(1040) > 0.05 and inner.below(500) < RARE:
        yield SHIFTED
    if _is_clipped_and_flipped(whole):
        yield FLIPPED
    if whole.below(0) < RARE:
        if whole.above(255.01) < RARE:
            if _is_equalised(sample):
                yield EQUALISED
            if whole.share(254.99, 255.01) >= RARE or _is_wide_window(inner):
                yield BYTES
        if _is_positive(whole, inner):
            yield NOT_CT
    if _is_too_dark(inner):
        yield next(
            (fault for fault, hu in _darker(sample) if is_ct(hu) and _has_air(hu)), NO_TISSUE
        )
    (middle,) = inner.quantiles(0.5)
    if not -1100 < middle < 800:
        yield NO_TISSUE


def _is_too_dark(inner: Shares) -> bool:
    """Whether values lie below all tissue that are no padding of one value."""
    dark = Shares(inner.values[: np.searchsorted(inner.values, np.float32(-1200))])
    if len(dark.values) < 0.03 * len(inner.values):
        return False
    first, middle, third = dark.quantiles(0.25, 0.5, 0.75)
    return third > first and middle < -1300  # or noise of air at -1024


def _darker(sample: Sample) -> Iterator[tuple[Fault, Sample]]:
    """Yield the scales that put air below -1100, and the HU if the values have that scale."""
    yield DIVIDED[0.5], sample.mapped(0.5)
    yield LOWERED, sample.mapped(1, 1024)


def is_ct(sample: Sample) -> bool:
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


def _has_air(hu: Sample) -> bool:
    """Whether values lie at that of air, not of lung: another factor would put none there."""
    return hu.all.share(-1080, -930) > 0.02


def _may_be_shifted(hu: Shares) -> bool:
    """Whether the darkest voxels are brighter than air."""
    (lowest,) = hu.quantiles(RARE)
    return -960 < lowest < -600


def _is_label_map(whole: Shares) -> bool:
    """Whether the values are 0, 1, 2 and so on, but for a few, unlike one fluid with its noise."""
    zeros = whole.share(0, 0)
    marked = sum(whole.share(value, value) for value in (1, 2, 3))
    if marked > 0.02 and 1 - marked - zeros < RARE:
        return True
    if not 0.02 < zeros < 0.9 or whole.below(0) > 0 or whole.above(MAX_LABEL) > RARE:
        return False
    shares = [whole.share(value, value) for value in range(1, MAX_LABEL + 1)]
    if 1 - zeros - sum(shares) > RARE or shares[0] == 0:
        return False
    if sum(shares[:9]) > max(0.3, 1 - zeros - RARE):
        return True
    lowest = shares[0]
    for share in shares:  # noise falls off, classes go up and down
        if share > 3 * lowest + 0.01:
            return True
        lowest = min(lowest, share)
    return False


def _is_clipped_at_fat(sample: Sample) -> bool:
    """Whether this may be HU clipped at -100, as some clip an abdomen, with tissue or edges above.

    In HU / 10, bone alone is above 25, and hardly anything is between lung and fat.
    """
    inner = sample.inner
    if sample.all.share(-100.001, -99.999) <= RARE:
        return False
    fluid = inner.share(-15, 25)
    return inner.above(25) > 0.1 * fluid or inner.share(-45, -20) / 25 > 0.2 * fluid / 40


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
        if is_ct(sample.mapped(by)):
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


def _is_equalised(sample: Sample) -> bool:
    """Whether each value, over 255, is about the share of the voxels below it.

    Some libraries leave out the lowest value, which is then 0.
    """
    values = sample.inner.values
    values = values[: values.searchsorted(np.float32(255.01), "right")]
    if len(values) < MIN_VALUES or values[-1] < 250 or values[-1] - values[0] < 100:
        return False
    if _unevenness(sample.all, values) < MAX_UNEVENNESS:
        return True
    if len(values) < MIN_EVEN_VALUES:
        return False
    return _unevenness(sample.inner, values) < MAX_INNER_UNEVENNESS


def _unevenness(shares: Shares, values: NDArray[np.float32]) -> float:
    """Return how far values, over 255, are from their ranks at most."""
    low, high = (shares.values.searchsorted(values, side) for side in ("left", "right"))
    ranks = values / 255 * len(shares.values)
    return float(np.maximum(low - ranks, ranks - high).max()) / len(shares.values)


def _is_positive(whole: Shares, inner: Shares) -> bool:
    """Whether positive values reach from a dark background to where few tissues lie in HU."""
    (high,) = whole.quantiles(0.95)
    zeros, dark = whole.share(0, 0), whole.share(1e-6, 0.05 * high)
    if high > 20 and dark > 0.15 and zeros < 0.3 * dark and whole.below(0) == 0:
        return True  # noise of the background, which is above 0 in MR alone
    if inner.share(0, 15) > max(0.05, zeros):  # or HU clipped at 0
        return inner.above(300) > 0.25 and inner.share(15, 300) > 0.1
    return whole.share(0, 0) > 0.05 and inner.above(600) > 0.15 and inner.share(15, 300) > 0.1
