"""Which scale the landmarks of a CT show, if it is not HU."""

from __future__ import annotations

import math

from tumorsynth.intensity_check.faults import (
    BYTES,
    DIVIDED,
    LOWERED,
    NOT_CT,
    OFFSET,
    SHIFTED,
    Fault,
    scaled,
    unclear,
    windowed,
)
from tumorsynth.intensity_check.landmarks import Histogram, Landmarks
from tumorsynth.intensity_check.shares import RARE, Shares

AIR_HU, FAT_HU = -1000.0, -100.0
FAT_RANGE_HU = (-140.0, -55.0)
AIR_RANGE_HU = (-1080.0, -930.0)  # scanners and files that end at -1024 or at -1000
WINDOW_TOPS = (100.0, 255.0, 1000.0, 1023.0, 4095.0, 65535.0)  # of images windowed from 0 on
MIN_AT_TOP = 0.0003  # share of voxels at the end of a window, as bone is
FAT_IN_WINDOW, TISSUE_IN_WINDOW = (0.08, 0.2), (0.4, 0.85)  # shares of the window's width
KNOWN = (  # fault, HU in one unit of the image, HU of 0
    *((fault, float(by), 0.0) for by, fault in DIVIDED.items()),
    (SHIFTED, 1.0, -1024.0),
    (LOWERED, 1.0, 1024.0),
    (OFFSET, 1.0, -32768.0),
)


def name_scale(histogram: Histogram) -> Fault | None:
    """Return what the values are if air, fat and tissue lie where they do not in HU, or None."""
    marks = histogram.landmarks()
    if marks is not None and contradicts_hu(histogram, marks):
        return _name(histogram, marks)
    if histogram.lowest == -128 and histogram.highest <= 127.01:
        if histogram.at_lowest > max(0.02, histogram.inner.share(-128, -112)):  # or fat in steps
            return windowed(-128, 127)
    return _name_window(histogram) or _name_by_air(histogram)


def contradicts_hu(
    histogram: Histogram, marks: Landmarks, clip_hu: tuple[float, float] = (-math.inf, math.inf)
) -> bool:
    """Whether the landmarks cannot be air or lung, and fat or soft tissue, in HU.

    Args:
        histogram: of an image in HU, if it is one.
        marks: its landmarks.
        clip_hu: HU at which the image is known to be clipped.
    """
    air, fat = marks.air, marks.fat
    if not -140 <= air < -60 and _shows_fat(histogram, marks):
        return False
    if marks.clipped and abs(air - clip_hu[0]) < 1:  # whatever is darker is there
        if fat < FAT_RANGE_HU[0]:  # or lung
            if air > -900 or -150 < marks.tissue < -20:  # only the brightest of it, or fat
                return False
            bright = histogram.at_highest > 0.01 and abs(histogram.highest - clip_hu[1]) < 1
            return fat > -600 or (fat > -720 and bright)
        close = fat > 0 and marks.tissue - fat < 56  # or fat itself, muscle and an enhanced organ
        return air < -140 and close and marks.gap_share < 0.2
    if air < -1060:  # or padding, below lung or fat
        too_dark = histogram.inner.below(-1200) > 0.01
        return too_dark or fat < -1060 or -280 < fat < FAT_RANGE_HU[0]
    if air < -960:
        return False
    if air < -600:  # or lung
        return _is_shifted(histogram, marks)
    if air < -140:  # or clipped there by someone: at a round number
        if fat > -20:  # or two soft tissues beside dense lung
            if marks.clipped:
                return air < -300 and air % 5 != 0
            return marks.gap_share < 0.02 or _is_sharp(histogram, air)
        return not marks.clipped or air % 50 != 0 or _below_fat(histogram, fat) < 0.05
    if air < -60:  # or fat
        return -30 < fat < -3 and marks.tissue < 40
    if not marks.clipped:
        return True
    return fat > 320 or marks.tissue - fat < 35 and marks.gap_share > 0.002


def _shows_fat(histogram: Histogram, marks: Landmarks) -> bool:
    """Whether fat lies at -100 HU as well: what was taken for fat is another tissue."""
    if any(FAT_RANGE_HU[0] <= peak <= FAT_RANGE_HU[1] for peak, _ in histogram.peaks):
        return True
    return marks.fat > FAT_RANGE_HU[1] and _below_fat(histogram, marks.fat) > 0.08


def _below_fat(histogram: Histogram, fat: float) -> float:
    """Return the density of voxels at the lower end of fat in HU, as a share of that at ``fat``."""
    at_peak = histogram.inner.share(fat - 10, fat + 10) / 20
    return histogram.inner.share(-130, -85) / 45 / max(at_peak, 1e-9)


def _is_shifted(histogram: Histogram, marks: Landmarks) -> bool:
    """Whether the same number was added to air and to fat."""
    shift = marks.fat - FAT_HU
    if not marks.clipped:
        return abs(marks.air - AIR_HU - shift) < 20 and _is_sharp(histogram, marks.air)
    ends = [marks.air - end for end in (-1000, -1024)]
    near = 12 if marks.air % 50 == 0 else 26  # someone may clip HU there
    return any(abs(end - shift) < near and end % 5 == 0 for end in ends)


def _is_sharp(histogram: Histogram, air: float, per_hu: float = 1.0) -> bool:
    """Whether many values spread as little as those of air, unlike lung."""
    widths = 20 * per_hu, 80 * per_hu
    near, wide = (histogram.inner.share(air - w, air + w) for w in widths)
    return near > 0.15 and near > 0.65 * wide


def _name(histogram: Histogram, marks: Landmarks) -> Fault:
    """Return the scale in which air and fat lie here."""
    for fault, unit, offset in KNOWN:
        fat, air = (value * unit + offset for value in (marks.fat, marks.air))
        if -130 <= fat <= -75 and AIR_RANGE_HU[0] <= air <= AIR_RANGE_HU[1]:
            return fault
    if histogram.lowest >= 0 and histogram.highest <= 255.01:
        return BYTES
    if marks.clipped or _is_sharp(histogram, marks.air, (marks.fat - marks.air) / 900):
        return scaled(marks.air, marks.fat)
    return unclear(marks.air, marks.fat)


def _name_window(histogram: Histogram) -> Fault | None:
    """Return the range to which a CT is windowed if fat and tissue lie where none are in HU."""
    marks, highest = histogram.window_landmarks(), histogram.highest
    top = next((top for top in WINDOW_TOPS if highest <= top + 0.01), None)
    if marks is None or histogram.lowest != 0 or top is None:
        return None
    if histogram.at_highest > RARE and highest < top - 0.01:  # HU that are clipped there
        return None
    at_top = histogram.all.share(top - 0.01, top + 0.01)
    if at_top < MIN_AT_TOP and histogram.at_lowest > 0.03:  # or HU that are clipped at 0 alone
        return None
    fat, tissue = marks.fat / top, marks.tissue / top
    if not FAT_IN_WINDOW[0] <= fat <= FAT_IN_WINDOW[1]:
        return None
    if not TISSUE_IN_WINDOW[0] <= tissue <= TISSUE_IN_WINDOW[1]:
        return None
    return windowed(0, top)


def _name_by_air(histogram: Histogram) -> Fault | None:
    """Return a scale that clips air where nobody clips HU, in a chest without a peak of fat."""
    air = histogram.lowest
    if histogram.at_lowest < 0.05 or not -960 < air < -140 or air % 5 == 0 or not histogram.peaks:
        return None
    tissue, _ = max(histogram.peaks, key=lambda peak: peak[1] * (peak[0] > 0.5 * air))
    per_hu = (tissue - air) / 1060
    if 0.87 < per_hu < 1.15:  # or an offset
        offset = air + 1024
        return scaled(air, air + 924) if offset % 10 == 0 and tissue > 0.8 * offset else None
    hu = histogram.inner.mapped(1 / per_hu, -1000 - air / per_hu)
    lung, soft = hu.share(-980, -600), hu.share(-150, 250)
    if min(lung, soft) < 0.1 or hu.share(-450, -200) / 250 > 0.5 * min(lung / 380, soft / 400):
        return None
    return scaled(air, air + 900 * per_hu)


def name_by_organ(whole: Shares, organ: Shares) -> Fault | None:
    """Return what the values are if an organ and what lies around it show it, or None.

    Args:
        whole: all values of the sample.
        organ: those under the organ's label.
    """
    count = len(whole.values)
    if not 100 <= len(organ.values) <= 0.9 * count:
        return None
    first, middle, third = organ.quantiles(0.25, 0.5, 0.75)
    low, high = whole.quantiles(0.05, 0.95)
    quiet = third - first < (4.5 if middle < 14 else 7)  # fluids are darker
    if quiet and -5 < middle < 32 and -18 < low and high < 38 and whole.share(-16, -6) > 0.02:
        return DIVIDED[10]
    lowest, highest = whole.quantiles(RARE, 1 - RARE)
    zeros = whole.share(0, 0)
    if lowest < 0 or 1 - len(organ.values) / count - zeros < 0.15:  # or masked by the organ
        return None
    if first > 250 and whole.share(0, 60) > 0.1 and third < 2 * first:  # no bone without marrow
        return NOT_CT
    top = next((top for top in (100.0, 255.0) if highest <= top + 0.01), None)
    if top is None or (whole.share(highest, highest) > RARE and highest < top - 0.01):
        return None  # or HU that are clipped there
    at_top = whole.share(top - 0.01, top + 0.01)
    # else HU that are clipped at 0 alone, in which muscle is brighter than fat is in a window
    has_fat = whole.share(0.08 * top, 0.172 * top) > 1.25 * whole.share(0.172 * top, 0.267 * top)
    shown = at_top >= MIN_AT_TOP or zeros < 0.03 or has_fat
    if not shown or whole.above(top + 0.01) > max(at_top, MIN_AT_TOP):
        return None
    if not 0.41 <= middle / top <= 0.92 or third - first > 0.2 * top:
        return None
    if third - first < 0.04 * top and whole.share(0.002 * top, 0.24 * top) > 0.01:
        return windowed(0, top)  # even the noise of a smooth organ would make fluids negative
    if lowest > 0 or zeros < 0.005:
        return None
    dark, bright, near = 0.08 * top, middle - 0.2 * top, 0.03 * top
    ramp = whole.share(dark, bright) / (bright - dark)
    edge = whole.share(1e-3, near) / near  # as many in HU that are clipped at 0
    enough = ramp * (bright - dark) > 0.03
    return windowed(0, top) if enough and edge < 0.3 * ramp else None
