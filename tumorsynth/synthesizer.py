"""`SynthesizeTumor`: the one line. Reads as the way of the data, top to bottom."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth import masks
from tumorsynth.blend import BLENDS, feather, reach
from tumorsynth.contrast import check_contrast, own_level
from tumorsynth.contrast_priors import ContrastPrior, get_contrast_prior, structured
from tumorsynth.devices import or_on_cpu, parse_device
from tumorsynth.gate import REACH_MM, Gate, check_gate
from tumorsynth.generator import Generator, per_sample_seeds
from tumorsynth.geometry import CropGrid, Frame, plan_crop
from tumorsynth.handcrafted import HandcraftedGenerator
from tumorsynth.inputs import (
    check_hu,
    check_input,
    check_params,
    check_tumor_label,
    frames_of,
    plain,
)
from tumorsynth.intensity import HU, Intensity
from tumorsynth.mask_shapes import read_shapes
from tumorsynth.masks import LocalMask, Skip, TumorParams
from tumorsynth.mass_effect import MassEffect, check_mass_effect, push_aside
from tumorsynth.texture import grain, match, neighbourhood
from tumorsynth.weights import Handle

CONTEXT_MM = 16.0  # at least this much of the scan on each side of a tumour goes into its crop
GPU_BATCH = 8  # crops in one pass of the networks; halved where memory does not suffice
NOTHING = "the generator leaves this tissue as it is"


@dataclass
class _Job:
    """One tumour on its way through the generator."""

    sample: int
    index: int  # among the sample's tumours and skips
    number: int  # among the sample's params
    tumor: LocalMask
    grid: CropGrid
    crop: Tensor  # (side, side, side) in [0, 1]
    crop_mask: Tensor  # bool, the same shape
    grain_mm: tuple[float, float, float]  # how sharp the scan is there, along the tensor's axes

    @property
    def sigma_mm(self) -> tuple[float, float, float]:
        """The feather along the tensor's axes: as drawn, and no sharper than the scan."""
        a, b, c = (max(self.tumor.params.sigma_mm, g) for g in self.grain_mm)
        return a, b, c


@dataclass
class _Draft:
    """What one tumour would make of its part of the sample."""

    where: tuple[slice, slice, slice]
    before: Tensor
    after: Tensor
    inside: Tensor  # bool, the tumour
    peak_weight: float
    empty: bool  # nothing to be seen


class SynthesizeTumor(nn.Module):
    """Adds synthetic tumours, image and label, to a batch of CT volumes or patches.

    generator: a bundled name ("liver-early", "hu2023"), a generator folder, a hub id, or a loaded
        :class:`tumorsynth.Generator`. Loaded once per process and device, on first use.
    organ_labels: label values in which a tumour may sit (one int or several).
    tumor_label: the value its voxels get.
    p: probability per sample.
    count: tumours per sample, at most 100, a number or (lo, hi) inclusive; None: as often as the
        prior's cases.
    size_mm: equivalent diameter (of the sphere of the same volume), a number or (lo, hi) drawn
        log-uniformly, or a named prior: "liver", "kidney", "pancreas", "cyst", "lung".
    intensity: what the image's values mean: ``HU()``, ``Scaled(...)`` or ``ZScore(...)``.
    blend: "change" adds the difference the generator makes and keeps the scan's own noise;
        "difftumor" blends the decoded voxels as published.
    contrast_hu: HU between a tumour and the tissue around it, negative for darker, a number or
        (lo, hi) drawn per tumour; or a prior of an organ and a phase ("liver-portal",
        "kidney-arterial", "pancreas-unenhanced", ...) or a ContrastPrior, with rims and necrotic
        cores; by default the generator's own, made for its organ.
    sigma_mm: feather of the edge, a number or (lo, hi) drawn per tumour; by default (0.5, 1.5), and
        (0, 4) with blend="difftumor", as published. With blend="change" it is never narrower than
        the scan itself is sharp.
    gate: True, or a :class:`tumorsynth.gate.Gate` with limits of your own: tumours are scored, made
        again with the next seed if a score is beyond its limits, and skipped, saying why, if that
        does not help. The scores are in the report.
    gap_mm: organ left between two tumours; merge=True lets them touch.
    mass_effect: share of a tumour's volume, 0 to 0.9, that makes its room by pushing the tissue
        around it aside, in image and label; the rest takes the place of tissue. "auto": none below
        20 mm, growing to 0.6 at 50 mm; or a :class:`tumorsynth.mass_effect.MassEffect`. Off by
        default: then nothing but the tumours changes.
    device: where the generator runs; by default the image's device. Images come back to their own.

    shapes: real tumour masks whose shapes the tumours have, turned, mirrored, slightly bent and
        brought to size: a folder of NIfTI files, or a list of files and of (mask, spacing).

    Called as ``synth(image, label, spacing=..., seed=...)``; see :meth:`forward`. After a call
    ``synth.report`` has one dict per tumour, or per reason for none, and ``synth.params`` replays
    the call.
    """

    def __init__(
        self,
        generator: str | os.PathLike[str] | Generator | HandcraftedGenerator = "liver-early",
        organ_labels: int | Iterable[int] = (1,),
        tumor_label: int = 2,
        p: float = 1.0,
        count: int | Sequence[int] | None = (1, 3),
        size_mm: float | Sequence[float] | str = (5, 20),
        intensity: Intensity = HU(),  # noqa: B008 (frozen)
        blend: str = "change",
        contrast_hu: float | Sequence[float] | str | ContrastPrior | None = None,
        sigma_mm: float | Sequence[float] | None = None,
        gap_mm: float = 2.0,
        merge: bool = False,
        device: torch.device | str | None = None,
        gate: bool | Gate | None = None,
        mass_effect: float | str | MassEffect = 0.0,
        shapes: Any = None,
    ):
        super().__init__()
        self.handle = Handle(generator)
        self.organ_labels = masks.check_organ_labels(organ_labels)
        self.tumor_label = check_tumor_label(tumor_label, self.organ_labels)
        if not isinstance(p, int | float | Real) or not 0 <= p <= 1:
            raise ValueError(f"p must be a probability between 0 and 1, got {p!r}")
        self.p = float(p)
        masks.check_count(count)
        masks.check_size(size_mm)
        self.count, self.size_mm = count, size_mm
        if not isinstance(intensity, Intensity) or isinstance(intensity, type):
            raise TypeError(
                f"intensity must be ts.HU(), ts.Scaled(...) or ts.ZScore(...), got {intensity!r}"
            )
        self.intensity = intensity
        if blend not in BLENDS:
            raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
        self.blend = blend
        if sigma_mm is None:
            sigma_mm = (0.5, 1.5) if blend == "change" else (0.0, 4.0)
        self.contrast_hu: tuple[float, float] | ContrastPrior | None
        if isinstance(contrast_hu, str):
            self.contrast_hu = get_contrast_prior(contrast_hu)
        elif isinstance(contrast_hu, ContrastPrior):
            self.contrast_hu = contrast_hu
        else:
            self.contrast_hu = check_contrast(contrast_hu)
        self.sigma_mm = masks.check_range("sigma_mm", sigma_mm, 0.0, masks.MAX_SIGMA_MM)
        self.gap_mm = masks.check_range("gap_mm", gap_mm, 0.0, masks.MAX_GAP_MM)[0]
        self.merge = bool(merge)
        self.compute_device = None if device is None else parse_device(device)
        self.gate = check_gate(gate)
        self.mass_effect = check_mass_effect(mass_effect)
        self.outlines = read_shapes(shapes)
        self.report: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self._together = GPU_BATCH

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        label: Tensor,
        spacing: Any = None,
        *,
        affine: Any = None,
        seed: int | Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A new (image, label) with tumours; the inputs are left as they are, and come back
        themselves where no sample gets a tumour.

        image: (B, 1, X, Y, Z) or (1, X, Y, Z), floating point, in the scale of ``intensity``.
        label: the same shape, whole numbers of any dtype.
        spacing: mm per voxel along X, Y, Z: three numbers, or (B, 3). affine: 4x4 or (B, 4, 4),
            voxel to RAS mm, instead: gives the orientation as well. Without either a MetaTensor's
            affine is taken, else 1 mm.
        seed: one int (sample b of a batch uses seed + b) or one per sample; by default drawn from
            torch's global generator. It alone decides what the call does to a sample.
        params: ``synth.params`` of an earlier call, to be repeated bit by bit.

        Raises ValueError or TypeError for input that cannot work. Where an organ is absent or has
        no room the sample comes back unchanged and the report says why.
        """
        image, label, report, params = self.made(
            image, label, spacing, affine=affine, seed=seed, params=params
        )
        self.report, self.params = report, params
        return image, label

    @torch.no_grad()
    def made(
        self,
        image: Tensor,
        label: Tensor,
        spacing: Any = None,
        *,
        affine: Any = None,
        seed: int | Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]], list[dict[str, Any]]]:
        """As :meth:`forward`, with the report and the params of this very call: for several threads
        with one transform, whose ``report`` is of the call that ended last."""
        check_input(image, label, self.tumor_label)
        batched = image.ndim == 5
        frames = frames_of(image, spacing, affine)
        if params is not None:
            check_params(params, len(frames))
        if self.p == 0 and params is None:  # nothing to draw, nothing to load
            reason = f"left alone (p = {self.p:g})"
            report = [_left_alone(b, 0, reason) for b in range(len(frames))]
            left: dict[str, Any] = {
                "seed": None,
                "applied": False,
                "tumors": [],
                "reason": reason,
            }
            return image, label, report, [dict(left) for _ in frames]
        seeds = [0] * len(frames) if params is not None else per_sample_seeds(seed, len(frames))

        # plain views: same memory, no subclass (MetaTensor) bookkeeping per operation
        images = plain(image) if batched else plain(image)[None]
        labels = plain(label) if batched else plain(label)[None]

        report = []
        new_params: list[dict[str, Any]] = []
        jobs: list[_Job] = []
        pushing: list[tuple[tuple[int, int, int], LocalMask, list[LocalMask]]] = []
        generator = self._generator_for(image.device)
        # a caller's autocast would do the resampling and the feather in half precision
        with torch.autocast(image.device.type, enabled=False):
            for b, frame in enumerate(frames):
                sample = images[b, 0], labels[b, 0], frame, seeds[b], params[b] if params else None
                record, results = or_on_cpu(
                    "placing tumours", image.device, partial(self._masks, *sample)
                )
                new_params.append(record)
                if not record["applied"]:
                    report.append(_left_alone(b, 0, record.get("reason", "left alone")))
                number = 0
                rejected = {int(i): reason for i, reason in record.get("rejected", ())}
                placed = [r for r in results if isinstance(r, LocalMask)]
                makes_room = any(tumor.params.displaced > 0 for tumor in placed)
                for i, result in enumerate(results):
                    if isinstance(result, Skip):
                        report.append(_left_alone(b, i, result.reason))
                        continue
                    place = b, i, number
                    number += 1
                    if place[2] in rejected:  # only now: they took room from the later ones
                        report.append(_left_alone(b, i, rejected[place[2]]))
                    elif makes_room:
                        pushing.append((place, result, [] if self.merge else placed[number:]))
                    else:
                        target = images[b, 0], labels[b, 0]
                        job = self._crop(place, *target, result, frame, generator)
                        jobs.append(job if params else self._drawn(job, record, generator))
            if jobs or pushing:  # what nothing is done to is not copied either
                image, label = image.clone(), label.clone()
                images = plain(image) if batched else plain(image)[None]
                labels = plain(label) if batched else plain(label)[None]
            for job, change in self._generate(jobs, generator):
                target = images[job.sample, 0], labels[job.sample, 0]
                drawn = None if params is not None else new_params[job.sample]
                report.append(self._finish(job, change, *target, generator, drawn))
            for place, tumor, later in pushing:
                b = place[0]
                target = images[b, 0], labels[b, 0]
                drawn = None if params is not None else new_params[b]
                report.append(self._push(place, tumor, later, *target, frames[b], generator, drawn))

        report.sort(key=lambda r: (r["sample"], r["index"]))
        return image, label, report, new_params

    # -- the steps ---------------------------------------------------------------------------------

    def _generator_for(self, device: torch.device) -> Generator | HandcraftedGenerator:
        return self.handle.get(self.compute_device or device)

    def _masks(
        self,
        image: Tensor,
        label: Tensor,
        frame: Frame,
        seed: int,
        replay: dict[str, Any] | None,
        device: torch.device,
    ) -> tuple[dict[str, Any], list[LocalMask | Skip]]:
        """Which tumours one sample (X, Y, Z) gets: drawn from the seed, or again from params."""
        image, label = image.to(device), label.to(device)
        if replay is not None:
            return dict(replay), self._redraw(image, label, frame, replay)
        rng = torch.Generator().manual_seed(seed)
        record: dict[str, Any] = {"seed": seed, "applied": True, "tumors": []}
        if float(torch.rand((), generator=rng, dtype=torch.float64)) >= self.p:
            record.update(applied=False, reason=f"left alone (p = {self.p:g})")
            return record, []
        box = masks.organ_box(label, self.organ_labels)
        if box is None:
            record.update(
                applied=False, reason=f"no organ: no voxel has a label of {self.organ_labels}"
            )
            return record, []
        results = masks.place(
            label,
            self.organ_labels,
            box,
            frame.spacing,
            size_mm=self.size_mm,
            count=self.count,
            rng=rng,
            sigma_mm=self.sigma_mm,
            contrast_hu=None if isinstance(self.contrast_hu, ContrastPrior) else self.contrast_hu,
            gap_mm=self.gap_mm,
            merge=self.merge,
            forbid=self._forbidden(image, label, frame),
            outlines=self.outlines,
        )
        results = [r if isinstance(r, Skip) else self._with_room(r) for r in results]
        record["tumors"] = [r.params.to_dict() for r in results if isinstance(r, LocalMask)]
        return record, results

    def _with_room(self, tumor: LocalMask) -> LocalMask:
        """The tumour, with how much tissue it pushes aside in its params."""
        share = self.mass_effect.share_at(tumor.params.diameter_mm)
        if share == 0:
            return tumor
        fixed = self.mass_effect.capsule == "fixed"
        return replace(tumor, params=replace(tumor.params, displaced=share, fixed_capsule=fixed))

    def _redraw(
        self, image: Tensor, label: Tensor, frame: Frame, replay: dict[str, Any]
    ) -> list[LocalMask | Skip]:
        results: list[LocalMask | Skip] = []
        forbid = self._forbidden(image, label, frame) if replay["tumors"] else None
        for values in replay["tumors"]:
            earlier = [] if self.merge else [r for r in results if isinstance(r, LocalMask)]
            results.append(
                masks.draw(
                    TumorParams.from_dict(values),
                    label,
                    self.organ_labels,
                    frame.spacing,
                    others=earlier,
                    gap_mm=self.gap_mm,
                    forbid=forbid,
                )
            )
        return results

    def _forbidden(self, image: Tensor, label: Tensor, frame: Frame) -> Tensor | None:
        """Voxels that no tumour may take: not finite, or next to a tumour that is there already."""
        forbid = None
        if not bool(image.sum(dtype=torch.float32).isfinite()):
            forbid = ~image.isfinite()
        if not self.merge:
            box = masks.organ_box(label, self.tumor_label)
            if box is not None:
                region = box.grown(self.gap_mm, frame.spacing)
                present = label[region] == self.tumor_label
                forbid = torch.zeros_like(label, dtype=torch.bool) if forbid is None else forbid
                forbid[region] |= masks.dilate(present, self.gap_mm, frame.spacing)
        return forbid

    def _push(
        self,
        place: tuple[int, int, int],
        tumor: LocalMask,
        later: list[LocalMask],
        image: Tensor,
        label: Tensor,
        frame: Frame,
        generator: Generator | HandcraftedGenerator,
        drawn: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """One tumour of a sample (X, Y, Z) with mass effect, in place: tissue is pushed aside, the
        tumour drawn in the room made, then all as ever. Where it comes to nothing, so does the
        push. later: the sample's tumours that are still to come."""
        undo, largest = None, 0.0
        if tumor.params.displaced > 0:
            part, moved, moved_label, largest = push_aside(
                image,
                label,
                tumor.params,
                frame.spacing,
                self.organ_labels,
                self.tumor_label,
                self.intensity,
            )
            undo = part, image[part].clone(), label[part].clone()
            image[part], label[part] = moved, moved_label
        again = masks.draw(
            tumor.params,
            label,
            self.organ_labels,
            frame.spacing,
            others=later,
            gap_mm=self.gap_mm,
            forbid=self._forbidden(image, label, frame),
        )
        if isinstance(again, Skip):
            record = _left_alone(place[0], place[1], again.reason)
        else:
            job = self._crop(place, image, label, again, frame, generator)
            job = job if drawn is None else self._drawn(job, drawn, generator)
            ((job, made),) = self._generate([job], generator)
            record = self._finish(job, made, image, label, generator, drawn)
        if record["applied"]:
            return {**record, "displaced_mm": largest}
        if undo is not None:
            part, image[part], label[part] = undo
        return record

    def _crop(
        self,
        place: tuple[int, int, int],
        image: Tensor,
        label: Tensor,
        tumor: LocalMask,
        frame: Frame,
        generator: Generator | HandcraftedGenerator,
    ) -> _Job:
        """The crop around a tumour on the generator's grid, in [0, 1], and the mask on it."""
        stop = [s + n for s, n in zip(tumor.start, tumor.mask.shape, strict=True)]
        grain_mm = (0.0, 0.0, 0.0)
        if self.blend == "change":
            grain_mm = self._grain(image, label, tumor, frame)
        sigma_mm = [max(tumor.params.sigma_mm, g) for g in grain_mm]
        feathered = reach(sigma_mm, frame.spacing, self.blend)
        margin = max(n * s for n, s in zip(feathered, frame.spacing, strict=True)) + 2
        grid = plan_crop(
            frame,
            (image.shape[0], image.shape[1], image.shape[2]),
            tumor.start,
            stop,
            min_side=generator.crop_size,
            multiple=generator.crop_multiple,
            margin_mm=max(CONTEXT_MM, margin),
        )
        hu = self.intensity.to_hu(image[grid.source].float())
        if isinstance(self.intensity, HU):
            check_hu(hu)
        low, high = generator.window
        hu = hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
        crop = grid.cut((hu - low) / (high - low))
        inside = torch.zeros_like(hu)
        box = [
            slice(s - part.start, e - part.start)
            for s, e, part in zip(tumor.start, stop, grid.source, strict=True)
        ]
        inside[tuple(box)] = tumor.mask.to(inside.dtype)
        share = grid.cut(inside)
        # half a voxel's share, or less where a tumour is smaller than the generator's voxels
        crop_mask = share >= (0.5 * share.max()).clamp(max=0.5)
        return _Job(*place, tumor, grid, crop, crop_mask, grain_mm)

    def _drawn(
        self, job: _Job, record: dict[str, Any], generator: Generator | HandcraftedGenerator
    ) -> _Job:
        """The job with what a contrast prior draws for it, noted in the sample's params."""
        if isinstance(self.contrast_hu, ContrastPrior):
            job = self._coloured(job, generator, job.tumor.params.seed)
            record["tumors"][job.number] = job.tumor.params.to_dict()
        return job

    def _coloured(self, job: _Job, generator: Generator | HandcraftedGenerator, seed: int) -> _Job:
        """The job with this noise seed, and the contrast that goes with it."""
        params = replace(job.tumor.params, seed=seed)
        if isinstance(self.contrast_hu, ContrastPrior):
            low, high = generator.window
            hu = job.crop[None, None] * (high - low) + low
            level = float(own_level(hu, job.crop_mask[None, None]))
            contrast_hu, structure = self.contrast_hu.draw(seed, params.diameter_mm, level)
            params = replace(params, contrast_hu=contrast_hu, structure_hu=structure)
        else:
            contrast = masks.draw_contrast_hu(self.contrast_hu, seed)
            params = replace(params, contrast_hu=contrast)
        return replace(job, tumor=replace(job.tumor, params=params))

    def _grain(
        self, image: Tensor, label: Tensor, tumor: LocalMask, frame: Frame
    ) -> tuple[float, float, float]:
        """How sharp the sample (X, Y, Z) is around a tumour, in mm along its axes."""
        x, y, z = neighbourhood(tumor.start, tumor.mask.shape, frame.spacing)
        hu = self.intensity.to_hu(image[x, y, z].float())
        organ = masks.is_organ(label[x, y, z], self.organ_labels)
        return grain(hu, organ, frame.spacing)

    def _generate(
        self, jobs: list[_Job], generator: Generator | HandcraftedGenerator
    ) -> Iterable[tuple[_Job, Tensor]]:
        """Each job with what the generator makes of it, (side, side, side) in HU.

        Crops go through the networks together on a GPU and one by one on a CPU, where together is
        no faster and the last bit of a convolution depends on the batch.
        """
        device = self.compute_device or (jobs[0].crop.device if jobs else torch.device("cpu"))
        for side in sorted({job.grid.side for job in jobs}):
            left = [job for job in jobs if job.grid.side == side]
            while left:
                part = left[: self._batch(device)]
                paint = partial(self._paint, part, generator)
                made = or_on_cpu("the generator", device, paint)
                if made is None:  # outside of the exception, which holds on to what did not fit
                    self._halve(len(part))
                    continue
                left = left[len(part) :]
                yield from zip(part, self._matched(part, made, generator), strict=True)

    def _matched(
        self, part: list[_Job], made: Tensor, generator: Generator | HandcraftedGenerator
    ) -> list[Tensor]:
        """What was made of some jobs: changes no sharper and no lumpier than their scan, with the
        rims and cores that were drawn."""
        if self.blend != "change":
            return list(made)
        low, high = generator.window
        matched = []
        for job, change in zip(part, made, strict=True):
            crop = job.crop.to(change.device) * (high - low) + low
            grain_mm = [job.grain_mm[axis] for axis in job.grid.frame.axes]  # along the crop's axes
            change = match(crop, change, job.crop_mask, grain_mm, generator.even)
            tumor = job.tumor.params
            matched.append(structured(change, job.crop_mask, tumor.structure_hu, tumor.seed))
        return matched

    def _batch(self, device: torch.device) -> int:
        return 1 if device.type == "cpu" else self._together

    def _paint(
        self,
        part: list[_Job],
        generator: Generator | HandcraftedGenerator,
        device: torch.device,
    ) -> Tensor | None:
        """What the generator makes of some jobs, (jobs, side, side, side) in HU; None where the
        GPU's memory does not hold them together."""
        if device.type == "cpu" != generator.device.type:  # in place of its own
            generator = self.handle.get(device)
        run = generator.change if self.blend == "change" else generator.inpaint
        drawn = [job.tumor.params for job in part]
        try:
            crops = torch.stack([job.crop for job in part])[:, None].to(device)
            inside = torch.stack([job.crop_mask for job in part])[:, None].to(device)
            with torch.autocast(device.type, enabled=False):
                made = run(
                    crops,
                    inside,
                    seed=[params.seed for params in drawn],
                    contrast_hu=_asked([params.contrast_hu for params in drawn]),
                )
        except torch.cuda.OutOfMemoryError:
            if len(part) == 1:
                raise
            return None
        low, high = generator.window
        made = made[:, 0].to(part[0].crop.device) * (high - low)
        return made if self.blend == "change" else made + low

    def _halve(self, tried: int) -> None:
        """Fewer crops in one pass from now on; says so the first time."""
        if self._together == GPU_BATCH:
            warnings.warn(
                f"the GPU's memory does not hold {tried} crops at once: going on with "
                f"{tried // 2}, and fewer if need be",
                stacklevel=2,
            )
        self._together = tried // 2
        torch.cuda.empty_cache()

    def _finish(
        self,
        job: _Job,
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
            return _left_alone(job.sample, job.index, NOTHING)
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
            return {**_left_alone(job.sample, job.index, reason), "scores": scores}
        return {**self._write(job, draft, image, label, generator), "scores": scores}

    def _scores(
        self, gate: Gate, job: _Job, draft: _Draft, image: Tensor, label: Tensor
    ) -> dict[str, float | None]:
        """The gate's scores of a tumour that is not written yet."""
        spacing = job.grid.frame.spacing
        wider = [
            slice(max(0, w.start - math.ceil(REACH_MM / s)), w.stop + math.ceil(REACH_MM / s))
            for w, s in zip(draft.where, spacing, strict=True)
        ]
        around = (wider[0], wider[1], wider[2])
        here = tuple(
            slice(w.start - a.start, w.stop - a.start)
            for w, a in zip(draft.where, around, strict=True)
        )
        values = image[around].clone()
        values[here] = draft.after
        inside = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        inside[here] = draft.inside
        organ = masks.is_organ(label[around], self.organ_labels)
        hu, asked_hu = self.intensity.to_hu(values.float()), job.tumor.params.contrast_hu
        return gate.scores(hu, inside, organ, spacing, asked_hu)

    def _draft(
        self, job: _Job, made: Tensor, image: Tensor, generator: Generator | HandcraftedGenerator
    ) -> _Draft:
        """The tumour blended into its part of the image (X, Y, Z), which is left as it is."""
        frame, tumor = job.grid.frame, job.tumor
        margin = reach(job.sigma_mm, frame.spacing, self.blend)
        region = [
            slice(max(0, s - m), min(n, s + size + m))
            for s, size, m, n in zip(
                tumor.start, tumor.mask.shape, margin, image.shape, strict=True
            )
        ]
        where = (region[0], region[1], region[2])
        inside = torch.zeros(image[where].shape, dtype=torch.bool, device=image.device)
        inside[
            tuple(
                slice(s - r.start, s - r.start + n)
                for s, r, n in zip(tumor.start, region, tumor.mask.shape, strict=True)
            )
        ] = tumor.mask
        weight = feather(inside, job.sigma_mm, frame.spacing, self.blend, generator.own_edge)
        made = job.grid.carry_back(made, where)
        before = image[where].clone()
        if self.blend == "change":
            change = weight * made / self.intensity.hu_per_unit
        else:
            hu = self.intensity.to_hu(before.float())
            change = weight * (made - hu) / self.intensity.hu_per_unit
        # at least float32; float64 stays, or it would lose digits and range
        after = before.to(torch.promote_types(before.dtype, torch.float32)) + change
        if self.intensity.limits is not None:
            after = after.clamp(*self.intensity.limits)
        after = after.to(image.dtype)
        keep = (weight > 0) & before.isfinite() & after.isfinite()  # a dtype's end may be near
        after = torch.where(keep, after, before)
        # no label on what cannot be seen: fat or air under an organ's label, a scale that clips
        changed = (after != before).logical_and_(inside).sum()
        peak = (weight * inside).amax()
        seen, peak_weight = torch.stack([changed.to(peak), peak]).tolist()  # one wait for a GPU
        empty = seen < 0.5 * tumor.voxels
        return _Draft(where, before, after, inside, peak_weight, empty)

    def _write(
        self,
        job: _Job,
        draft: _Draft,
        image: Tensor,
        label: Tensor,
        generator: Generator | HandcraftedGenerator,
    ) -> dict[str, Any]:
        """Write one tumour into image and label (X, Y, Z), in place; returns its record."""
        frame, tumor = job.grid.frame, job.tumor
        where, inside = draft.where, draft.inside
        image[where] = draft.after
        label[where] = torch.where(
            inside,
            torch.tensor(self.tumor_label, dtype=label.dtype, device=label.device),
            label[where],
        )
        # the middle one of the voxels made; params.centre may lie beside them
        voxels = tumor.mask.nonzero().float()
        far = (voxels - voxels.mean(0)) * voxels.new_tensor(frame.spacing)
        middle = voxels[far.square().sum(1).argmin()].long().tolist()
        centre = [s + m for s, m in zip(tumor.start, middle, strict=True)]
        change = (draft.after.float() - draft.before.float())[inside]
        hu_change = change.mean() * self.intensity.hu_per_unit
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
            "hu_change": float(hu_change),
            "peak_weight": draft.peak_weight,
            "sigma_mm": max(job.sigma_mm),
            "grain_mm": list(job.grain_mm),
            "contrast_hu": tumor.params.contrast_hu,
            "displaced_mm": 0.0,
            "generator": generator.name,
            "seed": tumor.params.seed,
        }

    def extra_repr(self) -> str:
        return (
            f"generator={self.handle.source!r}, organ_labels={self.organ_labels}, "
            f"tumor_label={self.tumor_label}, p={self.p:g}, count={self.count}, "
            f"size_mm={self.size_mm}, intensity={self.intensity}, blend={self.blend!r}, "
            f"contrast_hu={self.contrast_hu}, gate={self.gate}, mass_effect={self.mass_effect}"
        )


def _left_alone(sample: int, index: int, reason: str) -> dict[str, Any]:
    return {"sample": sample, "index": index, "applied": False, "reason": reason}


def _asked(contrasts: list[float | None]) -> list[float] | None:
    """The contrasts that tumours were drawn with; one call draws them for all or for none."""
    asked = [contrast for contrast in contrasts if contrast is not None]
    return asked or None
