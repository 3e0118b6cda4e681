"""Crops around annotated tumours: moved, zoomed, and many of them put into other tissue."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.training.data import Case, Tumor, augment


def sample_crop(
    cases: list[Case],
    tumor: Tumor,
    tumor_label: int,
    side: int,
    rng: np.random.Generator,
    places: list[Tensor],
    transplant: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """HU and tumour mask, (1, side, side, side) each, around a tumour, zoomed and jittered.

    places: :func:`even_tissue` of every case.
    transplant: the share of crops in which the tumour is moved into even tissue elsewhere, in
    any of the cases. A few annotated tumours have few surroundings: without this a generator knows
    tumours only where it saw them.
    """
    case = cases[tumor.case]
    assert case.label is not None
    extent = max(h - lo for lo, h in zip(tumor.low, tumor.high, strict=True))
    # shrunk down to 0.4: large ones until they fit, all to the size of early ones, or a generator
    # trained on tumours of 20 mm paints those of 8 mm too faint
    most = min(1.15, 0.75 * side / extent)
    zoom = float(np.exp(rng.uniform(np.log(0.4), np.log(max(most, 0.5)))))
    source = round(side / zoom)
    centre = [
        (lo + h) / 2 + rng.uniform(-1, 1) * min(max(0.0, (source - (h - lo)) / 2 - 4), 0.2 * source)
        for lo, h in zip(tumor.low, tumor.high, strict=True)
    ]
    hu = _cut(case.hu, centre, source, side)
    # this tumour alone: others are surroundings, as tumours of the patient's own are later on
    box = tuple(slice(lo, h) for lo, h in zip(tumor.low, tumor.high, strict=True))
    own = torch.zeros_like(case.label, dtype=torch.bool)
    own[box] = case.label[box] == tumor_label
    mask = _cut(own, centre, source, side) > 0.5
    if rng.random() < transplant:
        hu, mask = augment(torch.cat([hu, mask.float()]), rng).split(1)
        hu, mask = _transplant(cases, places, hu, mask > 0.5, tumor_label, zoom, rng)
    if rng.random() < 0.2:  # a generous contour has a rim of healthy tissue: soft edges are learned
        mask = F.max_pool3d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    both = augment(torch.cat([hu, mask.float()]), rng)
    gain, offset = rng.uniform(0.75, 1.2), rng.uniform(-30, 20)
    hu = 40 + (both[:1] - 40) * gain + offset
    if rng.random() < 0.4:
        hu = _thick_slices(hu, rng)
    return hu.clamp(HU_LOW, HU_HIGH), both[1:] > 0.5


def _thick_slices(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """(1, side, side, side) as if scanned in slices (or voxels) of 2 to 5 mm."""
    coarse = round(hu.shape[-1] / rng.uniform(2, 5))
    size = list(hu.shape[1:])
    if rng.random() < 0.2:
        size = [round(n / rng.uniform(1.5, 3)) for n in size]
    else:
        size[int(rng.integers(3))] = coarse
    thick = F.interpolate(hu[None], size=size, mode="area")
    return F.interpolate(thick, size=hu.shape[1:], mode="trilinear", align_corners=False)[0]


def even_tissue(case: Case) -> Tensor:
    """(N, 3) voxels amid at least 2 cm of even soft tissue: parenchyma, mostly."""
    coarse = F.avg_pool3d(case.hu.float()[None, None], 4)
    high = F.max_pool3d(coarse, 5, stride=1, padding=2)
    low = -F.max_pool3d(-coarse, 5, stride=1, padding=2)
    even = (low > 20) & (high < 200) & (high - low < 50)
    return even[0, 0].nonzero() * 4 + 2


def _cut(volume: Tensor, centre: list[float], source: int, side: int) -> Tensor:
    """A cube of ``source`` voxels around a centre, zoomed to (1, side, side, side), float."""
    index = [
        torch.arange(round(c - source / 2), round(c - source / 2) + source).clamp(0, n - 1)
        for c, n in zip(centre, volume.shape, strict=True)
    ]
    part = volume[index[0]][:, index[1]][:, :, index[2]].float()[None, None]
    return F.interpolate(part, size=(side,) * 3, mode="trilinear", align_corners=False)[0]


def _transplant(
    cases: list[Case],
    places: list[Tensor],
    hu: Tensor,
    mask: Tensor,
    tumor_label: int,
    zoom: float,
    rng: np.random.Generator,
    tries: int = 8,
) -> tuple[Tensor, Tensor]:
    """The tumour of one crop in even tissue of another; the crop as it was where none is found.

    Its contrast is scaled with the parenchyma's HU, within limits: an unenhanced liver shows less.
    """
    soft = F.avg_pool3d(mask.float()[None], 3, stride=1, padding=1)[0]
    shell = (F.max_pool3d(mask.float()[None], 11, stride=1, padding=5)[0] > 0) & ~(
        F.max_pool3d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    )
    own = hu[shell & (hu > 20) & (hu < 200)]
    if len(own) < 100:
        return hu, mask
    side = hu.shape[-1]
    for _ in range(tries):
        which = int(rng.integers(len(cases)))
        case = cases[which]
        if len(places[which]) == 0:
            continue
        centre = places[which][int(rng.integers(len(places[which])))].tolist()
        there = _cut(case.hu, centre, round(side / zoom), side)
        under = there[mask]
        level = float(under.median())
        smooth = F.avg_pool3d(there[None], 5, stride=1, padding=2)[0][mask]
        if not 30 < level < 190 or float(((smooth - level).abs() < 30).float().mean()) < 0.9:
            continue
        if case.label is not None:
            taken = _cut((case.label == tumor_label), centre, round(side / zoom), side)
            if bool((taken[shell | mask] > 0.1).any()):
                continue
        ratio = float(np.clip(level / float(own.median()), 0.7, 1.3))
        painted = level + (hu - float(own.median())) * ratio
        return there + soft * (painted - there), mask
    return hu, mask
