"""Request: cut the crop around each placed tumour, or say in the report why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tumorsynth.appearance.background import EXTENSION_MM, fill_background, measure_tissue
from tumorsynth.appearance.blend import feather_reach
from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.appearance.noise import (
    ScanNoise,
    feather_mm,
    grain_of_subvoxels,
    grain_region,
    infiltration_mm,
    measuring_noise,
    sample_edge_mm,
    softening_mm,
)
from tumorsynth.appearance.surroundings import similar_level_around
from tumorsynth.appearance.vessels import cover_vessels
from tumorsynth.crop_grid import CropGrid, plan_crop
from tumorsynth.devices import onto
from tumorsynth.fetching import Task, run_together
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.geometry import Box, Floats3
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import (
    PaintRequest,
    Record,
    Sample,
    SampleParams,
    SkipRecord,
    TumorId,
)
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.tissue_check import TissueCheck
from tumorsynth.placement.organ import is_organ, is_outside
from tumorsynth.placement.sample_tumor import sample_contrast_hu
from tumorsynth.placement.types import LocalMask, Skip, SkipCode
from tumorsynth.subvoxels import ONE, refine_box, refine_spacing

CONTEXT_MM = 16.0  # of the scan on each side of a tumour, at least, that its crop shows


@dataclass(frozen=True)
class DisplacingTumor:
    """A placed tumour of a sample in which tissue is pushed aside.

    Args:
        id: which tumour of the call this is.
        tumor: as placed, before any displacement.
        later: the sample's tumours after it, whose voxels it may not take.
        rejected: as of a `PaintRequest`.
    """

    id: TumorId
    tumor: LocalMask
    later: list[LocalMask]
    rejected: bool = False


@dataclass(frozen=True)
class Requests:
    """What is to be done for the tumours of a batch.

    Args:
        paint: tumours that go to the generator as they are placed.
        displace: for each sample with mass effect, its tumours in order.
        records: report entries of what is skipped already.
    """

    paint: list[PaintRequest] = field(default_factory=list)
    displace: list[list[DisplacingTumor]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether any tumour is left to be made."""
        return bool(self.paint or self.displace)


def request_tumors(
    call: Call, samples: Sequence[Sample], placed: Sequence[PlacedSample]
) -> Requests:
    """Collect the requests of a batch.

    Args:
        call: settings and generator.
        samples: of the batch.
        placed: their placed tumours.
    """
    requests = Requests()
    asked: list[tuple[Task[PaintRequest | SkipRecord], bool]] = []
    for sample, its in zip(samples, placed, strict=True):
        asked += _request_sample(call, sample, its, requests)
    if not asked:
        return requests
    found = run_together(task for task, _ in asked)
    for one, (_, is_rejected) in zip(found, asked, strict=True):
        if isinstance(one, PaintRequest):
            requests.paint.append(replace(one, rejected=is_rejected))
        elif not is_rejected:
            requests.records.append(one)
    # those of one sample are finished in turn, so a batch had better hold those of many samples
    requests.paint.sort(key=lambda request: request.id.params_index)
    return requests


def skip_records(placed: Sequence[PlacedSample], first: int = 0) -> list[Record]:
    """Return report entries of the samples that are skipped as a whole.

    Args:
        placed: samples in a row.
        first: number of the first of them in its batch.
    """
    return [
        SkipRecord(b, 0, one.params.code, one.params.reason)
        for b, one in enumerate(placed, first)
        if one.params.code is not None
    ]


def request_or_skip(
    call: Call, id: TumorId, sample: Sample, tumor: LocalMask | Skip, params: SampleParams | None
) -> Task[PaintRequest | SkipRecord]:
    """Return the request for one tumour, or the report entry of why there is none.

    Args:
        call: settings and generator.
        id: which tumour of the call this is.
        sample: the scan or patch.
        tumor: its voxels, or why it has none.
        params: the sample's params, in which a contrast that is drawn here is recorded; None on a
            replay that repeats the contrast.
    """
    found: PaintRequest | Skip
    if isinstance(tumor, Skip):
        found = tumor
    else:
        found = yield from request_painting(
            call.settings, call.generator, id, sample, tumor, call.tissue
        )
    if isinstance(found, Skip):
        return SkipRecord(id.sample, id.report_index, found.code, found.reason)
    if params is not None and (
        call.new_contrast or isinstance(call.settings.contrast_hu, ContrastPrior)
    ):
        seed = found.tumor.params.seed
        found = yield from with_contrast(call.settings, call.generator, found, seed)
        params.tumors[id.params_index] = found.tumor.params
    return found


def _request_sample(
    call: Call, sample: Sample, placed: PlacedSample, requests: Requests
) -> Iterator[tuple[Task[PaintRequest | SkipRecord], bool]]:
    """Yield a request for each of a sample's tumours, and whether the tumour is rejected already.

    What is left to `displace`, or skipped already, is added to ``requests``.
    """
    requests.records.extend(skip_records([placed], first=sample.number))
    rejected = {one.number: one for one in placed.params.rejected}
    tumors = [result for result in placed.results if isinstance(result, LocalMask)]
    has_mass_effect = any(tumor.params.displaces for tumor in tumors)
    displacing: list[DisplacingTumor] = []
    params_index = 0
    for report_index, result in enumerate(placed.results):
        id = TumorId(sample.number, report_index, params_index)
        if isinstance(result, LocalMask):
            params_index += 1
        rejection = rejected.get(id.params_index) if isinstance(result, LocalMask) else None
        if rejection is not None:
            # skipped only here: it took room from the later ones while they were placed
            code, reason = rejection.code, rejection.reason
            requests.records.append(SkipRecord(id.sample, report_index, code, reason))
            if not call.painter.forms_batches(call.settings.device or sample.image.device):
                continue
        if isinstance(result, LocalMask) and has_mass_effect:
            later = [] if call.settings.merge else tumors[params_index:]
            displacing.append(DisplacingTumor(id, result, later, rejection is not None))
            continue
        yield request_or_skip(call, id, sample, result, placed.with_contrast), rejection is not None
    if has_mass_effect:
        requests.displace.append(displacing)


def request_painting(
    settings: Settings,
    generator: TumorGenerator,
    id: TumorId,
    sample: Sample,
    tumor: LocalMask,
    check: TissueCheck | None = None,
) -> Task[PaintRequest | Skip]:
    """Cut the crop around a tumour, in the generator's scale and on its grid.

    Returns:
        The request, or a Skip where the generator cannot paint in this tissue.
    """
    to_hu = settings.intensity.to_hu
    noise = yield from _noise_around(settings, sample, tumor)
    grain_mm = noise.grain_mm if settings.blend == "change" else (0.0, 0.0, 0.0)
    edge_mm = 0.0
    if settings.blend == "change":
        if generator.even:
            edge_mm = sample_edge_mm(tumor.params.shape_seed, tumor.params.diameter_mm)
        if generator.own_edge:  # which the feather leaves as it is
            edge_mm = math.hypot(edge_mm, infiltration_mm(tumor.params.sigma_mm))
    grid, region = _plan(settings, generator, sample, tumor, grain_mm, edge_mm)
    fine_grid, fine_region = grid.refined(tumor.factors), refine_box(region, tumor.factors)
    hu = to_hu(sample.image[grid.source.slices].float())
    inside = fine_inside = _in_region(tumor.mask, tumor.box, region, sample.image.device)
    if tumor.factors != ONE:
        fine_inside = _in_region(tumor.fine_mask, tumor.fine_box, fine_region, sample.image.device)

    local_hu = to_hu(sample.image[region.slices].float())
    local_label = sample.label[region.slices]
    tissue = yield from measure_tissue(
        local_hu, local_label, settings.organ_labels, inside, generator.window
    )
    reason = tissue.outside_window(generator.window)
    if reason is not None:
        return Skip(SkipCode.OUTSIDE_WINDOW, reason, tumor.params.drawn_mm)
    fill = fill_background(
        local_hu,
        tissue,
        fine_inside,
        sample.frame.spacing,
        grain_mm,
        tumor.params,
        generator.window,
        tumor.factors,
        sample.frame.shear,
    )
    vessels_hu = covered_hu = None
    if fill is not None:
        covered_hu = fill.generator_change_hu
    elif generator.even and settings.blend == "change":
        vessels_hu = cover_vessels(
            local_hu, tissue.organ, sample.frame.spacing, grain_mm, tumor.params.shape_seed
        )
        covered_hu = inside * vessels_hu
    if covered_hu is not None:
        hu = hu.clone()  # to_hu may return the sample itself
        hu[region.relative_to(grid.source).slices] += covered_hu
    unsuited = None
    if check is not None:
        unsuited = tissue.organ & is_outside(sample.image[region.slices], check.image_range)
    low, high = generator.window
    hu = hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
    outline = _mask_on_grid(fine_grid, fine_inside, fine_region)
    shown = outline
    if fill is not None:
        shown = _mask_on_grid(fine_grid, fill.generator_mask, fine_region)
    return PaintRequest(
        id=id,
        tumor=tumor,
        grid=grid,
        crop=grid.cut((hu - low) / (high - low)),
        crop_mask=shown,
        crop_outline=outline,
        noise=noise,
        grain_mm=grain_mm,
        edge_mm=edge_mm,
        region=region,
        inside=inside,
        fine_inside=fine_inside,
        outside_share=0.0 if fill is None else tissue.outside_share,
        fill=fill,
        vessels_hu=vessels_hu,
        unsuited=unsuited,
    )


def _plan(
    settings: Settings,
    generator: TumorGenerator,
    sample: Sample,
    tumor: LocalMask,
    grain_mm: Floats3,
    edge_mm: float,
) -> tuple[CropGrid, Box]:
    """Return a tumour's crop, and the region that its feather and its fill may change."""
    frame, spacing = sample.frame, sample.frame.plane_distance
    grain_mm = grain_of_subvoxels(grain_mm, frame.spacing, tumor.factors)
    sigma_mm = feather_mm(tumor.params.sigma_mm, grain_mm)
    subvoxels = feather_reach(
        sigma_mm,
        refine_spacing(spacing, tumor.factors),
        settings.blend,
        softening_mm(grain_mm, edge_mm),
    )
    feathered = [math.ceil(n / k) for n, k in zip(subvoxels, tumor.factors, strict=True)]
    margin_mm = max(n * s for n, s in zip(feathered, spacing, strict=True)) + 2
    whole = Box.whole(sample.image.shape)
    grid = plan_crop(
        frame,
        whole.shape,
        tumor.box,
        min_side=generator.crop_size,
        multiple=generator.crop_multiple,
        margin_mm=max(CONTEXT_MM, margin_mm),
    )
    extension = (math.ceil((EXTENSION_MM + 1) / s) for s in spacing)
    region = tumor.box.grown([max(n, m) for n, m in zip(feathered, extension, strict=True)])
    return grid, region.within(whole)


def make_again(
    settings: Settings, generator: TumorGenerator, request: PaintRequest, retries: int
) -> Task[PaintRequest]:
    """Return the request with the next noise seed, and with how often this happened."""
    request = yield from with_contrast(settings, generator, request, request.tumor.params.seed + 1)
    params = replace(request.tumor.params, retries=retries)
    return replace(request, tumor=replace(request.tumor, params=params))


def with_contrast(
    settings: Settings, generator: TumorGenerator, request: PaintRequest, seed: int
) -> Task[PaintRequest]:
    """Return the request with this noise seed and the contrast that follows from it."""
    params = replace(request.tumor.params, seed=seed, raised_hu=None)
    if isinstance(settings.contrast_hu, ContrastPrior):
        low, high = generator.window
        hu = request.crop[None, None] * (high - low) + low
        (level,) = yield [similar_level_around(hu, request.crop_mask[None, None])]
        sampled = settings.contrast_hu.sample(seed, params.diameter_mm, float(level))
        params = replace(params, **sampled._asdict())
    else:
        contrast = sample_contrast_hu(settings.contrast_hu, seed)
        params = replace(params, contrast_hu=contrast)
    return replace(request, tumor=replace(request.tumor, params=params))


def _noise_around(settings: Settings, sample: Sample, tumor: LocalMask) -> Task[ScanNoise]:
    """Return the noise of the healthy scan around a tumour's place."""
    region = grain_region(tumor.box, sample.frame.spacing, sample.image.shape).slices
    hu = settings.intensity.to_hu(sample.image[region].float())
    organ = is_organ(sample.label[region], settings.organ_labels)
    return measuring_noise(hu, organ, sample.frame.spacing)


def _in_region(mask: Tensor, box: Box, region: Box, device: torch.device) -> Tensor:
    """Return a mask of a box as one of a region around it."""
    inside = torch.zeros(region.shape, dtype=torch.bool, device=device)
    inside[box.relative_to(region).slices] = onto(mask, device)
    return inside


def _mask_on_grid(grid: CropGrid, mask: Tensor, region: Box) -> Tensor:
    """Resample a mask, of a region of the grid's source, onto the grid.

    A crop voxel is tumour if at least 50 % covered; if no voxel is fully covered, at least half of
    the largest coverage.
    """
    share = grid.cut(mask.to(torch.float32), region)
    return share >= (0.5 * share.max()).clamp(max=0.5)
