"""Displace: push the tissue around tumours aside, paint them there, or undo it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from torch import Tensor

from tumorsynth.appearance.mass_effect import PushedTissue, RigidTissue, push_aside
from tumorsynth.devices import onto
from tumorsynth.fetching import Task, run_together
from tumorsynth.geometry import Box
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.place_batch import PlacedSample, growth_region, organ_region
from tumorsynth.pipeline.records import PaintRequest, Record, Sample, TumorId, TumorRecord
from tumorsynth.pipeline.requests import DisplacingTumor, request_or_skip
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.tissue_check import TissueCheck
from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.growth import GrowingTumor, Room, grow_all, reach_of
from tumorsynth.placement.place import place_from_params
from tumorsynth.placement.shape import Shape
from tumorsynth.placement.types import Bools, LocalMask, Skip, TumorParams


@dataclass(frozen=True)
class Displacement:
    """What pushing tissue aside for one tumour did to its sample.

    Args:
        tumor: its voxels in the displaced tissue, or why it has none.
        region: the part of the sample that changed; None if nothing was displaced.
        before: that part before.
        largest_mm: largest displacement.
    """

    tumor: LocalMask | Skip
    region: Box | None
    before: Sample | None
    largest_mm: float

    def undo(self, sample: Sample) -> None:
        """Restore the sample, in place."""
        if self.region is not None:
            assert self.before is not None
            _replace_part(sample, self.region, self.before)


def displace(
    settings: Settings,
    sample: Sample,
    displacing: DisplacingTumor,
    tissue: TissueCheck | None = None,
    grown: LocalMask | Skip | None = None,
) -> Task[Displacement]:
    """Push tissue aside for one tumour, in place, and place the tumour in it.

    Args:
        settings: of the transform.
        sample: the scan or patch; its image and label change.
        displacing: the tumour.
        tissue: where the generator may paint.
        grown: its voxels, of a tumour that has grown; None to place it here.
    """
    params = displacing.tumor.params
    region, before, largest_mm = None, None, 0.0
    if params.displaced > 0:
        pushed = _push(settings, sample.for_placing, params)
        region, largest_mm = pushed.region, pushed.largest_mm
        before = _part(sample, region)
        image = pushed.image
        if sample.first_phase is not None:  # the same displacement in the other phase
            image = _push(settings, sample, params, sample.first_phase).image
        after = before._replace(image=image, label=pushed.label)
        if sample.first_phase is not None:
            after = after._replace(first_phase=pushed.image)
        _replace_part(sample, region, after)
    tumor = grown
    if tumor is None:
        organ = yield from organ_region(settings, sample.for_placing, tissue)
        growth = None
        if params.bulge > 0:
            growth = yield from growth_region(settings, sample.for_placing)
        tumor = place_from_params(
            params,
            organ,
            sample.frame.spacing,
            earlier=displacing.later,
            gap_mm=settings.placement.gap_mm,
            growth=growth,
            shear=sample.frame.shear,
        )
    return Displacement(tumor, region, before, largest_mm)


def _push(
    settings: Settings, sample: Sample, params: TumorParams, first_phase: Tensor | None = None
) -> PushedTissue:
    return push_aside(
        sample.image,
        sample.label,
        params,
        sample.frame.spacing,
        settings.organ_labels,
        settings.tumor_label,
        settings.intensity,
        sample.frame.shear,
        first_phase,
    )


def _part(sample: Sample, region: Box) -> Sample:
    """Return a copy of a part of a sample."""
    first = sample.first_phase
    return sample._replace(
        image=sample.image[region.slices].clone(),
        label=sample.label[region.slices].clone(),
        first_phase=None if first is None else first[region.slices].clone(),
    )


def _replace_part(sample: Sample, region: Box, part: Sample) -> None:
    """Replace a part of a sample, in place."""
    sample.image[region.slices], sample.label[region.slices] = part.image, part.label
    if sample.first_phase is not None and part.first_phase is not None:
        sample.first_phase[region.slices] = part.first_phase


def place_grown(
    settings: Settings,
    sample: Sample,
    displacing: Sequence[DisplacingTumor],
    tissue: TissueCheck | None = None,
) -> Task[list[LocalMask | Skip]]:
    """Place a sample's tumours that have grown and displace tissue.

    The tumours of the first phase displace tissue in a copy of the sample, one after the other.
    They grow from there.

    Args:
        settings: of the transform.
        sample: the scan or patch.
        displacing: its tumours, in order.
        tissue: where the generator may paint.
    """
    sample = sample.for_placing
    sample = sample._replace(image=sample.image.clone(), label=sample.label.clone())
    tumors: list[GrowingTumor | Skip] = []
    rooms: list[Room] = []
    for one in displacing:
        params, first = one.tumor.params, one.tumor.first or one.tumor
        start = replace(one, tumor=first, later=[later.first or later for later in one.later])
        rooms.append((yield from _room_ahead(settings, sample, params, tissue)))
        displacement = yield from displace(settings, sample, start, tissue)
        placed = displacement.tumor
        if isinstance(placed, Skip) or one.rejected:
            displacement.undo(sample)
        else:
            part = sample.label[placed.slices]
            part[onto(placed.mask, part.device)] = settings.tumor_label
        if isinstance(placed, Skip):
            tumors.append(placed)
        else:
            tumors.append(GrowingTumor(params, placed, sample.frame.shear))
    allowed = yield from _allowed(settings, sample, tissue)
    return grow_all(tumors, allowed, rooms, merge=settings.placement.merge)


def _allowed(settings: Settings, sample: Sample, tissue: TissueCheck | None) -> Task[AllowedVoxels]:
    frame, region = sample.frame, (yield from organ_region(settings, sample, tissue))
    return AllowedVoxels(region, frame.spacing, settings.placement.gap_mm, frame.shear)


def _room_ahead(
    settings: Settings, sample: Sample, params: TumorParams, tissue: TissueCheck | None
) -> Task[Room]:
    """Return where a tumour may grow: voxels that hold the organ when its surface reaches them.

    By the formula of `appearance.mass_effect`, the tissue at the surface was this far from the
    centre: (1 - displaced)^(1/3) times where it is then. That is the same at any size.

    Args:
        settings: of the transform.
        sample: before the tumour of the first phase displaces anything.
        params: the tumour.
        tissue: where the generator may paint.
    """
    shape = Shape(params.first, sample.frame.shear)
    allowed = yield from _allowed(settings, sample, tissue)
    growth = None
    if params.bulge > 0:
        growth = yield from growth_region(settings, sample)
    box = reach_of(params, shape, allowed)
    keep = (1 - params.first.displaced) ** (1 / 3)
    sources = []
    for axis, (start, stop) in enumerate(zip(box.start, box.stop, strict=True)):
        centre = params.centre[axis] + float(shape.offset[axis])
        at = (np.arange(start, stop) - centre) * keep + centre
        sources.append((at.round().astype(int) - start).clip(0, stop - start - 1))
    free = allowed.mask_in(box, growth)[np.ix_(*sources)]
    rigid = RigidTissue(
        settings.organ_labels, settings.tumor_label, settings.intensity, params.fixed_capsule
    )
    (is_rigid,) = yield [rigid.where(sample.image[box.slices], sample.label[box.slices])]
    free &= ~is_rigid.numpy()
    free &= ~allowed.forbidden_in(box)

    def room(part: Box) -> Bools:
        inside = np.zeros(part.shape, dtype=bool)
        common = part.within(box)
        inside[common.relative_to(part).slices] = free[common.relative_to(box).slices]
        return inside

    return room


def displace_and_paint(
    call: Call,
    displacing: Sequence[Sequence[DisplacingTumor]],
    samples: Sequence[Sample],
    placed: Sequence[PlacedSample],
) -> list[Record]:
    """Push tissue aside for tumours, paint them there, and write them, all in place.

    The tumours of one sample are made one after the other, since each moves the tissue of the next.
    Tumours of different samples go through the generator together.

    Args:
        call: settings and generator.
        displacing: the tumours of each sample that has any.
        samples: of the batch.
        placed: their placed tumours.

    Returns:
        The report entries.
    """
    records: list[Record] = []
    grown: dict[TumorId, LocalMask | Skip] = {}
    growing = [
        tumors for tumors in displacing if any(one.tumor.first is not None for one in tumors)
    ]
    masks_of_samples = run_together(
        place_grown(call.settings, samples[tumors[0].id.sample], tumors, call.tissue)
        for tumors in growing
    )
    for tumors, masks in zip(growing, masks_of_samples, strict=True):
        grown |= {one.id: mask for one, mask in zip(tumors, masks, strict=True)}
    for turn in zip_longest(*displacing):
        tumors = [tumor for tumor in turn if tumor is not None]
        records += _paint_turn(call, tumors, samples, placed, grown)
    return records


def _paint_turn(
    call: Call,
    tumors: Sequence[DisplacingTumor],
    samples: Sequence[Sample],
    placed: Sequence[PlacedSample],
    grown: Mapping[TumorId, LocalMask | Skip],
) -> list[Record]:
    """Displace and paint at most one tumour of each sample."""
    displacements = run_together(
        displace(call.settings, samples[one.id.sample], one, call.tissue, grown.get(one.id))
        for one in tumors
    )
    records: dict[int, Record] = {}
    requests = []
    asked = []
    for one, displacement in zip(tumors, displacements, strict=True):
        b = one.id.sample
        params = placed[b].with_contrast
        asked.append(request_or_skip(call, one.id, samples[b], displacement.tumor, params))
    for one, found in zip(tumors, run_together(asked), strict=True):
        if isinstance(found, PaintRequest):
            requests.append(replace(found, rejected=one.rejected))
        elif not one.rejected:  # else it is in the report already
            records[one.id.sample] = found
    for record in paint_and_finish(call, requests, samples, placed):
        records[record.sample] = record
    for one, displacement in zip(tumors, displacements, strict=True):
        b = one.id.sample
        painted = records.get(b)
        if isinstance(painted, TumorRecord):
            records[b] = replace(painted, displaced_mm=displacement.largest_mm)
        else:
            displacement.undo(samples[b])
    return list(records.values())
