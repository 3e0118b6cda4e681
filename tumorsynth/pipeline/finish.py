"""Finish: judge a painted tumour, paint it again where that helps, write and report it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tumorsynth.appearance.contrast import FLUID_HU, MIN_DARKER_HU
from tumorsynth.appearance.gate import GATE_MARGIN_MM, Gate
from tumorsynth.appearance.painted import PaintedTumor
from tumorsynth.appearance.visibility import (
    VISIBLE_FROM,
    contrast_for,
    is_faint,
    section_mm2,
)
from tumorsynth.fetching import Task, run_together
from tumorsynth.geometry import Box
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.candidate import blend_candidate, must_darken
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import (
    Candidate,
    Growth,
    PaintRequest,
    Record,
    Rejection,
    Sample,
    SampleParams,
    SkipRecord,
    TumorRecord,
)
from tumorsynth.pipeline.requests import make_again
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement import skip_reasons
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.rasterize import equivalent_diameter
from tumorsynth.placement.types import SkipCode

RAISED_VISIBILITY = 1.15 * VISIBLE_FROM  # of a tumour whose contrast is raised
MAX_RAISED_CONTRAST_HU = 75.0  # of a core; annotated early tumours reach 63, cysts 100
EDGE_SHARE = 0.75  # mean contrast of a small tumour over that of its core, about
MAX_REPAINTS = 3  # to raise a contrast


def paint_and_finish(
    call: Call,
    requests: Sequence[PaintRequest],
    samples: Sequence[Sample],
    placed: Sequence[PlacedSample],
) -> list[Record]:
    """Paint tumours and write them into their samples, in place; return their report entries."""
    records: list[Record] = []
    for painted in call.painter.paint(call.settings, call.generator, requests):
        by_sample: dict[int, list[tuple[PaintRequest, Tensor]]] = {}
        for request, generated in painted:
            by_sample.setdefault(request.id.sample, []).append((request, generated))
        found = run_together(
            _finish_in_order(call, its, samples[b], placed[b].drawn) for b, its in by_sample.items()
        )
        records += [record for its in found for record in its]
    return records


def _finish_in_order(
    call: Call,
    painted: Sequence[tuple[PaintRequest, Tensor]],
    sample: Sample,
    params: SampleParams | None,
) -> Task[list[Record]]:
    """Finish tumours of one sample, each of which may reach into an earlier one."""
    records = []
    for request, generated in painted:
        records.append((yield from finish(call, request, generated, sample, params)))
    return records


def finish(
    call: Call,
    request: PaintRequest,
    generated: Tensor,
    sample: Sample,
    params: SampleParams | None,
) -> Task[Record]:
    """Write one tumour into its sample, in place, or skip it.

    Args:
        call: settings and generator.
        request: the tumour.
        generated: (side, side, side) in HU, what the generator made of it.
        sample: the scan or patch; its image and label change.
        params: the sample's params, in which the gate's decisions are recorded; None on a replay,
            whose params hold them already.
    """
    settings, gate = call.settings, call.settings.gate
    candidate = yield from blend_candidate(settings, call.generator, request, generated, sample)
    if not candidate.has_change:
        return _skip(request, *(yield from _why_no_change(call, generated)))
    if params is None:
        if candidate.is_too_bright:  # as in another phase of the patient
            return _skip(request, SkipCode.TISSUE, _why_too_bright(call, candidate))
        scores = None if gate is None else _replay_scores(call, gate, request, candidate, sample)
        return write(call, request, candidate, sample, scores)
    call.painter.warn_of_fat(request, settings)
    request, candidate = yield from _keep_visible(call, request, candidate, sample)
    if gate is not None:
        return (yield from _write_if_accepted(call, gate, request, candidate, sample, params))
    params.tumors[request.id.params_index] = request.tumor.params
    if candidate.is_too_bright:
        code, reason = SkipCode.TISSUE, _why_too_bright(call, candidate)
    elif settings.keeps_visible and is_faint(candidate.visibility):
        assert candidate.visibility is not None and request.noise.sd_hu is not None
        code, reason = (
            SkipCode.FAINT,
            skip_reasons.faint(
                candidate.visibility, VISIBLE_FROM, request.tumor.diameter_mm, request.noise.sd_hu
            ),
        )
    else:
        return write(call, request, candidate, sample)
    params.rejected.append(Rejection(request.id.params_index, reason, code))
    return _skip(request, code, reason)


def _why_too_bright(call: Call, candidate: Candidate) -> str:
    assert candidate.excess_hu is not None
    return skip_reasons.too_bright(call.generator.name, candidate.excess_hu)


def _keep_visible(
    call: Call, request: PaintRequest, candidate: Candidate, sample: Sample
) -> Task[tuple[PaintRequest, Candidate]]:
    """Paint a tumour again, with more contrast, where the generator's own is lost in the noise.

    A contrast that the user asks for stays as it is, and so does the published blend.

    Returns:
        The last attempt. It is still faint where visibility needs a contrast that tumours in such
        tissue do not have.
    """
    settings, noise, tumor = call.settings, request.noise, request.tumor
    if not (settings.keeps_visible and is_faint(candidate.visibility)):
        return request, candidate
    spacing = request.grid.frame.spacing
    section = section_mm2(tumor.mask, tumor.diameter_mm, spacing)
    wanted = contrast_for(RAISED_VISIBILITY, section, noise, spacing)
    assert wanted is not None and noise.level_hu is not None
    darkens = must_darken(call.generator, request)
    sign = 1.0 if not darkens and candidate.is_brighter else -1.0
    most = MAX_RAISED_CONTRAST_HU
    if sign < 0:
        most = min(most, max(noise.level_hu - FLUID_HU, 0.0))
    if wanted * VISIBLE_FROM / RAISED_VISIBILITY > most:
        return request, candidate
    asked = max(wanted / EDGE_SHARE, MIN_DARKER_HU)
    for _ in range(MAX_REPAINTS):
        asked = min(asked, most)
        # rounded, so that the last bits of a measurement do not matter
        params = replace(tumor.params, raised_hu=sign * round(asked, 1))
        request = replace(request, tumor=replace(tumor, params=params))
        generated = call.painter.paint_alone(settings, call.generator, request)
        candidate = yield from blend_candidate(settings, call.generator, request, generated, sample)
        if not is_faint(candidate.visibility) or asked == most:
            break
        assert candidate.visibility is not None
        asked *= min(max(RAISED_VISIBILITY / max(candidate.visibility, 0.1), 1.15), 2.0)
    return request, candidate


def _write_if_accepted(
    call: Call,
    gate: Gate,
    request: PaintRequest,
    candidate: Candidate,
    sample: Sample,
    params: SampleParams,
) -> Task[Record]:
    """Write a tumour that the gate accepts, in place; make a rejected one again, or skip it."""
    settings, generator = call.settings, call.generator
    scores = _scores(settings, gate, request, candidate, sample)
    objection = gate.objection(scores)
    for retries in range(1, gate.tries):
        if objection is None:
            break
        request = yield from make_again(settings, generator, request, retries)
        generated = call.painter.paint_alone(settings, generator, request)
        candidate = yield from blend_candidate(settings, generator, request, generated, sample)
        request, candidate = yield from _keep_visible(call, request, candidate, sample)
        scores = _scores(settings, gate, request, candidate, sample)
        if candidate.has_change:
            objection = gate.objection(scores)
        else:
            _, objection = yield from _why_no_change(call, generated)
    params.tumors[request.id.params_index] = request.tumor.params
    code, reason = SkipCode.GATE, skip_reasons.gate(objection or "")
    if objection is None:
        if not candidate.is_too_bright:
            return write(call, request, candidate, sample, scores)
        code, reason = SkipCode.TISSUE, _why_too_bright(call, candidate)
    params.rejected.append(Rejection(request.id.params_index, reason, code))
    return _skip(request, code, reason, scores)


def _why_no_change(call: Call, generated: Tensor) -> Task[tuple[SkipCode, str]]:
    """Return why a painted tumour changes nothing; warn, once a transform, if it is implausible.

    Args:
        call: settings and generator.
        generated: what the generator made, NaN where no tissue could have its values.
    """
    (has_values,) = yield [generated.isfinite().any()]
    if has_values:
        return SkipCode.NO_VISIBLE_CHANGE, skip_reasons.NO_VISIBLE_CHANGE
    reason = skip_reasons.implausible(call.generator.name, call.generator.window)
    call.painter.warn_of_implausible(reason)
    return SkipCode.IMPLAUSIBLE, reason


def write(
    call: Call,
    request: PaintRequest,
    candidate: Candidate,
    sample: Sample,
    scores: dict[str, float | None] | None = None,
) -> TumorRecord:
    """Write one tumour into its sample, in place; return its report entry."""
    frame, tumor, region = request.grid.frame, request.tumor, request.region
    label = sample.label[region.slices]
    sample.image[region.slices] = candidate.after
    sample.label[region.slices] = torch.where(
        request.inside, label.new_full((), call.settings.tumor_label), label
    )
    # the voxel nearest to the centroid; params.centre may lie outside the tumour
    voxels = tumor.mask.nonzero().float()  # on the CPU, whatever the image is on
    offsets_mm = (voxels - voxels.mean(0)) * voxels.new_tensor(frame.spacing)
    if frame.shear is not None:
        offsets_mm = offsets_mm @ voxels.new_tensor(frame.shear)
    middle = voxels[offsets_mm.square().sum(1).argmin()].long().tolist()
    centre = [s + m for s, m in zip(tumor.start, middle, strict=True)]
    true_volume_mm3 = tumor.fine_voxels * frame.voxel_mm3 / math.prod(tumor.factors)
    return TumorRecord(
        sample=request.id.sample,
        index=request.id.report_index,
        centre_voxel=centre,
        centre_mm=list(frame.to_mm(centre)),
        diameter_mm=tumor.diameter_mm,
        requested_diameter_mm=tumor.params.drawn_mm,
        volume_mm3=tumor.voxels * frame.voxel_mm3,
        label_voxels=tumor.voxels,
        true_diameter_mm=equivalent_diameter(true_volume_mm3),
        true_volume_mm3=true_volume_mm3,
        hu_change=candidate.hu_change,
        true_contrast_hu=candidate.true_contrast_hu,
        visible_contrast_hu=candidate.visible_contrast_hu,
        peak_weight=candidate.peak_weight,
        sigma_mm=max(request.feather_mm),
        grain_mm=list(request.grain_mm),
        contrast_hu=tumor.params.asked_hu,
        visibility=candidate.visibility,
        outside_share=request.outside_share,
        generator=call.generator.name,
        seed=tumor.params.seed,
        scores=scores,
        growth=Growth.of(tumor),
    )


def _skip(
    request: PaintRequest,
    code: SkipCode,
    reason: str,
    scores: dict[str, float | None] | None = None,
) -> SkipRecord:
    return SkipRecord(request.id.sample, request.id.report_index, code, reason, scores)


def _replay_scores(
    call: Call, gate: Gate, request: PaintRequest, candidate: Candidate, sample: Sample
) -> dict[str, float | None]:
    """Return the scores of a tumour that was accepted before, without the scorer's network."""
    scores = _scores(call.settings, gate.without_scorer(), request, candidate, sample)
    return scores if gate.scorer is None else {**scores, "scorer": None}


def _scores(
    settings: Settings, gate: Gate, request: PaintRequest, candidate: Candidate, sample: Sample
) -> dict[str, float | None]:
    """Return the gate's scores of a tumour that is not written yet."""
    frame = request.grid.frame
    wider = request.region.grown([math.ceil(GATE_MARGIN_MM / s) for s in frame.plane_distance])
    wider = wider.within(Box.whole(sample.image.shape))
    region, after, intensity = request.region, candidate.after, settings.intensity
    painted = PaintedTumor(sample.image, region, after, request.inside, frame, intensity)
    organ = is_organ(sample.label[wider.slices], settings.organ_labels)
    hu, inside = intensity.to_hu(painted.image_in(wider).float()), painted.mask_in(wider)
    requested_hu = request.tumor.params.asked_hu
    if requested_hu is not None:  # of which voxels that the tumour fills in part show a share
        requested_hu *= request.tumor.mean_share
    scores = gate.scores(hu, inside, organ, frame.spacing, requested_hu, frame.shear, painted)
    return {**scores, "visibility": candidate.visibility}
