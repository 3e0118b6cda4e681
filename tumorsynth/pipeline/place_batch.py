"""Place the tumours of a batch: from seeds, or from params, to the voxels of each tumour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tumorsynth.fetching import Task, run_or_on_cpu, run_together
from tumorsynth.geometry import Box, ints3
from tumorsynth.intensity_check import checking_intensity
from tumorsynth.pipeline.label_map_check import label_values
from tumorsynth.pipeline.organ_search import OrganSearch
from tumorsynth.pipeline.params_grid import ParamsGrid
from tumorsynth.pipeline.records import Sample, SampleParams
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.tissue_check import TissueCheck
from tumorsynth.placement import skip_reasons
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.exophytic import ExophyticRegion
from tumorsynth.placement.growth import grow_in_organ
from tumorsynth.placement.organ import OrganRegion, is_organ
from tumorsynth.placement.place import place_from_params, placing
from tumorsynth.placement.types import LocalMask, Skip, SkipCode

MAX_NOT_FINITE_SHARE = 0.5  # of the organ; beyond it, the reason for no room


@dataclass(frozen=True)
class PlacedSample:
    """The tumours of one sample, before any of them is painted.

    Args:
        params: what is random about the sample.
        results: one entry for each tumour asked for, in order.
        replayed: the entry of ``params`` that this repeats; None for a new sample.
        new_contrast: whether a replay draws the contrast anew, as for another phase.
        tumor_box: around the voxels that had the value of ``tumor_label`` before, if they matter.
    """

    params: SampleParams
    results: list[LocalMask | Skip]
    replayed: Mapping[str, Any] | None = None
    tumor_box: Box | None = None
    new_contrast: bool = False

    @property
    def drawn(self) -> SampleParams | None:
        """The params, while they are being drawn; None on a replay."""
        return None if self.replayed is not None else self.params

    @property
    def with_contrast(self) -> SampleParams | None:
        """The params, while contrasts are being drawn; None on a replay that repeats them."""
        return self.params if self.new_contrast else self.drawn

    def to_params(self) -> dict[str, Any]:
        """Return the sample's entry of ``synth.params``."""
        if self.replayed is None or self.new_contrast:
            return self.params.to_dict()
        return dict(self.replayed)


def place_samples(
    settings: Settings,
    samples: Sequence[Sample],
    seeds: Sequence[int],
    replayed: Sequence[Mapping[str, Any]] | None = None,
    exclude: Mapping[int, Skip] | None = None,
    tissue: TissueCheck | None = None,
    new_contrast: bool = False,
) -> list[PlacedSample]:
    """Place the tumours of a batch.

    Args:
        settings: of the transform.
        samples: of the batch.
        seeds: one for each sample; without effect on a replay.
        replayed: params of an earlier call, to place the same tumours.
        exclude: why samples of these numbers get no tumour.
        tissue: where the generator may paint; None for anywhere.
        new_contrast: whether a replay draws the contrasts anew.

    Raises:
        ValueError: if an image that is to get tumours cannot be in the scale of ``intensity``.
    """

    def place_one(sample: Sample) -> Task[PlacedSample]:
        excluded = (exclude or {}).get(sample.number)
        if excluded is not None:
            return PlacedSample(skip_sample(excluded), [])
        if replayed is None:
            work = partial(place_sample, settings, sample, seeds[sample.number], tissue=tissue)
        else:
            work = partial(replay_sample, settings, sample, replayed[sample.number], tissue=tissue)
        placed = yield from run_or_on_cpu("placing tumours", sample.image.device, work)
        return replace(placed, new_contrast=True) if new_contrast else placed

    return run_together(place_one(sample) for sample in samples)


def place_sample(
    settings: Settings,
    sample: Sample,
    seed: int,
    device: torch.device,
    tissue: TissueCheck | None = None,
) -> Task[PlacedSample]:
    """Sample and place the tumours of one sample.

    Args:
        settings: of the transform.
        sample: the scan or patch.
        seed: decides everything about the sample's tumours.
        device: where to search the label.
        tissue: where the generator may paint.
    """
    sample = sample.to(device)
    rng = torch.Generator().manual_seed(seed)
    if float(torch.rand((), generator=rng, dtype=torch.float64)) >= settings.p:
        return PlacedSample(not_selected(settings, seed), [])
    found = yield from OrganSearch.of(settings, sample)
    box = found.organ_box
    if box is None:
        reason = _no_organ(settings, sample.label)
        return PlacedSample(SampleParams(seed, SkipCode.NO_ORGAN, reason), [])
    yield from _check_intensity(settings, sample)  # first: tissue is judged in HU
    placement = settings.placement
    region = yield from organ_region(settings, sample, tissue, found)
    growth = None
    if placement.bulge is not None:
        growth = yield from growth_region(settings, sample)
    frame = sample.frame
    objection = None if tissue is None else partial(tissue.objection, sample)
    results = yield from placing(
        region,
        frame.spacing,
        placement,
        rng,
        growth,
        frame.shear,
        objection,
        frame.slice_axis,
    )
    if results and all(isinstance(result, Skip) for result in results):
        share = yield from _not_finite_share(settings, sample)
        if share > MAX_NOT_FINITE_SHARE:
            skip = Skip(SkipCode.NOT_FINITE, skip_reasons.not_finite(share))
            results = [skip] * len(results)
        elif tissue is not None:
            results = yield from _explained(results, sample, tissue, box)
    results = [r if isinstance(r, Skip) else _with_displacement(settings, r) for r in results]
    tumors = [result.params for result in results if isinstance(result, LocalMask)]
    grid = ParamsGrid(ints3(sample.label.shape), frame)
    params = SampleParams(seed, tumors=tumors, grid=grid)
    return PlacedSample(params, results, tumor_box=region.tumor_box)


def skip_sample(skip: Skip) -> SampleParams:
    """Return the params of a sample that is skipped for this reason before anything is drawn."""
    return SampleParams(None, skip.code, skip.reason)


def not_selected(settings: Settings, seed: int | None) -> SampleParams:
    """Return the params of a sample that the probability p leaves out."""
    return SampleParams(seed, SkipCode.NOT_SELECTED, skip_reasons.not_selected(settings.p))


def replay_sample(
    settings: Settings,
    sample: Sample,
    recorded: Mapping[str, Any],
    device: torch.device,
    tissue: TissueCheck | None = None,
) -> Task[PlacedSample]:
    """Place the tumours of recorded params again.

    Args:
        settings: of the transform.
        sample: the scan or patch that the params were drawn for.
        recorded: an entry of ``synth.params``.
        device: where to search the label.
        tissue: where the generator may paint. The params have chosen the places, in which only
            voxels that hold no tissue are left out.
    """
    params = SampleParams.from_dict(recorded)
    results: list[LocalMask | Skip] = []
    if not params.tumors:
        return PlacedSample(params, results, recorded)
    if sample.first_phase is not None:
        yield from _check_intensity(settings, sample)
    sample = sample.for_placing.to(device)
    yield from _check_intensity(settings, sample)
    placement = settings.placement
    region = yield from organ_region(settings, sample, tissue)
    growth = None
    if any(tumor.bulge for tumor in params.tumors):
        growth = yield from growth_region(settings, sample)
    for tumor in params.tumors:
        earlier = [] if placement.merge else [r for r in results if isinstance(r, LocalMask)]
        results.append(
            place_from_params(
                tumor.first,
                region,
                sample.frame.spacing,
                earlier=earlier,
                gap_mm=placement.gap_mm,
                growth=growth,
                shear=sample.frame.shear,
            )
        )
    if any(tumor.first_mm is not None for tumor in params.tumors):
        results = grow_in_organ(
            params.tumors,
            results,
            region,
            sample.frame.spacing,
            gap_mm=placement.gap_mm,
            merge=placement.merge,
            growth=growth,
            shear=sample.frame.shear,
        )
    return PlacedSample(params, results, recorded)


def _no_organ(settings: Settings, label: Tensor) -> str:
    label_map = settings.label_map
    if label_map is None:
        return skip_reasons.no_organ(settings.organ_labels)
    found = [v for v in label_values(label) if v]
    return skip_reasons.no_named_organ(
        label_map.describe(settings.organ_labels),
        label_map.source,
        label_map.describe(found) or "0 alone",
    )


def _check_intensity(settings: Settings, sample: Sample) -> Task[None]:
    return checking_intensity(sample.image, settings.intensity, sample.label, settings.organ_labels)


def growth_region(settings: Settings, sample: Sample) -> Task[ExophyticRegion]:
    """Return where a sample's tumours may grow beyond the organ, on the CPU."""
    image, label = yield [sample.image, sample.label]
    return ExophyticRegion(
        image,
        label,
        settings.organ_labels,
        sample.frame.plane_distance,
        settings.intensity,
    )


def organ_region(
    settings: Settings,
    sample: Sample,
    tissue: TissueCheck | None = None,
    found: OrganSearch | None = None,
) -> Task[OrganRegion]:
    """Return the organ of a sample, on the CPU.

    It forbids voxels that are not finite, and earlier tumours with their gap. It is on the CPU
    since placement makes many small decisions, each of which would synchronise with a GPU.

    Args:
        settings: of the transform.
        sample: the scan or patch.
        tissue: where the generator may paint.
        found: the organ, if it has been searched for.
    """
    image, label, spacing = sample.image, sample.label, sample.frame.plane_distance
    gap_mm, merge = settings.placement.gap_mm, settings.placement.merge
    if found is None:
        found = yield from OrganSearch.of(settings, sample)
    whole, box, finite = Box.whole(label.shape), found.organ_box, found.is_finite
    tumor_box = present = found.tumor_box
    parts = []
    if box is not None:  # tumours take voxels beyond the organ
        parts.append(box.grown_mm(0.0 if merge else gap_mm, spacing))
    if present is not None:
        present = present.grown_mm(gap_mm, spacing).within(whole)
        parts.append(present)
    if not finite or settings.placement.bulge is not None:
        parts.append(whole)
    # without an organ any part will do, as long as it has a voxel
    part = Box.hull(parts or [Box((0, 0, 0), (1, 1, 1))]).within(whole)
    forbidden = None if finite else ~image[part.slices].isfinite()
    if present is not None:
        if forbidden is None:
            forbidden = torch.zeros_like(label[part.slices], dtype=torch.bool)
        near = dilate(label[present.slices] == settings.tumor_label, gap_mm, spacing)
        forbidden[present.relative_to(part).slices] |= near
    region = OrganRegion(
        label[part.slices],
        settings.organ_labels,
        box,
        forbidden,
        part,
        whole.shape,
        tumor_box=tumor_box,
    )
    if tissue is not None:
        values = image[part.slices]
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        region = replace(region, image=values, image_range=tissue.image_range)
    return (yield from region.fetch())


def _not_finite_share(settings: Settings, sample: Sample) -> Task[float]:
    """Return the share of the organ in which the image is NaN or infinite."""
    organ: Tensor = is_organ(sample.label, settings.organ_labels)
    lost, all_voxels = yield [(organ & ~sample.image.isfinite()).sum(), organ.sum()]
    return float(lost) / max(1, int(all_voxels))


def _explained(
    results: list[LocalMask | Skip], sample: Sample, tissue: TissueCheck, box: Box
) -> Task[list[LocalMask | Skip]]:
    """Give skips for want of room the reason why the organ has none, if that is its tissue."""
    lacks_room = [isinstance(one, Skip) and one.code is SkipCode.NO_ROOM for one in results]
    if not any(lacks_room):
        return results
    found = yield from tissue.organ_objection(sample, box)
    if found is None:
        return results
    return [found if lacks else one for one, lacks in zip(results, lacks_room, strict=True)]


def _with_displacement(settings: Settings, tumor: LocalMask) -> LocalMask:
    """Return the tumour with its share of displaced tissue in its params."""
    share = settings.mass_effect.share_at(tumor.params.diameter_mm)
    if share == 0:
        return tumor
    fixed = settings.mass_effect.capsule == "fixed"
    return replace(tumor, params=replace(tumor.params, displaced=share, fixed_capsule=fixed))
