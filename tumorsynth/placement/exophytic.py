"""Tumours that bulge out of their organ: how far, and where they may go.

A bulging tumour takes an uncut shape, of which a drawn share lies beyond the organ's label, in the
fat around it. Before it is painted the organ is made to reach that far (`even_tissue`); from there
on it is painted as one within the organ, by any generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.mass_effect import BONE_HU
from tumorsynth.intensity import Intensity
from tumorsynth.placement.allowed import dilate, is_organ
from tumorsynth.placement.size_priors import SizePrior, get_prior

MAX_BULGE = 0.9  # of a tumour's volume: the rest holds it to its organ
LEAST = 0.02  # a smaller share than this is none
FAT_HU = (-150.0, -20.0)  # mean of 3 mm; above is muscle, gut, an organ
AIR_HU = -200.0  # mean of 3 mm; between the two may be the noise of fat, or not: as what is around
MEAN_MM = 1.5  # to each side, where that mean is taken
CLOSE_MM = 2.0  # strands in the fat and the blurred border of the organ are no obstacles
AWAY_MM = 2.0  # from air and bone: the gut's wall and marrow can look like fat


def check_bulge(
    bulge: bool | float | Sequence[float], size_mm: object
) -> SizePrior | tuple[float, float] | None:
    """What a ``bulge=`` argument draws from: a prior, (low, high), or None for no bulging.

    Raises ValueError for other values, and for True without a prior that knows of bulging.
    """
    if bulge is False or bulge is None:
        return None
    if bulge is True:
        prior = get_prior(size_mm) if isinstance(size_mm, str | SizePrior) else None
        if prior is None or prior.bulge is None:
            raise ValueError(
                'bulge=True needs size_mm="kidney" or "cyst", whose real masks tell how far they '
                f"bulge, got size_mm={size_mm!r}; pass a share of the volume instead, bulge=0.3 or "
                "bulge=(0, 0.5)"
            )
        return prior
    try:
        given = [bulge] * 2 if isinstance(bulge, int | float) else list(bulge)
        low, high = (float(share) for share in given)
    except (TypeError, ValueError):
        low = high = math.nan
    if isinstance(bulge, str) or not 0 <= low <= high <= MAX_BULGE:
        raise ValueError(
            "bulge must be the share of a tumour's volume beyond its organ, a number or (low, "
            f"high) from 0 to {MAX_BULGE}, or True for the prior's, got {bulge!r}; try (0, 0.5)"
        )
    return None if high < LEAST else (low, high)


def draw_bulge(
    source: SizePrior | tuple[float, float] | None, diameter_mm: float, seed: int
) -> float:
    """The share beyond the organ of the tumour of this noise seed; 0 for one that stays inside."""
    if source is None:
        return 0.0
    rng = torch.Generator().manual_seed(seed ^ 0x62756C67)  # a stream apart from the noise
    if isinstance(source, SizePrior):
        share = source.draw_bulge(diameter_mm, rng)
    else:
        low, high = source
        share = low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))
    return 0.0 if share < LEAST else min(share, MAX_BULGE)


class Surroundings:
    """The fat around the organs of a sample (X, Y, Z): where its tumours may bulge to.

    Never air, bone, a voxel that is not finite, or one that has any label but 0.
    """

    def __init__(
        self,
        image: Tensor,
        label: Tensor,
        organ_labels: tuple[int, ...],
        spacing: tuple[float, float, float],
        intensity: Intensity,
    ) -> None:
        self.image, self.label, self.spacing, self.intensity = image, label, spacing, intensity
        self.organ_labels = organ_labels
        self.bone, self.fat, self.air = BONE_HU, FAT_HU[0], AIR_HU
        if intensity.limits is not None:  # a scale that ends shows bone and air as its ends
            low, high = (
                float(intensity.to_hu(torch.tensor(end, dtype=torch.float32)))
                for end in intensity.limits
            )
            self.bone = min(self.bone, high - 1)
            self.fat, self.air = max(self.fat, low + 1), max(self.air, low + 1)

    def near(self, index: Tensor) -> Tensor:
        """Which of these voxels (3, ...) are likely to do: a cheap look at their own values."""
        x, y, z = (i.clamp(0, n - 1) for i, n in zip(index, self.label.shape, strict=True))
        hu = self.intensity.to_hu(self.image[x, y, z].float())
        return self._unlabelled(self.label[x, y, z]) & (hu > self.fat) & (hu < FAT_HU[1])

    def local(self, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """Which voxels of a box, which must lie in the volume, do: bool.

        What is said of a voxel does not depend on the box: it is looked at with what is around.
        """
        by = [math.ceil((MEAN_MM + CLOSE_MM + AWAY_MM) / s) + 3 for s in self.spacing]
        wide = tuple(
            slice(max(0, a - n), min(m, b + n))
            for a, b, n, m in zip(start, stop, by, self.label.shape, strict=True)
        )
        # whole HU: their sums are exact on every device
        hu = self.intensity.to_hu(self.image[wide].float())
        finite = hu.isfinite()
        hu = hu.nan_to_num(nan=-1000.0, posinf=1000.0, neginf=-1000.0).clamp(-1000, 1000).round()
        total, count = _sums(hu, self.spacing), _sums(torch.ones_like(hu), self.spacing)
        fat = (total > self.fat * count) & (total < FAT_HU[1] * count)
        bright = (hu >= self.bone) & ~is_organ(self.label[wide], self.organ_labels)
        hard = (total <= self.air * count) | bright | ~finite
        hard |= _sums((hu > self.fat).to(hu.dtype), self.spacing) == 0  # air, cut off at -150 HU
        room = dilate(fat, CLOSE_MM, self.spacing) & ~dilate(hard, AWAY_MM, self.spacing)
        room &= self._unlabelled(self.label[wide])
        x, y, z = (
            slice(a - w.start, b - w.start) for a, b, w in zip(start, stop, wide, strict=True)
        )
        return room[x, y, z]

    def _unlabelled(self, label: Tensor) -> Tensor:
        return (label == 0) & ~is_organ(label, self.organ_labels)


def _sums(values: Tensor, spacing: Sequence[float]) -> Tensor:
    """Sums of (X, Y, Z) over MEAN_MM to each side, of what of it lies inside."""
    out = values[None, None]
    for axis, s in enumerate(spacing):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        padding[axis] = min(round(MEAN_MM / s), (values.shape[axis] - 1) // 2)
        kernel[axis] = 2 * padding[axis] + 1
        if padding[axis]:
            out = F.avg_pool3d(out, kernel, 1, padding, divisor_override=1)
    return out[0, 0]
