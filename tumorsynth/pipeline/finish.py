"""Finishing, the last stage of `SynthesizeTumor`: blend, judge, write and report a tumour."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tumorsynth.appearance.blend import feather
from tumorsynth.appearance.gate import REACH_MM, Gate
from tumorsynth.appearance.noise import softening
from tumorsynth.devices import onto
from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.handcrafted import HandcraftedGenerator
from tumorsynth.pipeline.paint import Painting
from tumorsynth.pipeline.records import NOTHING, Draft, Job, left_alone
from tumorsynth.placement.organ import is_organ


class Finishing(Painting):
    """From what a generator made to image, label and report; painted again where the gate asks."""

    def _finish(
        self,
        job: Job,
        made: Tensor,
        image: Tensor,
        label: Tensor,
        generator: Generator | HandcraftedGenerator,
        drawn: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Write one tumour into image and label (X, Y, Z), in place, or leave it; its record.

        drawn: the sample's params, where what the gate decides is noted; None on a replay, when
        it is decided already.
        """
        draft = self._draft(job, made, image, generator)
        if draft.empty:
            return left_alone(job.sample, job.index, NOTHING)
        if self.gate is None:
            return self._write(job, draft, image, label, generator)
        scores = self._scores(self.gate, job, draft, image, label)
        objection = self.gate.objection(scores) if drawn is not None else None
        for _ in range(self.gate.tries - 1):
            if objection is None:
                break
            job = self._coloured(job, generator, job.tumor.params.seed + 1)
            ((job, made),) = self._generate([job], generator)
            draft = self._draft(job, made, image, generator)
            scores = self._scores(self.gate, job, draft, image, label)
            objection = NOTHING if draft.empty else self.gate.objection(scores)
        if drawn is not None:
            drawn["tumors"][job.number] = job.tumor.params.to_dict()
        if objection is not None and drawn is not None:
            reason = f"the gate: {objection}"
            drawn.setdefault("rejected", []).append([job.number, reason])
            return {**left_alone(job.sample, job.index, reason), "scores": scores}
        return {**self._write(job, draft, image, label, generator), "scores": scores}

    def _scores(
        self, gate: Gate, job: Job, draft: Draft, image: Tensor, label: Tensor
    ) -> dict[str, float | None]:
        """The gate's scores of a tumour that is not written yet."""
        spacing = job.grid.frame.spacing
        wider = [
            slice(max(0, w.start - math.ceil(REACH_MM / s)), w.stop + math.ceil(REACH_MM / s))
            for w, s in zip(job.where, spacing, strict=True)
        ]
        around = (wider[0], wider[1], wider[2])
        here = tuple(
            slice(w.start - a.start, w.stop - a.start)
            for w, a in zip(job.where, around, strict=True)
        )
        values = image[around].clone()
        values[here] = draft.after
        inside = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        inside[here] = job.inside
        organ = is_organ(label[around], self.organ_labels)
        hu, asked_hu = self.intensity.to_hu(values.float()), job.tumor.params.contrast_hu
        return gate.scores(hu, inside, organ, spacing, asked_hu)

    def _draft(
        self, job: Job, made: Tensor, image: Tensor, generator: Generator | HandcraftedGenerator
    ) -> Draft:
        """The tumour blended into its part of the image (X, Y, Z), which is left as it is."""
        frame, tumor = job.grid.frame, job.tumor
        where, inside = job.where, job.inside
        weight = feather(
            inside,
            job.sigma_mm,
            frame.spacing,
            self.blend,
            generator.own_edge,
            tumor.voxels,
            softening(job.grain_mm),
        )
        made = job.grid.carry_back(made, where)
        before = image[where].clone()
        # at least float32; float64 stays, or it would lose digits and range
        healthy = before.to(torch.promote_types(before.dtype, torch.float32))
        if job.fill is not None:
            healthy = healthy + job.fill.change_hu / self.intensity.hu_per_unit
            weight = torch.where(job.fill.other, job.fill.weight, weight)
        if self.blend == "change":
            change = weight * made / self.intensity.hu_per_unit
        else:
            low, high = generator.window  # as it was shown: gas and bone nearby are left alone
            hu = self.intensity.to_hu(healthy.float()).clamp(low, high)
            if keeps_detail(generator):
                made = made + self._lost(job, before, generator.window)
            change = weight * (made - hu) / self.intensity.hu_per_unit
        after = healthy + change
        if job.fill is not None and job.fill.brightens:
            after = torch.where(job.fill.other, torch.maximum(after, before), after)
        if self.intensity.limits is not None:
            after = after.clamp(*self.intensity.limits)
        after = after.to(image.dtype)
        keep = (weight > 0) & before.isfinite() & after.isfinite()  # a dtype's end may be near
        after = torch.where(keep, after, before)
        # no label on what cannot be seen: fat or air under an organ's label, a scale that clips
        changed = (after != healthy.to(image.dtype)).logical_and_(inside).sum()
        peak = (weight * inside).amax()
        voxels = tuple(  # as indices: a mask's number of voxels is waited for
            onto(i + s - r.start, image.device)
            for i, s, r in zip(tumor.mask.nonzero().unbind(1), tumor.start, where, strict=True)
        )
        hu_change = (after.float() - before.float())[voxels].mean() * self.intensity.hu_per_unit
        told = torch.stack([changed.to(peak), peak, hu_change.to(peak)])
        seen, peak_weight, mean_hu = told.tolist()  # one wait for a GPU
        empty = seen < 0.5 * tumor.voxels
        return Draft(after, peak_weight, mean_hu, empty)

    def _lost(self, job: Job, before: Tensor, window: tuple[float, float]) -> Tensor:
        """What the way to the generator's 1 mm and back takes from a part of the sample, in HU:
        most of its noise, where its voxels are finer."""
        low, high = window
        hu = self.intensity.to_hu(before.float())
        if job.fill is not None:
            hu = hu + job.fill.shown_hu
        back = job.grid.carry_back(job.crop * (high - low) + low, job.where)
        return hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high) - back

    def _write(
        self,
        job: Job,
        draft: Draft,
        image: Tensor,
        label: Tensor,
        generator: Generator | HandcraftedGenerator,
    ) -> dict[str, Any]:
        """Write one tumour into image and label (X, Y, Z), in place; returns its record."""
        frame, tumor = job.grid.frame, job.tumor
        where, inside = job.where, job.inside
        image[where] = draft.after
        label[where] = torch.where(inside, label.new_full((), self.tumor_label), label[where])
        # the middle one of the voxels made; params.centre may lie beside them
        voxels = tumor.mask.nonzero().float()  # on the CPU, whatever the image is on
        far = (voxels - voxels.mean(0)) * voxels.new_tensor(frame.spacing)
        middle = voxels[far.square().sum(1).argmin()].long().tolist()
        centre = [s + m for s, m in zip(tumor.start, middle, strict=True)]
        return {
            "sample": job.sample,
            "index": job.index,
            "applied": True,
            "centre_voxel": centre,
            "centre_mm": list(frame.to_mm(centre)),
            "diameter_mm": tumor.diameter_mm,
            "requested_diameter_mm": tumor.params.drawn_mm,
            "volume_mm3": tumor.voxels * math.prod(frame.spacing),
            "label_voxels": tumor.voxels,
            "hu_change": draft.hu_change,
            "peak_weight": draft.peak_weight,
            "sigma_mm": max(job.sigma_mm),
            "grain_mm": list(job.grain_mm),
            "contrast_hu": tumor.params.contrast_hu,
            "displaced_mm": 0.0,
            "outside_share": job.outside_share,
            "generator": generator.name,
            "seed": tumor.params.seed,
        }


def keeps_detail(generator: Generator | HandcraftedGenerator) -> bool:
    """Whether what a generator inpaints has the scan's own noise; published ones blur it."""
    if isinstance(generator, HandcraftedGenerator):
        return True
    return generator.autoencoder.config.detail_channels > 0
