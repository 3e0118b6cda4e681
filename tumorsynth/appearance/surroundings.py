"""Levels of the tissue around tumours: medians in the shell from 2 to 6 mm away.

Volumes here are (B, 1, X, Y, Z) in HU with 1 mm voxels. On a GPU nothing here synchronises.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.devices import on_cpu
from tumorsynth.geometry import bounding_box

SHELL_MM = (2, 6)  # distances from a tumour between which the tissue around it is measured
MIN_TISSUE_VOXELS = 50  # of the shell
MAX_TISSUE_DIFFERENCE_HU = 50.0  # noise included, between voxels of the same tissue
LOW_TISSUE_HU = 40.0  # above the lower end of what counts as tissue, up to where it misleads
MAX_LEVEL_BIAS_HU = 10.0  # by which the level may exceed that of the tissue replaced there
OWN_TISSUE_SDS = 2.5  # of the tissue that a tumour replaces, within which it goes on around
OWN_TISSUE_HU = (10.0, 50.0)  # the same in HU, at least and at most
MAD_TO_SD = 1.4826  # standard deviation over median absolute deviation, of normal noise


def level_around(hu: Tensor, tumor_mask: Tensor, tissue: tuple[float, float]) -> Tensor:
    """Return the median HU of the tissue around each tumour, (B,).

    Args:
        hu: (B, 1, X, Y, Z).
        tumor_mask: bool, same shape.
        tissue: HU that count as tissue. Where too few voxels of the shell lie within, all of the
            shell counts; without a shell, all of the crop.
    """
    return Surroundings.of(hu, tumor_mask).level(tissue)


def similar_level_around(healthy: Tensor, tumor_mask: Tensor) -> Tensor:
    """Return the median HU around each tumour of the tissue that it replaces, (B,).

    A requested contrast is relative to this: a tumour may replace bright kidney, fatty pancreas or
    renal sinus. Where too little such tissue is around, it is the median inside the mask.

    Args:
        healthy: (B, 1, X, Y, Z), before the tumour.
        tumor_mask: bool, same shape.
    """
    return Surroundings.of(healthy, tumor_mask).similar_level()


class Surroundings:
    """The tissue in and around tumours; what several levels need is measured once.

    Args:
        hu: (B, 1, X, Y, Z), cut to what is measured.
        tumor_mask: bool, same shape.
    """

    def __init__(self, hu: Tensor, tumor_mask: Tensor) -> None:
        self.hu, self.tumor_mask = hu, tumor_mask

    @classmethod
    def of(cls, hu: Tensor, tumor_mask: Tensor) -> Surroundings:
        box = around_tumors(tumor_mask, SHELL_MM[1] + 1)
        return cls(hu[box], tumor_mask[box])

    @cached_property
    def shell(self) -> Tensor:
        """The voxels 2 to 6 mm around each tumour."""
        mask = self.tumor_mask.to(self.hu.dtype)
        inner, outer = SHELL_MM
        return (grown(mask, outer) > 0) & ~(grown(mask, inner) > 0)

    @cached_property
    def replaced(self) -> Tensor:
        """Median HU of the tissue inside each mask, (B,)."""
        return median_inside(self.hu, self.tumor_mask)

    @cached_property
    def difference(self) -> Tensor:
        """From `replaced`, in HU."""
        return (self.hu - self.replaced[:, None, None, None, None]).abs()

    def level(self, tissue: tuple[float, float]) -> Tensor:
        """As `level_around` returns it."""
        shell = self.shell
        for wider in (~self.tumor_mask, torch.ones_like(self.tumor_mask)):
            shell = torch.where(count_voxels(shell) > 0, shell, wider)
        fits = shell & (self.hu > tissue[0]) & (self.hu < tissue[1])
        fits = torch.where(count_voxels(fits) >= MIN_TISSUE_VOXELS, fits, shell)
        return median_inside(self.hu, fits)

    def healthy_level(self, tissue: tuple[float, float]) -> Tensor:
        """`level` of crops without a tumour, right near the lower end of ``tissue``, too.

        In a fatty or a noisy unenhanced organ only the bright part of the voxels lies within
        ``tissue``: a tumour relative to their median would be brighter than the organ. The level is
        then that of the tissue which the tumour replaces.
        """
        level, replaced = self.level(tissue), self.replaced
        biased = (replaced < tissue[0] + LOW_TISSUE_HU) & (level > replaced + MAX_LEVEL_BIAS_HU)
        if on_cpu(biased) and not bool(biased.any()):
            return level
        return torch.where(biased, self.similar_level(), level)

    def similar_level(self) -> Tensor:
        """As `similar_level_around` returns it."""
        limit = MAX_TISSUE_DIFFERENCE_HU
        return self._median_of_shell(limit, otherwise=self.replaced)

    def own_level(self) -> Tensor:
        """Median HU of the tissue that a tumour replaces, as it goes on around it, (B,).

        NaN where too little of it does: the tumour's place differs from all that is around.
        """
        limit = OWN_TISSUE_SDS * MAD_TO_SD * median_inside(self.difference, self.tumor_mask)
        limit = limit.clamp(*OWN_TISSUE_HU)[:, None, None, None, None]
        return self._median_of_shell(limit, otherwise=torch.nan)

    def _median_of_shell(self, limit: float | Tensor, otherwise: float | Tensor) -> Tensor:
        """Median HU of the shell up to a difference; another value where that is too little."""
        similar = self.shell & (self.difference < limit)
        enough = count_voxels(similar).flatten() >= MIN_TISSUE_VOXELS
        return torch.where(enough, median_inside(self.hu, similar), otherwise)


def median_inside(values: Tensor, where: Tensor) -> Tensor:
    """Median (B,) of the voxels of a mask; NaN where it is empty."""
    voxels = torch.where(where, values, torch.nan).flatten(1)
    if on_cpu(voxels):
        return voxels.nanmedian(1).values
    # the same from operators that are deterministic on CUDA; NaN are sorted last
    ordered = voxels.sort(1).values
    middle = (ordered.shape[1] - 1 - ordered.isnan().sum(1, keepdim=True)).clamp(min=0) // 2
    return ordered.gather(1, middle)[:, 0]


def grown(mask: Tensor, voxels: int) -> Tensor:
    """Dilate a mask by a cube, one axis at a time.

    Args:
        mask: 0 and 1 in floating point, (..., X, Y, Z).
        voxels: by how many on each side.
    """
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * voxels + 1, voxels
        mask = F.max_pool3d(mask, kernel, stride=1, padding=padding)
    return mask


def around_tumors(tumor_mask: Tensor, margin: int) -> tuple[slice, ...]:
    """Index of the part of (B, 1, X, Y, Z) around the tumours.

    On a GPU (to avoid a sync), or if any sample has no tumour, this is the full volume.
    """
    if not on_cpu(tumor_mask) or not bool(tumor_mask.flatten(1).any(1).all()):
        return (slice(None),) * 5
    box = bounding_box(tumor_mask.flatten(0, 1).any(0), margin)
    assert box is not None
    return (slice(None), slice(None), *box.slices)


def count_voxels(mask: Tensor) -> Tensor:
    """Voxels of each sample's mask, (B, 1, 1, 1, 1)."""
    return mask.flatten(1).sum(1)[:, None, None, None, None]
