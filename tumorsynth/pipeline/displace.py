"""Displace: push the tissue around tumours aside, paint them there, or undo it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import Tensor

from tumorsynth.appearance.mass_effect import push_aside
from tumorsynth.geometry import Box
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.place_batch import PlacedSample, growth_region, organ_region
from tumorsynth.pipeline.records import PaintRequest, Record, Sample, TumorRecord
from tumorsynth.pipeline.requests import DisplacingTumor, request_or_skip
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.tissue_check import TissueCheck
from tumorsynth.placement.place import place_from_params
from tumorsynth.placement.types import LocalMask, Skip


@dataclass(frozen=True)
class Displacement:
    """What pushing tissue aside for one tumour did to its sample.

    Args:
        tumor: its voxels in the displaced tissue, or why it has none.
        region: the part of the sample that changed; None if nothing was displaced.
        image: that part before.
        label: that part before.
        largest_mm: largest displacement.
    """

    tumor: LocalMask | Skip
    region: Box | None
    image: Tensor | None
    label: Tensor | None
    largest_mm: float

    def undo(self, sample: Sample) -> None:
        """Restore the sample, in place."""
        if self.region is not None:
            assert self.image is not None and self.label is not None
            sample.image[self.region.slices] = self.image
            sample.label[self.region.slices] = self.label


def displace(
    settings: Settings,
    sample: Sample,
    displacing: DisplacingTumor,
    tissue: TissueCheck | None = None,
) -> Displacement:
    """Push tissue aside for one tumour, in place, and place the tumour in it.

    Args:
        settings: of the transform.
        sample: the scan or patch; its image and label change.
        displacing: the tumour.
        tissue: where the generator may paint.
    """
    params, spacing = displacing.tumor.params, sample.frame.spacing
    region, image_before, label_before, largest_mm = None, None, None, 0.0
    if params.displaced > 0:
        pushed = push_aside(
            sample.image,
            sample.label,
            params,
            spacing,
            settings.organ_labels,
            settings.tumor_label,
            settings.intensity,
            sample.frame.shear,
        )
        region, largest_mm = pushed.region, pushed.largest_mm
        image_before = sample.image[region.slices].clone()
        label_before = sample.label[region.slices].clone()
        sample.image[region.slices], sample.label[region.slices] = pushed.image, pushed.label
    tumor = place_from_params(
        params,
        organ_region(settings, sample, tissue),
        spacing,
        earlier=displacing.later,
        gap_mm=settings.placement.gap_mm,
        growth=growth_region(settings, sample) if params.bulge > 0 else None,
        shear=sample.frame.shear,
    )
    return Displacement(tumor, region, image_before, label_before, largest_mm)


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
    for turn in zip_longest(*displacing):
        tumors = [tumor for tumor in turn if tumor is not None]
        records += _paint_turn(call, tumors, samples, placed)
    return records


def _paint_turn(
    call: Call,
    tumors: Sequence[DisplacingTumor],
    samples: Sequence[Sample],
    placed: Sequence[PlacedSample],
) -> list[Record]:
    """Displace and paint at most one tumour of each sample."""
    displacements = [
        displace(call.settings, samples[one.id.sample], one, call.tissue) for one in tumors
    ]
    records: dict[int, Record] = {}
    requests = []
    for one, displacement in zip(tumors, displacements, strict=True):
        b = one.id.sample
        found = request_or_skip(call, one.id, samples[b], displacement.tumor, placed[b].drawn)
        if isinstance(found, PaintRequest):
            requests.append(replace(found, rejected=one.rejected))
        elif not one.rejected:  # else it is in the report already
            records[b] = found
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
