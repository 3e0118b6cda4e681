"""Crops around annotated tumours: moved, zoomed, and many of them put into other tissue.

A few annotated tumours have few surroundings and one contrast each: moved into even tissue of any
scan, with another contrast, they teach a generator where and how strong tumours can be.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.contrast import ContrastConfig, contrast_of, grown, level_around
from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.data import Case, Tumor, augment
from tumorsynth.training.outlines import alone, smoothed

Window = tuple[float, float]


def sample_crop(
    cases: list[Case],
    tumor: Tumor,
    tumor_label: int,
    rng: np.random.Generator,
    places: list[Tensor],
    config: DenoiserTraining,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """HU and tumour mask, (1, side, side, side) each, around a tumour, zoomed and jittered.

    places: :func:`even_tissue` of every case. window: HU that the autoencoder tells apart.
    """
    case, side = cases[tumor.case], config.patch_size
    assert case.label is not None
    extent = max(h - lo for lo, h in zip(tumor.low, tumor.high, strict=True))
    moved = rng.random() < config.transplant
    # shrunk, large ones until they fit, all to the size of early ones: else a generator trained on
    # tumours of 20 mm paints those of 8 mm too faint. Further where the surroundings stay behind.
    least = float(np.clip(12 / extent, 0.25, 0.4)) if moved else 0.4
    most = min(1.15, 0.75 * side / extent)
    zoom = float(np.exp(rng.uniform(np.log(least), np.log(max(most, 0.5)))))
    source = round(side / zoom)
    centre = [
        (lo + h) / 2 + rng.uniform(-1, 1) * min(max(0.0, (source - (h - lo)) / 2 - 4), 0.2 * source)
        for lo, h in zip(tumor.low, tumor.high, strict=True)
    ]
    hu = _cut(case.hu, centre, source, side)
    mask = _cut(alone(case, tumor, tumor_label), centre, source, side) > 0.5
    if moved:
        hu, mask = augment(torch.cat([hu, mask.float()]), rng).split(1)
        hu, mask = _transplant(cases, places, hu, mask > 0.5, tumor_label, rng, config, window)
    both = augment(torch.cat([hu, mask.float()]), rng)
    gain, offset = rng.uniform(0.75, 1.2), rng.uniform(-30, 20)
    middle = 40 if config.tissue_low > -100 else config.tissue_low
    hu = middle + (both[:1] - middle) * gain + offset
    if rng.random() < 0.4:
        hu = _thick_slices(hu, rng)
    return hu.clamp(*window), both[1:] > 0.5


def contrast_range(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, config: DenoiserTraining
) -> ContrastConfig:
    """What a generator draws where no contrast is asked: that of the real tumours, a little more.

    For soft tissue scaled to a level of 110 HU (an enhanced liver), as synthetic tumours are
    scaled with the tissue they lie in.
    """
    tissue = (config.tissue_low, config.tissue_high)
    reference = 110.0 if config.tissue_low > 0 else None
    found = []
    for tumor in tumors:
        hu, mask = _around(cases, tumor, tumor_label)
        level = level_around(hu, mask, tissue)
        # where no tissue lies around, the level may be anything: 0 too
        scale = 1.0 if reference is None or level <= tissue[0] else reference / float(level)
        found.append(float(contrast_of(hu, mask, level)) * scale)
    margin = min(0.25 * abs(float(np.median(found))), 40.0)
    low, high = min(found) - margin, max(found) + margin
    if max(found) < 0:
        high = min(high, 0.75 * max(found))
    elif min(found) > 0:
        low = max(low, 0.75 * min(found))
    return ContrastConfig(round(low, 1), round(high, 1), reference, tissue)


def other_tissue(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, config: DenoiserTraining
) -> str | None:
    """A warning where hardly any tumour lies in the tissue that the config names, or None."""
    low, high = config.tissue_low, config.tissue_high
    levels = [
        float(level_around(*_around(cases, tumor, tumor_label), (-2000, 2000))) for tumor in tumors
    ]
    if 2 * sum(low < level < high for level in levels) >= len(levels):
        return None
    return (
        f"the tissue around {'the tumour' if len(levels) == 1 else 'most tumours'} is not from "
        f"--tissue-low {low:g} to --tissue-high {high:g} HU (its median is "
        f"{float(np.median(levels)):.0f} HU): contrast and places will be wrong; pass other "
        "values, or another --preset: lung for tumours in lungs"
    )


def _around(cases: list[Case], tumor: Tumor, tumor_label: int) -> tuple[Tensor, Tensor]:
    """HU and mask, (1, 1, X, Y, Z) each, of a tumour and 10 mm around it."""
    case = cases[tumor.case]
    box = tuple(
        slice(max(0, lo - 10), hi + 10) for lo, hi in zip(tumor.low, tumor.high, strict=True)
    )
    return case.hu[box].float()[None, None], alone(case, tumor, tumor_label)[box][None, None]


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


def even_tissue(case: Case, config: DenoiserTraining) -> Tensor:
    """(N, 3) voxels amid at least 2 cm of even tissue: parenchyma, mostly."""
    coarse = F.avg_pool3d(case.hu.float()[None, None], 4)
    high = F.max_pool3d(coarse, 5, stride=1, padding=2)
    low = -F.max_pool3d(-coarse, 5, stride=1, padding=2)
    even = (low > config.tissue_low) & (high < config.tissue_high)
    even &= high - low < 1.6 * config.evenness
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
    rng: np.random.Generator,
    config: DenoiserTraining,
    window: Window,
    tries: int = 8,
) -> tuple[Tensor, Tensor]:
    """The tumour of one crop in even tissue of another, with that tissue's noise and another
    contrast; the crop as it was where no place is found."""
    volume = mask.float()[None]
    # the tumour's own edge goes with it, 2 mm of it beyond the outline
    soft = F.avg_pool3d(grown(volume, 2), 3, stride=1, padding=1)[0]
    shell = ((grown(volume, 5) > 0) & ~(grown(volume, 1) > 0))[0]
    tissue = config.tissue_low, config.tissue_high
    around = shell & (hu > tissue[0]) & (hu < tissue[1])
    if int(around.sum()) < 100:
        return hu, mask
    own = float(hu[around].median())
    smooth = smoothed(hu)
    contrast = float(contrast_of(hu[None], mask[None], hu.new_tensor([own])))
    # beyond the outline it fades; what else lies there, a vessel or fat, stays behind
    shape = smooth - own
    shape = torch.where(mask, shape, shape.clamp(min(contrast, 0.0), max(contrast, 0.0)))
    side = hu.shape[-1]
    for _ in range(tries):
        which = int(rng.integers(len(cases)))
        case = cases[which]
        if len(places[which]) == 0:
            continue
        centre = places[which][int(rng.integers(len(places[which])))].tolist()
        source = round(side / rng.uniform(0.85, 1.15))
        there = _cut(case.hu, centre, source, side)
        healthy = smoothed(there)
        level = float(there[mask].median())
        even = float(((healthy[mask] - level).abs() < config.evenness).float().mean())
        if not tissue[0] + 10 < level < tissue[1] - 10 or even < 0.9:
            continue
        if case.label is not None:
            taken = _cut((case.label == tumor_label), centre, source, side)
            if bool((taken[shell | mask] > 0.1).any()):
                continue
        if config.contrast == "on":  # all that may be asked for, now and then brighter for darker
            ratio = rng.uniform(0.15, 2.0) * (-1 if rng.random() < 0.15 else 1)
            if not window[0] < level + ratio * contrast < window[1]:
                ratio = abs(ratio)
        else:  # an unenhanced organ shows less
            ratio = float(np.clip(level / own, 0.7, 1.3)) if own > 0 else 1.0
        room = 0.05 * (window[1] - window[0])
        aim = np.clip(level + ratio * contrast, window[0] + room, window[1] - room) - level
        ratio = float(aim) / contrast if abs(contrast) > 5 else 1.0
        grain = there - healthy
        most = 4 * float(grain[mask].abs().median())  # vessels are not noise
        painted = level + shape * ratio + grain.clamp(-most, most)
        return there + soft * (painted - there), mask
    return hu, mask
