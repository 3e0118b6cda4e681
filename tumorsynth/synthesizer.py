"""`SynthesizeTumor`: the one line. `made` reads as the way of the data, top to bottom; the stages'
own work is in `_placing`, `_painting` and `_finishing`, what goes between them in `_jobs`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from tumorsynth import masks
from tumorsynth._arguments import check_probability
from tumorsynth._finishing import Finishing
from tumorsynth._jobs import Job, Pushing, Room, left_alone
from tumorsynth._painting import GPU_BATCH
from tumorsynth._placing import Placing
from tumorsynth.blend import BLENDS
from tumorsynth.bulge import check_bulge
from tumorsynth.contrast import check_contrast
from tumorsynth.contrast_priors import ContrastPrior, get_contrast_prior
from tumorsynth.devices import or_on_cpu, parse_device, plain_defaults
from tumorsynth.gate import Gate, check_gate
from tumorsynth.generator import Generator, per_sample_seeds
from tumorsynth.geometry import Frame
from tumorsynth.handcrafted import HandcraftedGenerator
from tumorsynth.inputs import (
    check_grid,
    check_input,
    check_params,
    check_tumor_label,
    check_whole,
    frames_of,
    plain,
)
from tumorsynth.intensity import HU, Intensity
from tumorsynth.mask_shapes import read_shapes
from tumorsynth.masks import LocalMask, Skip
from tumorsynth.mass_effect import MassEffect, check_mass_effect, push_aside
from tumorsynth.threads import one_thread
from tumorsynth.weights import Handle


class SynthesizeTumor(Placing, Finishing):
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
        "difftumor" blends the decoded voxels as published, with the scan's noise where the
        generator keeps it.
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
    bulge: whether tumours stick out of the organ, into unlabelled fat around it: True as often and
        as far as in the masks of size_mm="kidney" or "cyst", or the share of a tumour's volume
        beyond the organ's label, 0 to 0.9, a number or (lo, hi) drawn per tumour. Off by default:
        then labels change within the organ alone.
    device: where the generator runs; by default the image's device. Images come back to their own.

    shapes: real tumour masks whose shapes the tumours have, turned, mirrored, slightly bent and
        brought to size: a folder of NIfTI files, or a list of files and of (mask, spacing).

    Called as ``synth(image, label, spacing=..., seed=...)``; see :meth:`forward`. After a call
    ``synth.report`` has one dict per tumour, or per reason for none, and ``synth.params`` replays
    the call.
    """

    @plain_defaults()
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
        bulge: bool | float | Sequence[float] = False,
    ):
        super().__init__()
        self.handle = Handle(generator)
        self.organ_labels = masks.check_organ_labels(organ_labels)
        self.tumor_label = check_tumor_label(tumor_label, self.organ_labels)
        self.p = check_probability("p", p)
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
        check_bulge(bulge, size_mm)
        self.bulge = bulge
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
    @plain_defaults()
    @one_thread()
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
        check_whole("label", label)
        batched = image.ndim == 5
        if spacing is None and affine is None:
            check_grid(("image", "label"), [getattr(x, "affine", None) for x in (image, label)])
        frames = frames_of(image, spacing, affine)
        if params is not None:
            check_params(params, len(frames))
        if self.p == 0 and params is None:  # nothing to draw, nothing to load
            reason = f"left alone (p = {self.p:g})"
            report = [left_alone(b, 0, reason) for b in range(len(frames))]
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
        jobs: list[Job] = []
        pushing: dict[int, list[Pushing]] = {}
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
                    report.append(left_alone(b, 0, record.get("reason", "left alone")))
                number = 0
                rejected = {int(i): reason for i, reason in record.get("rejected", ())}
                placed = [r for r in results if isinstance(r, LocalMask)]
                makes_room = any(tumor.params.displaced > 0 for tumor in placed)
                for i, result in enumerate(results):
                    if isinstance(result, Skip):
                        report.append(left_alone(b, i, result.reason))
                        continue
                    place = b, i, number
                    number += 1
                    if place[2] in rejected:  # only now: they took room from the later ones
                        report.append(left_alone(b, i, rejected[place[2]]))
                    elif makes_room:
                        later = [] if self.merge else placed[number:]
                        pushing.setdefault(b, []).append((place, result, later))
                    else:
                        target = images[b, 0], labels[b, 0]
                        job = self._crop(place, *target, result, frame, generator)
                        if isinstance(job, Skip):
                            report.append(left_alone(b, i, job.reason))
                            continue
                        jobs.append(job if params else self._drawn(job, record, generator))
            if jobs or pushing:  # what nothing is done to is not copied either
                image, label = image.clone(), label.clone()
                images = plain(image) if batched else plain(image)[None]
                labels = plain(label) if batched else plain(label)[None]
            for job, change in self._generate(jobs, generator):
                target = images[job.sample, 0], labels[job.sample, 0]
                drawn = None if params is not None else new_params[job.sample]
                report.append(self._finish(job, change, *target, generator, drawn))
            # one tumour after the other in a sample, but those of several samples together
            for part in zip_longest(*pushing.values()):
                together = [one for one in part if one is not None]
                drawn_for = None if params is not None else new_params
                report += self._push(together, images, labels, frames, generator, drawn_for)

        report.sort(key=lambda r: (r["sample"], r["index"]))
        return image, label, report, new_params

    # -- the steps ---------------------------------------------------------------------------------

    def _generator_for(self, device: torch.device) -> Generator | HandcraftedGenerator:
        return self.handle.get(self.compute_device or device)

    def _push(
        self,
        pushing: Sequence[Pushing],
        images: Tensor,
        labels: Tensor,
        frames: Sequence[Frame],
        generator: Generator | HandcraftedGenerator,
        drawn: list[dict[str, Any]] | None,
    ) -> list[dict[str, Any]]:
        """A tumour with mass effect in each of some samples, in place: tissue is pushed aside, the
        tumour drawn in the room made, then all as ever. Where it comes to nothing, so does the
        push."""
        samples = [(b, images[b, 0], labels[b, 0], frames[b]) for (b, _, _), _, _ in pushing]
        rooms = [
            self._room(one, *sample[1:], generator)
            for one, sample in zip(pushing, samples, strict=True)
        ]
        jobs = [room.content for room in rooms if isinstance(room.content, Job)]
        if drawn is not None:
            jobs = [self._drawn(job, drawn[job.sample], generator) for job in jobs]
        records = {}
        for job, made in self._generate(jobs, generator):
            b, record = job.sample, None if drawn is None else drawn[job.sample]
            target = images[b, 0], labels[b, 0]
            records[b] = self._finish(job, made, *target, generator, record)
        for (place, _, _), room, (b, image, label, _) in zip(pushing, rooms, samples, strict=True):
            if isinstance(room.content, Skip):
                records[b] = left_alone(place[0], place[1], room.content.reason)
            if records[b]["applied"]:
                records[b]["displaced_mm"] = room.displaced_mm
            elif room.before is not None:
                part, image[part], label[part] = room.before
        return list(records.values())

    def _room(
        self,
        pushing: Pushing,
        image: Tensor,
        label: Tensor,
        frame: Frame,
        generator: Generator | HandcraftedGenerator,
    ) -> Room:
        """Room made for a tumour of a sample (X, Y, Z), in place, and its job there."""
        place, tumor, later = pushing
        before, largest = None, 0.0
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
            before = part, image[part].clone(), label[part].clone()
            image[part], label[part] = moved, moved_label
        again = masks.draw(
            tumor.params,
            self._ground(image, label, frame),
            self.organ_labels,
            frame.spacing,
            others=later,
            gap_mm=self.gap_mm,
            around=self._around(image, label, frame) if tumor.params.bulge > 0 else None,
        )
        if isinstance(again, Skip):
            return Room(again, before, largest)
        return Room(self._crop(place, image, label, again, frame, generator), before, largest)

    def extra_repr(self) -> str:
        return (
            f"generator={self.handle.source!r}, organ_labels={self.organ_labels}, "
            f"tumor_label={self.tumor_label}, p={self.p:g}, count={self.count}, "
            f"size_mm={self.size_mm}, intensity={self.intensity}, blend={self.blend!r}, "
            f"contrast_hu={self.contrast_hu}, gate={self.gate}, mass_effect={self.mass_effect}"
        )
