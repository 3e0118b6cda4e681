"""Exophytic tumours: how far they grow out of their organ, and where they may go.

An exophytic tumour keeps its shape uncut, with a sampled share of its volume beyond the organ's
label, in the fat around it. Before it is painted, `appearance.background` extends the organ's
tissue that far; any generator then paints it like a tumour inside the organ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.geometry import Box
from tumorsynth.intensity import BONE_HU, Intensity
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.organ_priors import SizePrior, get_prior
from tumorsynth.random_streams import substream

MAX_BULGE = 0.9  # share of a tumour's volume beyond the organ; the rest anchors it
MIN_BULGE = 0.02  # smaller shares count as none
FAT_HU_RANGE = (-150.0, -20.0)  # local mean; brighter is muscle, gut or another organ
AIR_HU = -200.0  # local mean; between this and fat may be noisy fat: its surroundings decide
MEAN_RADIUS_MM = 1.5  # the local mean reaches this far on each side
FAT_REACH_MM = 2.0  # strands in fat and the organ's blurred border, up to this wide, are allowed
CLEARANCE_MM = 2.0  # distance kept from air and bone: gut wall and marrow can look like fat
HU_CLAMP = 1000.0  # HU are clamped to +- this and rounded, so that sums are exact on every device


def check_bulge(
    bulge: bool | float | Sequence[float], size_mm: object
) -> SizePrior | tuple[float, float] | None:
    """Return the distribution that a ``bulge=`` argument asks for.

    Args:
        bulge: False or None for no growth beyond the organ, a share of the tumour's volume,
            (low, high), or True for the distribution of the prior in ``size_mm``.
        size_mm: the ``size_mm=`` argument beside it.

    Returns:
        A prior, (low, high), or None for no growth beyond the organ.

    Raises:
        ValueError: for other values, and for True without a prior that has such a distribution.
    """
    if bulge is False or bulge is None:
        return None
    if bulge is True:
        prior = get_prior(size_mm) if isinstance(size_mm, str | SizePrior) else None
        if prior is None or prior.bulge is None:
            raise ValueError(
                'bulge=True needs size_mm="kidney" or "cyst", whose real masks show how far '
                f"tumours bulge, got size_mm={size_mm!r}; pass a share of the volume instead, "
                "bulge=0.3 or bulge=(0, 0.5)"
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
    return None if high < MIN_BULGE else (low, high)


def sample_bulge(
    source: SizePrior | tuple[float, float] | None, diameter_mm: float, seed: int
) -> float:
    """Sample the share of a tumour's volume beyond the organ; 0 for one that stays inside.

    It has a random stream of its own: no other quantity depends on it.

    Args:
        source: what `check_bulge` returned.
        diameter_mm: the tumour's equivalent diameter.
        seed: the tumour's noise seed.
    """
    if source is None:
        return 0.0
    rng = substream(seed, "bulge")
    if isinstance(source, SizePrior):
        share = source.draw_bulge(diameter_mm, rng)
    else:
        low, high = source
        share = low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))
    return 0.0 if share < MIN_BULGE else min(share, MAX_BULGE)


class ExophyticRegion:
    """The fat around the organs of a sample: a `GrowthRegion`.

    Excludes air, bone, voxels that are not finite, and voxels with any label but 0.

    Args:
        image: (X, Y, Z), in the scale of ``intensity``.
        label: (X, Y, Z).
        organ_labels: values of the organ, which is never part of the region.
        spacing: mm per voxel.
        intensity: the image's scale.
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
        self.bone_hu, self.air_hu = BONE_HU, AIR_HU
        self.min_fat_hu, self.max_fat_hu = FAT_HU_RANGE
        if intensity.limits is not None:  # a clipped scale shows bone and air as its ends
            low, high = (
                float(intensity.to_hu(torch.tensor(end, dtype=torch.float32)))
                for end in intensity.limits
            )
            self.bone_hu = min(self.bone_hu, high - 1)
            self.min_fat_hu, self.air_hu = max(self.min_fat_hu, low + 1), max(self.air_hu, low + 1)

    def likely_at(self, index: Tensor) -> Tensor:
        """Return which voxels (3, ...) look like fat, each by its own value alone: bool (...)."""
        x, y, z = (i.clamp(0, n - 1) for i, n in zip(index, self.label.shape, strict=True))
        hu = self.intensity.to_hu(self.image[x, y, z].float())
        fat = (hu > self.min_fat_hu) & (hu < self.max_fat_hu)
        return self._unlabelled(self.label[x, y, z]) & fat

    def mask_in(self, box: Box) -> Tensor:
        """Return which voxels of a box inside the sample belong to the region: bool.

        The answer for a voxel does not depend on the box.
        """
        reach_mm = MEAN_RADIUS_MM + FAT_REACH_MM + CLEARANCE_MM
        margin = [math.ceil(reach_mm / s) + 3 for s in self.spacing]
        wide = box.grown(margin).within(Box.whole(self.label.shape))
        hu = self.intensity.to_hu(self.image[wide.slices].float())
        label = self.label[wide.slices]
        finite = hu.isfinite()
        hu = hu.nan_to_num(nan=-HU_CLAMP, posinf=HU_CLAMP, neginf=-HU_CLAMP)
        hu = hu.clamp(-HU_CLAMP, HU_CLAMP).round()
        total, count = _local_sums(hu, self.spacing), _local_sums(torch.ones_like(hu), self.spacing)
        fat = (total > self.min_fat_hu * count) & (total < self.max_fat_hu * count)
        bone = (hu >= self.bone_hu) & ~is_organ(label, self.organ_labels)
        excluded = (total <= self.air_hu * count) | bone | ~finite
        # a scale clipped at fat's lower limit shows air as a uniform value there
        above_air = _local_sums((hu > self.min_fat_hu).to(hu.dtype), self.spacing)
        excluded |= above_air == 0
        region = dilate(fat, FAT_REACH_MM, self.spacing)
        region &= ~dilate(excluded, CLEARANCE_MM, self.spacing)
        region &= self._unlabelled(label)
        return region[box.relative_to(wide).slices]

    def _unlabelled(self, label: Tensor) -> Tensor:
        return (label == 0) & ~is_organ(label, self.organ_labels)


def _local_sums(values: Tensor, spacing: Sequence[float]) -> Tensor:
    """Sum values (X, Y, Z) over MEAN_RADIUS_MM on each side, leaving out what lies outside."""
    out = values[None, None]
    for axis, s in enumerate(spacing):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        padding[axis] = min(round(MEAN_RADIUS_MM / s), (values.shape[axis] - 1) // 2)
        kernel[axis] = 2 * padding[axis] + 1
        if padding[axis]:
            out = F.avg_pool3d(out, kernel, 1, padding, divisor_override=1)
    return out[0, 0]
