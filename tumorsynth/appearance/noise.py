"""Match a change to the scan that it goes into: its sharpness, its noise and its slow variation.

The noise in a tumour is that of the tissue around it. A diffusion generator's change takes most of
the scan's noise away, which its autoencoder reproduces, and brings little back, which its denoiser
smooths. Inside a tumour the scan therefore keeps its own.

*Grain* is the width of a scan's noise: 1.4 times the standard deviation of the Gaussian that makes
white noise as correlated from voxel to voxel as the scan's. Smooth kernels, thick slices and
interpolation widen it, along with the scan's edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.contrast import core
from tumorsynth.devices import onto
from tumorsynth.fetching import Task, run_alone
from tumorsynth.geometry import Box, Floats3, Ints3, bounding_box
from tumorsynth.random_streams import substream

# Reconstruction kernels widen edges more than they correlate noise.
GRAIN_PER_NOISE_SIGMA = 1.4
MIN_GRAIN_VOXELS = 0.29  # standard deviation of a box one voxel wide: no scan is sharper
MAX_GRAIN_MM = 2.5  # a gradient without noise looks like endless grain
GRAIN_RADIUS_MM, MAX_GRAIN_RADIUS_VOXELS = 14.0, 24  # of the region in which grain is measured
MIN_NOISE_VOXELS = 30  # of organ, to measure its level and the standard deviation of its noise
MIN_PAIRS = 300  # of neighbouring organ voxels, to measure grain
MAX_NOISE_SDS = 3.0  # from the organ's median; beyond are vessels
NOISE_VARIANCE_KEPT = 0.9733  # share of normal noise's variance that remains within these limits

GENERATOR_GRAIN_MM = 0.7  # sharpness of generators' changes, that of thin slices
MIN_SOFTENING_MM = 0.2  # smaller differences in sharpness count as none

PROFILE_SIGMA_MM = 2.5  # of the filtered mask that stands for a voxel's depth in the tumour
DEEP_RADIUS_MM = 9.0  # of tumours whose depth that filter does not tell: a wider one has to
DEEP_SIGMA_SHARE = 1 / 3  # of the radius: its standard deviation
MAX_DEEPENING = 2.0  # of a tumour's mean change, by which its middle is deepened
SLOW_SIGMA_MM = 1.5  # what a Gaussian of this width leaves varies slowly
MAX_SLOW_SDS = 2.5  # of a scan's slow variation that is kept
MIN_EVENED_VOXELS = 64  # a smaller tumour has no inside to even out
MAX_OWN_VARIATION = 3.0  # of a tumour, over the slow variation of its scan
MAX_OWN_SHARE = 0.25  # of a tumour's mean change, which its own variation stays below
SHARP_UP_TO_MM = 16.0  # diameter of tumours whose edge is as sharp as the generator's
MAX_EDGE_PER_MM = 0.1  # of diameter beyond that: standard deviation of the widest edges
USUAL_FEATHER_MM = 1.5  # a wider feather means an infiltrating margin
MAX_OWN_GAIN = 3.0  # by which the slow variation that a generator paints is raised
MATCH_MARGIN_VOXELS = 6  # around a tumour, within which its change is matched
MIN_CORE_CHANGE_HU = 1.0  # a smaller change of the core is not restored
CORE_GAIN_RANGE = (0.5, 2.0)  # of the factor that restores the core's change
MAD_TO_SD = 1.4826  # standard deviation over median absolute deviation, of normal noise


class ScanNoise(NamedTuple):
    """The noise of a scan around one place.

    Args:
        grain_mm: width of its grain along each axis, at least 0.29 voxels and at most 2.5 mm; the
            least where there is too little organ or no noise.
        level_hu: median of the organ; None where there is too little of it.
        sd_hu: standard deviation of the organ without its vessels; None likewise.
    """

    grain_mm: Floats3
    level_hu: float | None
    sd_hu: float | None


def grain_region(tumor: Box, spacing: Sequence[float], sample_shape: Sequence[int]) -> Box:
    """Return the part of a sample around a tumour's middle in which `measure_grain` looks.

    Args:
        tumor: box around the tumour.
        spacing: mm per voxel.
        sample_shape: voxels of the sample.
    """
    middle = [a + n // 2 for a, n in zip(tumor.start, tumor.shape, strict=True)]
    radius = [min(MAX_GRAIN_RADIUS_VOXELS, math.ceil(GRAIN_RADIUS_MM / s)) for s in spacing]
    return Box.at(middle, (1, 1, 1)).grown(radius).within(Box.whole(sample_shape))


def measure_noise(hu: Tensor, organ: Tensor, spacing: Sequence[float]) -> ScanNoise:
    """Measure a scan's noise, with one host-device synchronisation.

    Args:
        hu: (X, Y, Z).
        organ: bool, same shape: the tissue to measure in.
        spacing: mm per voxel.
    """
    return run_alone(measuring_noise(hu, organ, spacing))


def measuring_noise(hu: Tensor, organ: Tensor, spacing: Sequence[float]) -> Task[ScanNoise]:
    """Return `measure_noise` as a task."""
    smallest = [MIN_GRAIN_VOXELS * s for s in spacing]
    found = yield from _organ_statistics(hu, organ)
    enough = found.voxels >= MIN_NOISE_VOXELS
    level, sd = (found.median, found.sd) if enough else (None, None)
    if found.voxels < MIN_PAIRS:
        return ScanNoise((smallest[0], smallest[1], smallest[2]), level, sd)
    grain = []
    for axis, s in enumerate(spacing):
        one, two, four = found.squared_differences[axis]
        sigma = GRAIN_PER_NOISE_SIGMA * s * _filter_sigma(two / one, 2) if one > 0 else 0.0
        if sigma > s and four > 0:  # interpolation between slices correlates voxels further apart
            sigma = GRAIN_PER_NOISE_SIGMA * s * _filter_sigma(four / one, 4)
        grain.append(min(max(sigma, smallest[axis]), max(MAX_GRAIN_MM, smallest[axis])))
    return ScanNoise((grain[0], grain[1], grain[2]), level, sd)


def unit_noise(
    shape: Sequence[int],
    stream: torch.Generator,
    grain_mm: Sequence[float],
    spacing: Sequence[float],
) -> Tensor:
    """Draw noise of a scan's grain with standard deviation 1, on the CPU.

    Args:
        shape: (X, Y, Z).
        stream: of random numbers.
        grain_mm: of the scan, along each axis.
        spacing: mm per voxel.
    """
    sigmas = [g / GRAIN_PER_NOISE_SIGMA / s for g, s in zip(grain_mm, spacing, strict=True)]
    return filtered_noise(shape, stream, sigmas)


def filtered_noise(
    shape: Sequence[int], stream: torch.Generator, sigmas: Sequence[float]
) -> Tensor:
    """Draw noise filtered with a Gaussian, with standard deviation 1, on the CPU.

    Args:
        shape: (X, Y, Z).
        stream: of random numbers.
        sigmas: of the Gaussian along each axis, in voxels.
    """
    noise = torch.randn(tuple(shape), generator=stream, dtype=torch.float32)
    noise = gaussian_filter(noise, sigmas)
    return noise / noise.std().clamp(min=1e-6)


def grain_of_subvoxels(
    grain_mm: Sequence[float], spacing: Sequence[float], factors: Ints3
) -> Floats3:
    """Return the grain that averaging over voxels does not account for.

    Args:
        grain_mm: of the scan, along each axis.
        spacing: mm per voxel.
        factors: subvoxels per voxel along each axis; with 1 the grain stays as it is.
    """
    x, y, z = (
        g if k == 1 else math.sqrt(max(g**2 - (MIN_GRAIN_VOXELS * s) ** 2, 0.0))
        for g, s, k in zip(grain_mm, spacing, factors, strict=True)
    )
    return x, y, z


def sample_edge_mm(seed: int, diameter_mm: float) -> float:
    """Return how much softer a tumour's edge is than a generator paints it.

    Annotated tumours above 30 mm are often ill-defined; small ones are not.

    Args:
        seed: of the tumour's shape.
        diameter_mm: equivalent diameter.

    Returns:
        Standard deviation in mm of the Gaussian to apply.
    """
    u = float(torch.rand((), generator=substream(seed, "edge"), dtype=torch.float64))
    return MAX_EDGE_PER_MM * max(diameter_mm - SHARP_UP_TO_MM, 0.0) * u


def infiltration_mm(sigma_mm: float) -> float:
    """Return the extra blur of an infiltrating margin, for a change that has a soft edge already.

    Args:
        sigma_mm: standard deviation sampled for the tumour.

    Returns:
        Standard deviation in mm of the Gaussian to apply.
    """
    return math.sqrt(max(sigma_mm**2 - USUAL_FEATHER_MM**2, 0.0))


def softening_mm(grain_mm: Sequence[float], edge_mm: float = 0.0) -> Floats3:
    """Return by how much to soften a generator's changes.

    Args:
        grain_mm: of the scan, along each axis.
        edge_mm: how much softer the tumour's edge is, as `sample_edge_mm` returns it.

    Returns:
        Standard deviation in mm of the Gaussian to apply, along each axis.
    """
    sigmas = (
        math.hypot(math.sqrt(max(g**2 - GENERATOR_GRAIN_MM**2, 0.0)), edge_mm) for g in grain_mm
    )
    x, y, z = (sigma if sigma >= MIN_SOFTENING_MM else 0.0 for sigma in sigmas)
    return x, y, z


def feather_mm(sigma_mm: float, grain_mm: Sequence[float]) -> Floats3:
    """Return the feather along each axis: as sampled, and never sharper than the scan.

    Args:
        sigma_mm: standard deviation sampled for the tumour.
        grain_mm: of the scan, along each axis.
    """
    x, y, z = (
        max(math.hypot(sigma_mm, softening), grain)
        for softening, grain in zip(softening_mm(grain_mm), grain_mm, strict=True)
    )
    return x, y, z


def sample_own_variation(seed: int) -> float:
    """Return the slow variation of a tumour's own, over that of its scan.

    It is small in half of the tumours, as in annotated ones.

    Args:
        seed: of the tumour's noise.
    """
    u = float(torch.rand((), generator=substream(seed, "own_variation"), dtype=torch.float64))
    return MAX_OWN_VARIATION * u**2


def match_to_scan(
    crop: Tensor,
    change: Tensor,
    tumor_mask: Tensor,
    grain_mm: Sequence[float],
    own_variation: float | None,
    edge_mm: float = 0.0,
) -> Tensor:
    """Make a change no sharper than its scan, and a tumour as noisy and as even as the tissue was.

    The mean of the tumour's core stays what it was.

    Args:
        crop: (X, Y, Z) in HU, 1 mm voxels, the healthy scan.
        change: HU, same shape.
        tumor_mask: bool, same shape. In the CPU's memory, it lets nothing wait for a GPU.
        grain_mm: of the scan, along the crop's axes.
        own_variation: what a tumour has of its own, over the scan's slow variation; None leaves the
            texture to the generator. Around the tumour's profile from outline to middle, the scan's
            noise and slow variation remain, and of the painted slow variation so much is added.
        edge_mm: how much softer the tumour's edge is, as `sample_edge_mm` returns it.

    Returns:
        A new change, or ``change`` itself where nothing has to be matched.
    """
    box = bounding_box(tumor_mask, MATCH_MARGIN_VOXELS)
    if box is None:
        return change
    mask, old = tumor_mask[box.slices], change[box.slices]
    # as indices, which on a GPU are not waited for again at each use
    where = _indices(mask, change.device)
    radius = (3 * len(where[0]) / (4 * math.pi)) ** (1 / 3)
    new = old
    if own_variation is not None and len(where[0]) >= MIN_EVENED_VOXELS:
        inside = onto(mask, change.device).to(torch.float32)
        new = new + _evening(crop[box.slices], old, inside, where, radius, own_variation)
    softening = softening_mm(grain_mm, edge_mm)
    new = gaussian_filter(new, [min(sigma, radius / 3) for sigma in softening])
    if new is old:
        return change
    in_core = _indices(core(mask[None, None])[0, 0], change.device)
    before, after = old[in_core].mean(), new[in_core].mean()
    # of a change that its softened edge has reached, the mean cannot be restored
    lost = (before * after <= 0) | (before.abs() <= MIN_CORE_CHANGE_HU)
    change = change.clone()
    change[box.slices] = new * torch.where(lost, 1.0, (before / after).clamp(*CORE_GAIN_RANGE))
    return change


def _indices(mask: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Where a mask is, along each axis, on a device."""
    return onto(mask.nonzero().T, device).unbind(0)


class _DepthProfile(NamedTuple):
    """A least-squares fit of values in a tumour by powers of the voxels' depth.

    powers: (N, K) of the depth of each voxel. normal: (K, K), the normal equations' matrix. order:
    the voxels from the outline to the middle; None for a small tumour.
    """

    powers: Tensor
    normal: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, inside: Tensor, where: tuple[Tensor, ...], radius_mm: float) -> _DepthProfile:
        depth = _depth(inside, where, PROFILE_SIGMA_MM)
        powers, order = [depth**k for k in range(4)], None
        if radius_mm > DEEP_RADIUS_MM:
            deep = _depth(inside, where, DEEP_SIGMA_SHARE * radius_mm)
            powers += [deep**k for k in range(1, 4)]
            order = deep.argsort(stable=True)
        stacked = torch.stack(powers, dim=1)
        ridge = 1e-3 * torch.eye(len(powers), dtype=depth.dtype, device=depth.device)
        return cls(stacked, stacked.T @ stacked + ridge, order)

    def fit(self, values: Tensor) -> Tensor:
        """What the profile explains of values (N, K)."""
        # solve would synchronise for its check
        factors, _ = torch.linalg.solve_ex(self.normal, self.powers.T @ values)
        return self.powers @ factors

    def deepening(self, fitted: Tensor) -> Tensor:
        """Return the addition that leaves a fitted change (N,) nowhere weaker than further out.

        Networks paint the middle of large tumours too pale, where they see little of the tissue
        around; annotated tumours are not paler there.
        """
        if self.order is None:
            return torch.zeros_like(fitted)
        mean = fitted.mean()
        sorted_change = mean.sign() * fitted[self.order]
        paler = sorted_change.cummax(0).values - sorted_change
        added = torch.empty_like(fitted)
        # a tumour as bright as the tissue has no middle to be paler
        added[self.order] = mean.sign() * torch.minimum(paler, MAX_DEEPENING * mean.abs())
        return added


def _depth(inside: Tensor, where: tuple[Tensor, ...], sigma_mm: float) -> Tensor:
    """Depth of each voxel of a tumour, as a filtered mask tells it, with mean 0 and spread 1."""
    depth = gaussian_filter(inside, [sigma_mm] * 3)[where].double()
    return (depth - depth.mean()) / depth.std().clamp(min=1e-6)


def _evening(
    hu: Tensor,
    change: Tensor,
    inside: Tensor,
    where: tuple[Tensor, ...],
    radius_mm: float,
    own_variation: float,
) -> Tensor:
    """What to add to a change so that the tumour is as noisy and as even as the tissue was.

    inside: 1 in the tumour, else 0. where: the tumour's voxels, as indices along each axis.
    """
    profile = _DepthProfile.of(inside, where, radius_mm)
    share = gaussian_filter(inside, [SLOW_SIGMA_MM] * 3).clamp(min=1e-3)

    # scan and change at once, which takes fewer operators
    both: tuple[slice | Tensor, ...] = (slice(None), *where)
    values = torch.stack([hu, change])[both]
    variation = inside.new_zeros(2, *inside.shape)
    fitted = profile.fit(values.double().T)
    variation[both] = (values.T - fitted).T.float()
    deeper = torch.zeros_like(inside)
    deeper[where] = profile.deepening(fitted[:, 1]).float()
    all_change = variation[1]
    healthy, slow_change = gaussian_filter(variation, [0.0, *[SLOW_SIGMA_MM] * 3]) / share
    painted = healthy + slow_change
    sd = MAD_TO_SD * healthy[where].abs().median()
    kept = healthy.clamp(-MAX_SLOW_SDS * sd, MAX_SLOW_SDS * sd)
    own_sd = torch.minimum(own_variation * sd, MAX_OWN_SHARE * values[1].mean().abs())
    gain = (own_sd / painted[where].std().clamp(min=1e-6)).clamp(max=MAX_OWN_GAIN)
    slow = kept - painted + gain * painted
    fine = slow_change - all_change
    # nothing at the outline, where the filter sees the mask end; all of it 1.5 mm further in
    reach = 2 * gaussian_filter(inside, [1.0] * 3)
    weight = (reach - 1).clamp(min=0)
    return deeper + inside * (weight * slow + reach.clamp(max=1) * fine)


class _OrganStatistics(NamedTuple):
    """Figures of the organ's voxels within `MAX_NOISE_SDS` of their median.

    squared_differences: their means over voxels 1, 2 and 4 apart along each axis, 0 where there are
    too few pairs. voxels: how many the organ has.
    """

    squared_differences: list[list[float]]
    voxels: float
    median: float
    sd: float


def _organ_statistics(hu: Tensor, organ: Tensor) -> Task[_OrganStatistics]:
    hu = hu.float()
    organ = organ & hu.isfinite()
    median, organ_voxels = masked_median(hu, organ), organ.sum()
    sd = MAD_TO_SD * masked_median((hu - median).abs(), organ)
    fits = organ & ((hu - median).abs() <= MAX_NOISE_SDS * sd)
    hu = torch.where(fits, hu - median, 0.0)
    # not the median absolute deviation: of whole HU it has whole steps
    variance = hu.square().sum() / fits.sum() / NOISE_VARIANCE_KEPT
    sums = [_difference_sum(hu, fits, axis, step) for axis in range(3) for step in (1, 2, 4)]
    totals, pairs = zip(*sums, strict=True)
    figures = torch.stack([*totals, median, variance])
    counts = torch.stack([*pairs, organ_voxels]).to(hu.dtype)
    figures, counts = yield [figures, counts]
    *squares, level, squared = figures.tolist()
    *numbers_of_pairs, count = counts.tolist()
    means = [
        total / number if number >= MIN_PAIRS else 0.0
        for total, number in zip(squares, numbers_of_pairs, strict=True)
    ]
    differences = [means[0:3], means[3:6], means[6:9]]
    return _OrganStatistics(differences, count, level, math.sqrt(squared))


def masked_median(values: Tensor, where: Tensor) -> Tensor:
    """Median of the voxels of a mask, without a synchronisation; NaN where it is empty."""
    return torch.where(where, values, torch.nan).nanmedian()


def _difference_sum(hu: Tensor, fits: Tensor, axis: int, step: int) -> tuple[Tensor, Tensor]:
    """Sum of the squared differences of voxels ``step`` apart, and the number of pairs."""
    n = max(0, hu.shape[axis] - step)
    last = hu.shape[axis] - n
    both = fits.narrow(axis, 0, n) & fits.narrow(axis, last, n)
    difference = hu.narrow(axis, last, n) - hu.narrow(axis, 0, n)
    return (difference.square() * both).sum(), both.sum()


def _filter_sigma(ratio: float, distance: int) -> float:
    """Standard deviation, in voxels, of the Gaussian that filtered white noise.

    ratio: of the mean squared differences ``distance`` voxels and one voxel apart. Such noise is
    correlated by p^(distance^2) and p, so that the ratio is (1 - p^(distance^2)) / (1 - p).
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        p = (low + high) / 2
        low, high = (p, high) if (1 - p**distance**2) / (1 - p) < ratio else (low, p)
    return 0.0 if p < 1e-6 else 0.5 / math.sqrt(-math.log(min(p, 1 - 1e-6)))
