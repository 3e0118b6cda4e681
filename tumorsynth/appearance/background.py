"""Even tissue in place of what would show through a tumour, before the tumour is painted.

In the fat that a tumour bulges into, in a lung with its vessels, and in the fat that an organ's
label covers, generators would paint something else than a tumour, or it would show through. What
is inside the tumour's outline becomes even tissue of the organ's level there, with the scan's
noise. Generators soften a tumour's edge on its inside too, which towards another tissue would leave
a rind of the organ's level: so they are shown a tumour that reaches SPARE_MM further there, and
what is beyond its outline is cut off, as sharply as the scan is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tumorsynth.appearance.blend import feather, gaussian_filter
from tumorsynth.appearance.mass_effect import evenness
from tumorsynth.appearance.noise import WIDER
from tumorsynth.devices import onto
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.types import TumorParams

SPARE_MM = 3.0  # the edges of generators' tumours reach this far into them
FAT_HU = -20.0  # an organ's voxels below this are fat that its label covers
SOFT_HU, FAT_SHARE = 30.0, 0.02  # an organ that is not fat itself; what noise alone does not make
LUNG_HU = -400.0  # tissue below this is lung
BLUR_MM = 1.0  # of an organ's surface that is half fat
GAP_MM = 2.0  # of lung that its label leaves out before the chest wall
SIGNAL = 1.5  # as in `evenness`: what is left of an edge would show, noise is drawn anew
MOST_BEYOND = 0.5  # of an organ's voxels, of which the generator sees no difference
EVEN_GAIN = 0.1  # less of a voxel's difference from its surroundings than this is no noise


@dataclass(frozen=True)
class Fill:
    """Even tissue where a tumour is to be. Of a part of the sample (X, Y, Z)."""

    change_hu: Tensor  # that makes even tissue of the organ's level within the tumour's outline
    shown_hu: Tensor  # the same for the generator: within the outline that it is shown
    shown: Tensor  # bool, the tumour, and further on in other tissue
    other: Tensor  # bool, the tissue that is not the organ's
    weight: Tensor  # of what the generator makes there, and of the change
    brightens: bool  # there alone: what is brighter than the tumour stays


@dataclass(frozen=True)
class Tissue:
    """What a tumour is to be painted in."""

    organ: Tensor  # bool, (X, Y, Z)
    level_hu: float  # the organ's median; 0 where there is none
    beyond: float  # share of the organ's voxels that are not within the generator's window
    fat_share: float  # of the tumour's voxels, under the organ's label
    outside_share: float  # of the tumour's voxels

    def unseen(self, window: tuple[float, float]) -> str | None:
        """Why a generator with this window (HU) cannot paint here; None if it can."""
        if self.beyond <= MOST_BEYOND:
            return None
        low, high = window
        return (
            f"most of the organ around a tumour must lie within {low:g} to {high:g} HU, which the "
            f"generator sees, but {self.beyond:.0%} of it does not (median "
            f'{self.level_hu:.0f} HU); pass generator="lung" (-1000 to 400 HU) if it is a lung, '
            "or look at intensity="
        )


def tissue(
    hu: Tensor,
    label: Tensor,
    organ_labels: tuple[int, ...],
    inside: Tensor,
    window: tuple[float, float],
) -> Tissue:
    """What a tumour is to be painted in. hu, label, inside (bool, the tumour): (X, Y, Z), the
    tumour and some mm around it. window: HU that the generator sees."""
    organ = is_organ(label, organ_labels)
    healthy = organ & hu.isfinite()
    level = torch.where(healthy, hu, torch.nan).nanmedian().nan_to_num(nan=0.0)
    beyond = (healthy & ((hu <= window[0]) | (hu >= window[1]))).sum() / healthy.sum().clamp(min=1)
    fat = (healthy & inside & (hu < FAT_HU)).sum() / inside.sum()
    outside = (inside & ~organ).sum() / inside.sum()
    # one wait for a GPU
    told = torch.stack([level, *(share.to(level) for share in (beyond, fat, outside))]).tolist()
    return Tissue(organ, *told)


def fill(
    hu: Tensor,
    here: Tissue,
    inside: Tensor,
    spacing: tuple[float, float, float],
    grain_mm: Sequence[float],
    params: TumorParams,
    window: tuple[float, float],
) -> Fill | None:
    """What makes even tissue of the organ's level within a tumour's outline, as sharp as the scan.

    For tumours that bulge; in lungs, whose vessels would shine through the tumour, unless the
    generator's window (HU) does not reach them; and where more than a little of the tumour is fat
    that the organ's label covers, as it often does a kidney's sinus. None for all others.

    hu, inside and here: as for and from :func:`tissue`. grain_mm: `texture.grain` along the axes.
    The scan keeps its noise; where that cannot be told from an edge (the organ's old surface,
    strands in the fat) noise like it is drawn from the seed.

    In a lung, what lies between the nodule and the chest wall and is neither, since the label ends
    before the wall, is filled like the nodule, up to GAP_MM.
    """
    organ, level = here.organ, here.level_hu
    lung = level < LUNG_HU and window[0] < LUNG_HU
    over_fat = level > SOFT_HU and here.fat_share > FAT_SHARE
    if params.bulge == 0 and not lung and not over_fat:
        return None
    finite = hu.isfinite()
    hu = torch.where(finite, hu, 0.0)
    mean, gain = evenness(hu, organ, spacing, SIGNAL)
    noise = (1 - gain) * (hu - mean)
    even = organ & finite & (gain < EVEN_GAIN)
    sd = noise[even].std() if int(even.sum()) > 1 else hu.new_tensor(0.0)
    rng = torch.Generator().manual_seed(params.shape_seed ^ 0x66696C6C)
    drawn = torch.randn(hu.shape, generator=rng)
    drawn = gaussian_filter(drawn, [g / WIDER / s for g, s in zip(grain_mm, spacing, strict=True)])
    drawn = onto(drawn / drawn.std().clamp(min=1e-6), hu.device)
    noise = noise + (gain * (2 - gain)).sqrt() * sd * drawn
    to_even = torch.where(finite, level + noise - hu, 0.0)
    if lung:
        other = ~organ
    else:  # and the blurred border of the organ
        other = dilate(~organ | (mean < FAT_HU), BLUR_MM, spacing)
    shown = inside | (dilate(inside, SPARE_MM, spacing) & other)
    reached = inside | (dilate(inside, GAP_MM, spacing) & other) if lung else inside
    weight, wider = (feather(part, grain_mm, spacing, "change") for part in (reached, shown))
    return Fill(weight * to_even, wider * to_even, shown, other, weight, lung)
