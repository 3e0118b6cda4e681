"""Sample crops around annotated tumours: jittered, zoomed, and many transplanted.

A few annotated tumours have few surroundings and one contrast each. Transplanted into even tissue
of any scan, with another contrast, they teach a generator more surroundings and contrasts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.contrast import ContrastConfig, contrast_of, core
from tumorsynth.appearance.contrast_priors import add_structure
from tumorsynth.appearance.surroundings import grown, level_around
from tumorsynth.arguments import format_beside
from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.data import Case, Tumor, augment
from tumorsynth.training.outlines import remove_noise, tumor_mask, tumor_surroundings

Window = tuple[float, float]
SMALLEST_TUMOR_MM = 12  # to which a transplanted tumour may be shrunk
MAX_TUMOR_SHARE = 0.75  # of the crop's side
REFERENCE_LEVEL_HU = 110.0  # of soft tissue: an enhanced liver
COARSE_MM = 4  # grid on which even tissue is searched
MIN_SHELL_VOXELS = 100  # of tissue around a tumour that is transplanted
LEVEL_MARGIN_HU = 10  # of the tissue range, where no tumour is transplanted to
MIN_EVEN_SHARE = 0.9  # of a transplanted tumour's voxels that lie in even tissue
MIN_CONTRAST_HU = 5  # a fainter tumour keeps its contrast
RIM_HU, CENTRE_HU = (8.0, 30.0), (-40.0, -12.0)  # of the structure given to tumours
RIM_SHARE = CENTRE_SHARE = 0.6  # of the tumours with structure
CENTRE_FROM_MM = 12.0  # equivalent diameter of the smallest tumour with a washed-out centre


def sample_crop(
    cases: list[Case],
    tumor: Tumor,
    tumor_label: int,
    rng: np.random.Generator,
    tissue_centres: list[Tensor],
    config: DenoiserTraining,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Sample a crop around a tumour, zoomed and jittered, perhaps transplanted.

    Args:
        cases: all scans.
        tumor: the tumour, of one of the cases.
        tumor_label: label value of tumours.
        rng: the source of all chance.
        tissue_centres: `even_tissue_centres` of every case.
        config: settings of the training.
        window: HU range of the autoencoder.

    Returns:
        HU and tumour mask, (1, side, side, side) each.
    """
    case, side = cases[tumor.case], config.patch_size
    assert case.label is not None
    extent = max(h - lo for lo, h in zip(tumor.low, tumor.high, strict=True))
    transplanted = rng.random() < config.transplant
    # Shrunk to the size of early tumours: a generator trained on tumours of 20 mm alone paints
    # those of 8 mm too faint. A transplanted tumour leaves its surroundings, so it may shrink more.
    smallest = float(np.clip(SMALLEST_TUMOR_MM / extent, 0.25, 0.4)) if transplanted else 0.4
    largest = min(1.15, MAX_TUMOR_SHARE * side / extent)
    zoom = float(np.exp(rng.uniform(np.log(smallest), np.log(max(largest, 0.5)))))
    source = round(side / zoom)
    centre = [
        (lo + h) / 2 + rng.uniform(-1, 1) * min(max(0.0, (source - (h - lo)) / 2 - 4), 0.2 * source)
        for lo, h in zip(tumor.low, tumor.high, strict=True)
    ]
    hu = _zoomed_cube(case.hu, centre, source, side)
    mask = _zoomed_cube(tumor_mask(case, tumor, tumor_label), centre, source, side) > 0.5
    if transplanted:
        hu, mask = augment(torch.cat([hu, mask.float()]), rng).split(1)
        mask = mask > 0.5
        hu = _transplant(cases, tissue_centres, hu, mask, tumor_label, rng, config, window)
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
    """Return the range from which a generator samples a contrast where none is asked for.

    The range is that of the real tumours and a margin. For soft tissue it is scaled to a level of
    110 HU (an enhanced liver), as synthetic tumours are scaled with the tissue around them.
    """
    tissue = (config.tissue_low, config.tissue_high)
    reference = REFERENCE_LEVEL_HU if config.tissue_low > 0 else None
    contrasts = []
    for tumor in tumors:
        hu, mask = crop_around(cases, tumor, tumor_label)
        level = level_around(hu, mask, tissue)
        # without tissue around, the level is arbitrary and may be 0
        scale = 1.0 if reference is None or level <= tissue[0] else reference / float(level)
        contrasts.append(float(contrast_of(hu, mask, level)) * scale)
    margin = min(0.25 * abs(float(np.median(contrasts))), 40.0)
    low, high = min(contrasts) - margin, max(contrasts) + margin
    if max(contrasts) < 0:
        high = min(high, 0.75 * max(contrasts))
    elif min(contrasts) > 0:
        low = max(low, 0.75 * min(contrasts))
    return ContrastConfig(round(low, 1), round(high, 1), reference, tissue)


def tissue_warning(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, config: DenoiserTraining
) -> str | None:
    """Return a warning if most tumours lie outside the tissue range of the config, or None."""
    low, high = config.tissue_low, config.tissue_high
    levels = [
        float(level_around(*crop_around(cases, tumor, tumor_label), (-2000, 2000)))
        for tumor in tumors
    ]
    if 2 * sum(low < level < high for level in levels) >= len(levels):
        return None
    median = format_beside(float(np.median(levels)), (low, high), ".0f")
    return (
        f"the tissue around {'the tumour' if len(levels) == 1 else 'most tumours'} is not from "
        f"--tissue-low {low:g} to --tissue-high {high:g} HU (its median is "
        f"{median} HU): contrast and places will be wrong; pass other "
        "values, or another --preset: lung for tumours in lungs"
    )


def crop_around(cases: list[Case], tumor: Tumor, tumor_label: int) -> tuple[Tensor, Tensor]:
    """HU and mask, (1, 1, X, Y, Z) each, of a tumour and 10 mm around it."""
    case, box = cases[tumor.case], tumor_surroundings(tumor)
    mask = tumor_mask(case, tumor, tumor_label)
    return case.hu[box].float()[None, None], mask[box][None, None]


def _thick_slices(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur (1, side, side, side) as if scanned in slices (or voxels) of 2 to 5 mm."""
    coarse = round(hu.shape[-1] / rng.uniform(2, 5))
    size = list(hu.shape[1:])
    if rng.random() < 0.2:
        size = [round(n / rng.uniform(1.5, 3)) for n in size]
    else:
        size[int(rng.integers(3))] = coarse
    thick = F.interpolate(hu[None], size=size, mode="area")
    return F.interpolate(thick, size=hu.shape[1:], mode="trilinear", align_corners=False)[0]


def even_tissue_centres(case: Case, config: DenoiserTraining) -> Tensor:
    """Return voxels (N, 3) in the middle of at least 2 cm of even tissue, mostly parenchyma."""
    _, even = _coarse_and_even(case, config)
    return even.nonzero() * COARSE_MM + COARSE_MM // 2


def even_tissue_levels(case: Case, config: DenoiserTraining) -> Tensor:
    """Return the HU (N,) of the tissue in the middle of `even_tissue_centres`."""
    coarse, even = _coarse_and_even(case, config)
    return coarse[even]


def _coarse_and_even(case: Case, config: DenoiserTraining) -> tuple[Tensor, Tensor]:
    """Return a case's averages over COARSE_MM, and which of them lie in even tissue."""
    coarse = F.avg_pool3d(case.hu.float()[None, None], COARSE_MM)
    high = F.max_pool3d(coarse, 5, stride=1, padding=2)
    low = -F.max_pool3d(-coarse, 5, stride=1, padding=2)
    even = (low > config.tissue_low) & (high < config.tissue_high)
    even &= high - low < 1.6 * config.evenness
    return coarse[0, 0], even[0, 0]


def _zoomed_cube(volume: Tensor, centre: list[float], source: int, side: int) -> Tensor:
    """A cube of ``source`` voxels around a centre, zoomed to (1, side, side, side), float."""
    index = [
        torch.arange(round(c - source / 2), round(c - source / 2) + source).clamp(0, n - 1)
        for c, n in zip(centre, volume.shape, strict=True)
    ]
    part = volume[index[0]][:, index[1]][:, :, index[2]].float()[None, None]
    return F.interpolate(part, size=(side,) * 3, mode="trilinear", align_corners=False)[0]


def _transplant(
    cases: list[Case],
    tissue_centres: list[Tensor],
    hu: Tensor,
    mask: Tensor,
    tumor_label: int,
    rng: np.random.Generator,
    config: DenoiserTraining,
    window: Window,
    tries: int = 8,
) -> Tensor:
    """Move the tumour of a crop into even tissue, with that tissue's noise and another contrast.

    hu, mask: (1, side, side, side). Returns the crop as it was if no tissue fits.
    """
    volume = mask.float()[None]
    # the tumour's own edge moves with it: 2 mm beyond the outline
    feather = F.avg_pool3d(grown(volume, 2), 3, stride=1, padding=1)[0]
    shell = ((grown(volume, 5) > 0) & ~(grown(volume, 1) > 0))[0]
    tissue = config.tissue_low, config.tissue_high
    around = shell & (hu > tissue[0]) & (hu < tissue[1])
    if int(around.sum()) < MIN_SHELL_VOXELS:
        return hu
    own_level = float(hu[around].median())
    contrast = float(contrast_of(hu[None], mask[None], hu.new_tensor([own_level])))
    # beyond the outline the tumour fades; vessels and fat around it stay behind
    profile = remove_noise(hu) - own_level
    profile = torch.where(mask, profile, profile.clamp(min(contrast, 0.0), max(contrast, 0.0)))
    side = hu.shape[-1]
    for _ in range(tries):
        which = int(rng.integers(len(cases)))
        case, centres = cases[which], tissue_centres[which]
        if len(centres) == 0:
            continue
        centre = centres[int(rng.integers(len(centres)))].tolist()
        source = round(side / rng.uniform(0.85, 1.15))
        host = _zoomed_cube(case.hu, centre, source, side)
        smooth = remove_noise(host)
        level = float(host[mask].median())
        even = float(((smooth[mask] - level).abs() < config.evenness).float().mean())
        inner = tissue[0] + LEVEL_MARGIN_HU < level < tissue[1] - LEVEL_MARGIN_HU
        if not inner or even < MIN_EVEN_SHARE:
            continue
        if case.label is not None:
            tumors = _zoomed_cube((case.label == tumor_label), centre, source, side)
            if bool((tumors[shell | mask] > 0.1).any()):
                continue
        ratio = _contrast_ratio(contrast, own_level, level, rng, config, window)
        noise = host - smooth
        max_noise = 4 * float(noise[mask].abs().median())  # vessels are not noise
        change = profile * ratio
        if ratio < 0:  # what is darker than the rest of the tumour stays so: necrosis, washout
            inside = F.avg_pool3d(core(mask[None]).float(), 3, stride=1, padding=1)[0]
            change = change - 2 * ratio * inside * (profile - contrast).clamp(max=0)
        if config.structure and rng.random() < config.structure:
            change = _add_structure(change, mask, rng)
        painted = level + change + noise.clamp(-max_noise, max_noise)
        return host + feather * (painted - host)
    return hu


def _add_structure(change: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """Add a rim, a washed-out centre or both to a change in HU (1, side, side, side)."""
    rim_hu, centre_hu = float(rng.uniform(*RIM_HU)), float(rng.uniform(*CENTRE_HU))
    has_rim, has_centre = rng.random() < RIM_SHARE, rng.random() < CENTRE_SHARE
    if (6 * int(mask.sum()) / np.pi) ** (1 / 3) < CENTRE_FROM_MM:
        has_centre = False
    structure = (rim_hu if has_rim else 0.0, centre_hu if has_centre else 0.0)
    return add_structure(change[0], mask[0], structure, int(rng.integers(2**31)))[None]


def _contrast_ratio(
    contrast: float,
    own_level: float,
    level: float,
    rng: np.random.Generator,
    config: DenoiserTraining,
    window: Window,
) -> float:
    """Factor of a transplanted tumour's contrast in tissue of this level, within the window."""
    if config.contrast == "on":  # the whole range that may be asked for, sometimes inverted
        ratio = rng.uniform(0.15, 2.0) * (-1 if rng.random() < config.brighter else 1)
        if not window[0] < level + ratio * contrast < window[1]:
            ratio = abs(ratio)
    else:  # an unenhanced organ shows less contrast
        ratio = float(np.clip(level / own_level, 0.7, 1.3)) if own_level > 0 else 1.0
    margin = 0.05 * (window[1] - window[0])
    aim = np.clip(level + ratio * contrast, window[0] + margin, window[1] - margin) - level
    return float(aim) / contrast if abs(contrast) > MIN_CONTRAST_HU else 1.0
