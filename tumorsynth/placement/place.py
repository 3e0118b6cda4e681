"""Place tumours: decide which voxels of an organ each tumour takes, on the label's own grid.

`place` goes through these steps for every tumour:

1. `sample_tumor` draws its size, shape and seeds.
2. `centres` samples candidate centres in the allowed voxels and ranks them.
3. `rasterize` turns the shape at a centre into voxels. If they do not fit, the next centre is
   tried, then a smaller size.

Before these steps, `organ.organ_box` looks at every voxel of the volume once; the steps themselves
cost the same in a larger volume. Placement runs on the CPU, with numpy for small arrays (torch has
more overhead per call) and levels in float64, so that every machine places the same tumours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tumorsynth.fetching import Task, run_alone
from tumorsynth.geometry import Rows3
from tumorsynth.placement import skip_reasons
from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.arguments import check_spacing
from tumorsynth.placement.centres import rank_exophytic, rank_inside, sample_candidates
from tumorsynth.placement.components import largest_component_voxels
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.rasterize import (
    MIN_SMOOTH_VOXELS,
    equivalent_diameter,
    flatness,
    rasterize,
    snap_diameter,
)
from tumorsynth.placement.sample_tumor import SEED_LIMIT, SampledTumor, sample_tumor
from tumorsynth.placement.settings import PlacementSettings, SizeRange
from tumorsynth.placement.shape import Shape
from tumorsynth.placement.types import GrowthRegion, LocalMask, Skip, SkipCode, TumorParams
from tumorsynth.subvoxels import refine_spacing, subvoxel_factors

CENTRES_PER_SIZE = 4  # centres rasterised before the tumour is made smaller
MAX_UNSUITED_PLACES = 24  # at which a tumour would fit, before it is skipped
SIZE_STEPS = 5  # sizes tried, from the sampled one down to the smallest allowed
MAX_FAILED_TUMORS = 8  # tumours in a row without room, after which no more are tried
MIN_FLATNESS = 0.33  # shortest / longest axis once the organ cuts a tumour; 95 % of real ones
CUT_FLATNESS_FACTOR = 0.7  # of its own flatness, that a flat shape must keep
MAX_ORGAN_SHARE = 0.25  # of the organ, that a tumour of a prior's size may take
COARSE_POINTS = 24  # along each axis of the grid on which the organ's volume is estimated

Objection = Callable[[LocalMask], Task[Skip | None]]  # why a tumour must not lie where it is


@torch.no_grad()
def place(
    region: OrganRegion,
    spacing: Sequence[float],
    settings: PlacementSettings,
    rng: torch.Generator,
    growth: GrowthRegion | None = None,
    shear: Rows3 | None = None,
    objection: Objection | None = None,
    vertical: int = 2,
) -> list[LocalMask | Skip]:
    """Place tumours in an organ.

    A tumour that does not fit is made smaller, down to the smallest size allowed, before it is
    skipped. The number of attempts is bounded.

    Args:
        region: the organ, on any device.
        spacing: mm per voxel.
        settings: how many tumours, how large, and what they look like.
        rng: the sample's CPU generator. Each tumour takes one seed from it and draws everything
            else from that seed, so that tumours do not depend on each other's draws.
        growth: where tumours may grow beyond the organ; without it ``settings.bulge`` has no
            effect.
        shear: of the sample's axes; see `tumorsynth.geometry.Frame`.
        objection: a task that judges each tumour where it fits; of one that is objected to
            everywhere, the first objection is returned. None accepts every place.
        vertical: the axis along which upright shapes stand (`PlacementSettings.own_shapes`).

    Returns:
        One `LocalMask` or `Skip` for each tumour, in order.

    Examples:
        >>> region = OrganRegion.of_label(label, organ_labels=1)
        >>> settings = PlacementSettings(size_mm=(5, 20), count=3)
        >>> place(region, (0.8, 0.8, 2.5), settings, torch.Generator().manual_seed(0))
    """
    return run_alone(placing(region, spacing, settings, rng, growth, shear, objection, vertical))


def placing(
    region: OrganRegion,
    spacing: Sequence[float],
    settings: PlacementSettings,
    rng: torch.Generator,
    growth: GrowthRegion | None = None,
    shear: Rows3 | None = None,
    objection: Objection | None = None,
    vertical: int = 2,
) -> Task[list[LocalMask | Skip]]:
    """Return `place` as a task."""
    spacing = check_spacing(spacing)
    wanted = settings.draw_count(rng)
    seeds = torch.randint(SEED_LIMIT, (wanted,), generator=rng).tolist()
    if region.organ_box is None:
        reason = skip_reasons.no_organ(region.organ_labels)
        return [Skip(SkipCode.NO_ORGAN, reason)] * wanted

    region = yield from region.fetch()
    allowed = AllowedVoxels(region, spacing, settings.gap_mm, shear)
    sizes = _sizes_for(settings, allowed)
    results: list[LocalMask | Skip] = []
    failed_in_a_row = 0
    for seed in seeds:
        if failed_in_a_row == MAX_FAILED_TUMORS:  # each attempt searches the organ
            reason = skip_reasons.no_room_before(sizes.low, MAX_FAILED_TUMORS)
            results.append(Skip(SkipCode.NO_ROOM, reason))
            continue
        if results and isinstance(results[-1], LocalMask) and not settings.merge:
            allowed.keep_clear_of(results[-1])
        tumor_rng = torch.Generator().manual_seed(seed)
        sampled = sample_tumor(settings, sizes, growth is not None, tumor_rng, vertical)
        result = yield from _fit(sampled, allowed, sizes, growth, tumor_rng, objection)
        failed_in_a_row = 0 if isinstance(result, LocalMask) else failed_in_a_row + 1
        results.append(result)
    return results


@torch.no_grad()
def place_from_params(
    params: TumorParams,
    region: OrganRegion,
    spacing: Sequence[float],
    *,
    earlier: Sequence[LocalMask] = (),
    gap_mm: float = 2.0,
    growth: GrowthRegion | None = None,
    shear: Rows3 | None = None,
) -> LocalMask | Skip:
    """Place one tumour again, from its params alone.

    Args:
        params: of a tumour that `place` returned.
        region: the organ that it was placed in.
        spacing: mm per voxel.
        earlier: the tumours placed before it, in order; none if tumours may merge.
        gap_mm: organ left between two tumours.
        growth: where tumours may grow beyond the organ.
        shear: of the sample's axes.

    Raises:
        ValueError: if the centre lies outside the sample.
    """
    shape = region.sample_shape
    if not all(0 <= c < n for c, n in zip(params.centre, shape, strict=True)):
        raise ValueError(
            f"the tumour's centre {params.centre} lies outside the label {shape}; "
            "params replay only on a label of the shape they were drawn for"
        )
    allowed = AllowedVoxels(region.to_cpu(), check_spacing(spacing), gap_mm, shear)
    for tumor in earlier:
        allowed.keep_clear_of(tumor)
    result = rasterize(params, Shape(params, shear), allowed, growth if params.bulge > 0 else None)
    if isinstance(result, LocalMask):
        return result
    return Skip(SkipCode.NO_ROOM, skip_reasons.no_room_again(params.diameter_mm))


def _fit(
    sampled: SampledTumor,
    allowed: AllowedVoxels,
    sizes: SizeRange,
    growth: GrowthRegion | None,
    rng: torch.Generator,
    objection: Objection | None,
) -> Task[LocalMask | Skip]:
    """Find a centre for a tumour, making it smaller if need be."""
    params = sampled.params
    if params.bulge == 0:
        growth = None
    candidates = sample_candidates(allowed, rng)
    if len(candidates) == 0:
        return Skip(SkipCode.NO_ROOM, skip_reasons.NO_FREE_VOXEL, params.drawn_mm)
    most_mm3 = 0.0
    unsuited: list[Skip] = []
    diameters_mm = _shrinking_diameters(params, sizes)
    for step, diameter_mm in enumerate(diameters_mm):
        factors = subvoxel_factors(allowed.spacing, diameter_mm)
        diameter_mm = snap_diameter(diameter_mm, *sizes, allowed.voxel_mm3 / math.prod(factors))
        smaller = replace(params, diameter_mm=diameter_mm)
        shape = Shape(smaller, allowed.shear)
        if growth is not None:
            centres = rank_exophytic(shape, allowed, candidates, params.bulge, growth, rng)
        else:
            centres = rank_inside(
                shape,
                allowed,
                candidates,
                touches_capsule=sampled.touches_capsule,
                keep_best=step == len(diameters_mm) - 1,
            )
        tries = CENTRES_PER_SIZE
        for centre in centres:
            x, y, z = centre.tolist()
            result = rasterize(replace(smaller, centre=(x, y, z)), shape, allowed, growth)
            if not isinstance(result, LocalMask):
                most_mm3 = max(most_mm3, result)
            elif not _is_sliver(result, shape, allowed):
                found = None if objection is None else (yield from objection(result))
                if found is None:
                    return result
                unsuited.append(found)
                if len(unsuited) == MAX_UNSUITED_PLACES:
                    return unsuited[0]
                continue  # another place, of the same size
            tries -= 1
            if tries == 0:
                break
    if unsuited:
        return unsuited[0]
    largest_mm = equivalent_diameter(most_mm3)
    return Skip(SkipCode.NO_ROOM, skip_reasons.no_room(sizes.low, largest_mm), params.drawn_mm)


def _is_sliver(tumor: LocalMask, shape: Shape, allowed: AllowedVoxels) -> bool:
    """Whether the organ cut a tumour so flat that it no longer looks like one."""
    if tumor.voxels < MIN_SMOOTH_VOXELS:
        return False
    min_flatness = min(MIN_FLATNESS, CUT_FLATNESS_FACTOR * shape.flatness())
    spacing = refine_spacing(allowed.spacing, tumor.factors)
    return flatness(tumor.fine_mask, spacing, allowed.shear) < min_flatness


def _shrinking_diameters(params: TumorParams, sizes: SizeRange) -> list[float]:
    """Return the sizes to try, from the sampled one to the smallest, in equal ratios."""
    sampled_mm = params.drawn_mm
    if sampled_mm <= sizes.low * 1.01:
        return [sampled_mm]
    ratio = sizes.low / sampled_mm
    return [sampled_mm * ratio ** (step / (SIZE_STEPS - 1)) for step in range(SIZE_STEPS)]


def _sizes_for(settings: PlacementSettings, allowed: AllowedVoxels) -> SizeRange:
    """Return the range of sizes; a prior's, which knows no organ, ends at MAX_ORGAN_SHARE."""
    sizes = settings.size_range
    if settings.size_prior is None:
        return sizes
    organ_mm3 = _largest_organ_voxels(allowed) * allowed.voxel_mm3
    cap_mm = max(sizes.low, equivalent_diameter(MAX_ORGAN_SHARE * organ_mm3))
    return SizeRange(sizes.low, min(sizes.high, cap_mm))


def _largest_organ_voxels(allowed: AllowedVoxels) -> int:
    """Estimate the voxels of the organ's largest component (one kidney of two) on a coarse grid."""
    box = allowed.organ_box
    assert box is not None
    slices = []
    for a, b in zip(box.start, box.stop, strict=True):
        start, stop = max(0, a - 1), b + 1
        step = max(1, math.ceil((stop - start) / COARSE_POINTS))
        slices.append(slice(start + step // 2, stop, step))
    return largest_component_voxels(allowed.organ_on_grid(slices)) * math.prod(
        s.step for s in slices
    )
