"""Cover vessels, so that they end at a tumour instead of shining through it."""

from __future__ import annotations

import torch
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.noise import MAD_TO_SD, masked_median, unit_noise
from tumorsynth.devices import onto
from tumorsynth.geometry import Floats3
from tumorsynth.random_streams import substream

SEEN_SIGMA_MM = 1.0  # of the filtered organ in which vessels are looked for
MIN_VESSEL_SDS = 2.5  # of a vessel above the organ's level, in that organ's variation below it
EDGE_GAIN = 3.0  # of the filtered vessels: covers their edges, and few single voxels of noise
TISSUE_SIGMA_MM = 3.0  # of the tissue around a vessel that takes its place
LEVEL_WEIGHT = 0.02  # of the organ's level, beside the share of tissue within that Gaussian
# Where noise is copied from, in shares of the region along x and y: a copy is as correlated as the
# original. Noise is drawn where none of these places holds tissue.
SHIFTS = ((1 / 3, 0), (0, 1 / 3), (1 / 4, -1 / 4))


def cover_vessels(
    hu: Tensor, organ: Tensor, spacing: Floats3, grain_mm: Floats3, shape_seed: int
) -> Tensor:
    """Compute the change that replaces an organ's vessels by adjacent tissue, noise included.

    Needs no host-device synchronisation.

    Args:
        hu: (X, Y, Z), the tumour and some mm around it, before it is painted.
        organ: bool, same shape.
        spacing: mm per voxel.
        grain_mm: of the scan, along each axis.
        shape_seed: of the tumour; noise is drawn from it.

    Returns:
        (X, Y, Z) in HU; 0 beside vessels and outside the organ.
    """
    organ = organ & hu.isfinite()
    part = organ.to(hu.dtype)
    hu = torch.where(organ, hu, 0.0)
    sigmas, wide = ([0.0, *(mm / s for s in spacing)] for mm in (SEEN_SIGMA_MM, TISSUE_SIGMA_MM))
    total, share = gaussian_filter(torch.stack([hu, part]), sigmas)
    smooth = total / share.clamp(min=1e-3)
    level = masked_median(smooth, organ).nan_to_num()
    below = level - smooth  # vessels are on the other side
    sd = MAD_TO_SD * masked_median(below, organ & (below > 0)).nan_to_num()
    usual = below.abs() <= MIN_VESSEL_SDS * sd
    vessel = organ & ~usual & (below < 0)
    cover = (EDGE_GAIN * gaussian_filter(vessel.to(hu.dtype), sigmas[1:])).clamp(max=1) * part

    tissue = part - cover
    total, share = gaussian_filter(torch.stack([tissue * hu, tissue]), wide)
    around = (total + LEVEL_WEIGHT * level) / (share + LEVEL_WEIGHT)
    own_noise, usable = hu - around, usual & (tissue >= 1)
    stream = substream(shape_seed, "vessel_noise")
    drawn = onto(unit_noise(hu.shape, stream, grain_mm, spacing), hu.device)
    noise_sd = MAD_TO_SD * masked_median(level - hu, organ & (hu < level)).nan_to_num()
    noise, found = noise_sd * drawn, ~organ
    for shares in SHIFTS:
        shifts = [round(share * n) for share, n in zip(shares, hu.shape, strict=False)]
        moved = usable.roll(shifts, (0, 1))
        noise = torch.where(moved & ~found, own_noise.roll(shifts, (0, 1)), noise)
        found = found | moved
    return cover * (around + noise - hu)
