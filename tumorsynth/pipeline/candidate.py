"""Blend a painted tumour into its region of the scan, and measure what it shows there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tumorsynth.appearance.blend import feather, gaussian_filter
from tumorsynth.appearance.noise import SLOW_SIGMA_MM, softening_mm
from tumorsynth.appearance.visibility import is_faint, section_mm2, visibility
from tumorsynth.devices import onto
from tumorsynth.fetching import Task
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.intensity import Intensity
from tumorsynth.pipeline.records import Candidate, PaintRequest, Sample
from tumorsynth.pipeline.settings import Settings
from tumorsynth.subvoxels import ONE, average_subvoxels, repeat_voxels

MIN_CHANGED_SHARE = 0.5  # of a tumour's voxels


def blend_candidate(
    settings: Settings,
    generator: TumorGenerator,
    request: PaintRequest,
    generated: Tensor,
    sample: Sample,
) -> Task[Candidate]:
    """Blend a painted tumour into its region and measure it; the sample stays as it is."""
    blend = _blend(settings, generator, request, generated, sample)
    return _measure(blend, request, settings.intensity, must_darken(generator, request))


def must_darken(generator: TumorGenerator, request: PaintRequest) -> bool:
    """Whether a tumour has to be darker than the tissue: unless the user chose its contrast."""
    return request.tumor.params.contrast_hu is None and getattr(generator, "darkens", False)


class _Blend(NamedTuple):
    """A tumour blended into its region.

    Args:
        before: the region's image.
        healthy: the same in at least float32, with the background filled and vessels covered.
        after: the region's image with the tumour.
        fine_weight: the blend weights, on the region's subvoxels.
        fine_change_hu: what the generator changed, on the region's subvoxels.
        change_hu: the same, averaged over the region's voxels.
    """

    before: Tensor
    healthy: Tensor
    after: Tensor
    fine_weight: Tensor
    fine_change_hu: Tensor
    change_hu: Tensor


def _blend(
    settings: Settings,
    generator: TumorGenerator,
    request: PaintRequest,
    generated: Tensor,
    sample: Sample,
) -> _Blend:
    tumor, region, factors = request.tumor, request.region, request.tumor.factors
    fill, intensity, grid = request.fill, settings.intensity, request.fine_grid
    weight = feather(
        request.fine_inside,
        request.feather_mm,
        grid.frame.spacing,
        settings.blend,
        generator.own_edge,
        tumor.fine_voxels,
        softening_mm(request.fine_grain_mm, request.edge_mm),
        grid.frame.shear,
    )
    generated = grid.carry_back(generated, request.fine_region)
    before = sample.image[region.slices].clone()
    # computed in at least float32; float64 stays float64, to keep its digits and range
    healthy = before.to(torch.promote_types(before.dtype, torch.float32))
    if fill is not None:
        healthy = healthy + fill.change_hu / intensity.hu_per_unit
        other_tissue = repeat_voxels(fill.other_tissue, factors)
        weight = torch.where(other_tissue, fill.weight, weight)
    if request.vessels_hu is not None:
        covered = average_subvoxels(weight, factors) * request.vessels_hu
        healthy = healthy + covered / intensity.hu_per_unit
    if settings.blend != "change":
        # clamped as in the generator's crop, so that gas and bone beyond the window do not change
        low, high = generator.window
        hu = intensity.to_hu(healthy.float()).clamp(low, high)
        if generator.keeps_detail:
            generated = generated + _resampling_loss(settings, request, before, generator.window)
        generated = generated - repeat_voxels(hu, factors)
    fine_change = weight * generated
    change = average_subvoxels(fine_change, factors)
    after = healthy + change / intensity.hu_per_unit
    if fill is not None and fill.keep_brighter:
        after = torch.where(fill.other_tissue, torch.maximum(after, before), after)
    if intensity.limits is not None:
        after = after.clamp(*intensity.limits)
    after = after.to(before.dtype)
    reached = average_subvoxels(weight, factors) > 0
    keep = reached & before.isfinite() & after.isfinite()  # in float16 a sum may overflow
    if request.unsuited is not None:
        keep &= ~request.unsuited
    after = torch.where(keep, after, before)
    return _Blend(before, healthy, after, weight, fine_change, change)


def _measure(
    blend: _Blend, request: PaintRequest, intensity: Intensity, darkens: bool
) -> Task[Candidate]:
    """Measure a blended tumour."""
    before, after, inside = blend.before, blend.after, request.inside
    tumor, region = request.tumor, request.region
    # a tumour that changes nothing gets no label, as in air or at the end of a clipped scale
    changed = (after != blend.healthy.to(before.dtype)).logical_and_(inside).sum()
    peak = (blend.fine_weight * request.fine_inside).amax()
    # indexing by voxel avoids a synchronisation, which indexing by mask needs on a GPU
    offset = torch.tensor(tumor.start) - torch.tensor(region.start)
    voxels = onto((tumor.mask.nonzero() + offset).T, before.device).unbind(0)
    inside_before, inside_after = before.float()[voxels], after.float()[voxels]
    change = (inside_after - inside_before).mean() * intensity.hu_per_unit
    painted = (inside_after - blend.healthy.float()[voxels]).mean() * intensity.hu_per_unit
    level = intensity.to_hu(inside_after).mean()
    shown_hu = blend.change_hu[voxels].mean()
    true_hu = shown_hu
    if tumor.factors != ONE:
        true_hu = (blend.fine_change_hu * request.fine_inside).sum() / tumor.fine_voxels
    spread = _spread_of_structure(blend, request, voxels)
    figures = (changed, peak, change, painted, level, true_hu, shown_hu, spread)
    (numbers,) = yield [torch.stack([number.to(peak) for number in figures])]
    changed_voxels, peak_weight, mean_change, mean_painted, *means = numbers.tolist()
    mean_hu, true_hu, shown_hu, spread_hu = means
    contrast = seen = from_tissue = None
    # what was darker before, as the organ's border, is no tumour, and what was brighter no contrast
    if request.fill is None and math.isfinite(mean_painted):
        from_tissue = mean_painted
    changes = [] if from_tissue is None else [from_tissue]
    if request.noise.level_hu is not None and math.isfinite(mean_hu):
        contrast = mean_hu - request.noise.level_hu
        changes.append(contrast)
    excess = max(changes, default=0.0)
    is_too_bright = darkens and excess > 0
    if contrast is not None:
        shown = min(abs(change) for change in changes)
        if darkens:
            shown = max(-max(changes), 0.0)
        shown = math.hypot(shown, spread_hu)  # as a matched filter sees a pattern
        spacing = request.grid.frame.spacing
        section = section_mm2(tumor.mask, tumor.diameter_mm, spacing)
        seen = visibility(shown, section, request.noise, spacing)
        # noise alone makes a faint tumour's place brighter
        if is_too_bright and is_faint(visibility(excess, section, request.noise, spacing)):
            is_too_bright = False
    has_change = changed_voxels >= MIN_CHANGED_SHARE * tumor.voxels
    return Candidate(
        after=after,
        peak_weight=peak_weight,
        hu_change=mean_change,
        from_tissue_hu=from_tissue,
        true_contrast_hu=true_hu,
        visible_contrast_hu=shown_hu,
        contrast_hu=contrast,
        visibility=seen,
        has_change=has_change,
        excess_hu=excess,
        is_too_bright=is_too_bright,
    )


def _spread_of_structure(
    blend: _Blend, request: PaintRequest, voxels: tuple[Tensor, ...]
) -> Tensor:
    """Standard deviation of a tumour with rim, necrotic core or lumps, in HU, without its noise.

    Bright and dark parts cancel in a mean, and are seen all the same.
    """
    if not request.tumor.params.has_structure:
        return blend.change_hu.new_zeros(())
    sigmas = [SLOW_SIGMA_MM / s for s in request.grid.frame.spacing]
    inside = request.inside.to(blend.change_hu.dtype)
    slow = gaussian_filter(inside * blend.change_hu, sigmas)[voxels]
    return (slow / gaussian_filter(inside, sigmas)[voxels]).std(correction=0)


def _resampling_loss(
    settings: Settings, request: PaintRequest, before: Tensor, window: tuple[float, float]
) -> Tensor:
    """Return what resampling to the generator's 1 mm and back removes from a region, in HU.

    Where the sample's voxels are finer, that is most of its noise.
    """
    low, high = window
    hu = settings.intensity.to_hu(before.float())
    if request.fill is not None:
        hu = hu + request.fill.generator_change_hu
    crop_hu = request.crop * (high - low) + low
    resampled = request.fine_grid.carry_back(crop_hu, request.fine_region)
    hu = hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
    return repeat_voxels(hu, request.tumor.factors) - resampled
