"""Where air, fat and soft tissue lie in an image of unknown scale.

In every CT fat is 900 HU above air, soft tissue 100 to 300 HU above fat, and hardly a voxel lies
from -500 to -200 HU. These three and the gap between them show a CT at any scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tumorsynth.intensity_check.shares import RARE, Shares

POINTS, WINDOW_POINTS = 192, 96  # of the smoothed histogram; where both ends are clipped
SMOOTHING = np.array([1, 2, 3, 2, 1]) / 9
MIN_HEIGHT = 0.03  # of a peak, as a share of the highest
MAX_VALLEY = 0.75  # between two peaks, as a share of the lower one
MIN_FAT = 0.15  # density of fat, as a share of that of soft tissue
MIN_VALUES = 1000
MAX_ZEROS = 0.05  # from here on, padding
GAP = (0.55, 0.85)  # of the way from air to fat: -505 to -235 HU
AIR_TO_FAT_PER_FAT_TO_TISSUE = (3.0, 11.0)
WINDOWED = (0.15, 3.0)  # the same where the values are clipped between air and fat
MIN_CLIPPED = 0.02  # share of the lowest value that can be air


@dataclass(frozen=True)
class Landmarks:
    """Values of air, fat and soft tissue.

    Args:
        air: of air or, in a part without air, of lung.
        fat: of fat.
        tissue: of soft tissue.
        clipped: whether ``air`` is one value, at which the image is clipped or padded.
        gap_share: share of the voxels between air and fat.
    """

    air: float
    fat: float
    tissue: float
    clipped: bool
    gap_share: float


class Histogram:
    """Peaks of the values between those at which an image is clipped.

    Args:
        values: in order.

    Attributes:
        lowest: lowest value but for rare ones.
        highest: highest value but for rare ones.
        at_lowest: share of voxels with exactly the lowest value.
        at_highest: share of voxels with exactly the highest value.
        inner: the values between the two.
        peaks: (value, density) of the peaks of ``inner``, from low to high.
    """

    def __init__(self, values: Shares):
        self.all = values
        self.lowest, self.highest = values.quantiles(RARE, 1 - RARE)
        self.at_lowest = values.share(self.lowest, self.lowest)
        self.at_highest = values.share(self.highest, self.highest)
        ordered, first, last = values.values, 0, len(values.values)
        if self.at_lowest > RARE:
            first = int(ordered.searchsorted(np.float32(self.lowest), "right"))
        if self.at_highest > RARE:
            last = int(ordered.searchsorted(np.float32(self.highest), "left"))
        self.inner = Shares(ordered[first:last])
        if self.lowest < 0 < self.highest and self.inner.share(0, 0) > MAX_ZEROS:
            self.inner = Shares(self.inner.values[self.inner.values != 0])
        windowed = self.at_lowest >= MIN_CLIPPED and self.at_highest > RARE
        points = WINDOW_POINTS if windowed else POINTS
        enough = len(self.inner.values) >= MIN_VALUES
        self.peaks = _find_peaks(self.inner, points) if enough else []

    def landmarks(self) -> Landmarks | None:
        """Return where air, fat and soft tissue lie; None if they cannot be told apart."""
        for below, (fat, fat_density), (tissue, tissue_density) in zip(
            [None, *self.peaks], self.peaks, self.peaks[1:], strict=False
        ):
            airs = [(self.lowest, True)] if self.at_lowest >= MIN_CLIPPED else []
            airs += [(self.peaks[0][0], False)] if below is not None else []
            for air, clipped in airs:
                whole = fat - air
                low, high = AIR_TO_FAT_PER_FAT_TO_TISSUE
                if not low * (tissue - fat) <= whole <= high * (tissue - fat):
                    continue
                if fat_density < MIN_FAT * tissue_density:
                    continue
                gap = [air + part * whole for part in GAP]
                in_gap, near = self.inner.share(*gap), 0.05 * whole
                if (
                    self.all.below(gap[0]) >= 0.03
                    and in_gap <= 0.25 * min(fat_density, tissue_density) * (gap[1] - gap[0])
                    and self.inner.share(fat - near, fat + near) >= 0.03
                    and self.inner.share(tissue - near, tissue + near) >= 0.03
                ):
                    return Landmarks(air, fat, tissue, clipped, in_gap)
        return None

    def window_landmarks(self) -> Landmarks | None:
        """Return fat and soft tissue above a value at which the image is clipped; None if there
        are none."""
        if self.at_lowest < MIN_CLIPPED or len(self.peaks) < 2:
            return None
        (fat, fat_density), (tissue, tissue_density) = self.peaks[:2]
        low, high = WINDOWED
        above_clip = fat - self.lowest
        if not low * (tissue - fat) <= above_clip <= high * (tissue - fat):
            return None
        if fat_density < MIN_FAT * tissue_density:
            return None
        edge = self.lowest + 0.2 * above_clip
        density = self.inner.share(self.lowest, edge) / (edge - self.lowest)
        if density > 0.4 * fat_density:
            return None
        return Landmarks(self.lowest, fat, tissue, True, density / fat_density)


def _find_peaks(values: Shares, points: int) -> list[tuple[float, float]]:
    """Return (value, density) of the peaks of a smoothed histogram."""
    low, high = values.quantiles(0.002, 0.985)
    if not high > low:
        return []
    different = 1 + np.count_nonzero(np.diff(values.values))
    points = int(min(points, max(16, 0.8 * different)))  # each step of values is no peak
    step = (high - low) / (points - 1)
    at = low + step * np.arange(points)
    edges = np.concatenate([at - 2 * step, at + 2 * step]).astype(np.float32)
    below = values.values.searchsorted(edges)
    counts = np.pad(below[points:] - below[:points], 2, mode="edge")
    density = np.convolve(counts, SMOOTHING, "valid") / len(values.values) / (4 * step)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(density, 3, mode="edge"), 7)
    found = (density >= around.max(1)) & (density > MIN_HEIGHT * density.max())
    kept: list[int] = []
    for k in np.flatnonzero(found).tolist():
        if kept:
            lower = min(density[kept[-1]], density[k])
            if density[kept[-1] : k + 1].min() > MAX_VALLEY * lower:
                if density[k] > density[kept[-1]]:
                    kept[-1] = k
                continue
        kept.append(k)
    return [(float(at[k]), float(density[k])) for k in kept]
