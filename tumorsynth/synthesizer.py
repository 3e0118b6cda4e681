"""`SynthesizeTumor`: the one line. Reads as the way of the data, top to bottom."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth import masks
from tumorsynth.blend import BLENDS, feather, reach
from tumorsynth.generator import Generator, per_sample_seeds
from tumorsynth.geometry import CropGrid, Frame, frame_from_affine, frame_from_spacing, plan_crop
from tumorsynth.handcrafted import HandcraftedGenerator
from tumorsynth.intensity import HU, Intensity
from tumorsynth.masks import LocalMask, Skip, TumorParams
from tumorsynth.weights import Handle

HU_LOW, HU_HIGH = -175.0, 250.0  # the generators' window, mapped to [0, 1] (paper E.2)
CONTEXT_MM = 16.0  # at least this much of the scan on each side of a tumour goes into its crop
GPU_BATCH = 8  # crops in one pass of the networks


@dataclass
class _Job:
    """One tumour on its way through the generator."""

    sample: int
    index: int  # among the sample's tumours and skips
    tumor: LocalMask
    grid: CropGrid
    crop: Tensor  # (side, side, side) in [0, 1]
    crop_mask: Tensor  # bool, the same shape


class SynthesizeTumor(nn.Module):
    """Adds synthetic tumours, image and label, to a batch of CT volumes or patches.

    generator: a bundled name ("liver-early", "hu2023"), a generator folder, a hub id, or a loaded
        :class:`tumorsynth.Generator`. Loaded once per process and device, on first use.
    organ_labels: label values in which a tumour may sit (one int or several).
    tumor_label: the value its voxels get.
    p: probability per sample.
    count: tumours per sample, a number or (lo, hi) inclusive; None: as often as the prior's cases.
    size_mm: equivalent diameter (of the sphere of the same volume), a number or (lo, hi) drawn
        log-uniformly, or a named prior: "liver", "kidney", "pancreas", "cyst", "lung".
    intensity: what the image's values mean: ``HU()``, ``Scaled(...)`` or ``ZScore(...)``.
    blend: "change" adds the difference the generator makes and keeps the scan's own noise;
        "difftumor" blends the decoded voxels as published.
    sigma_mm: feather of the edge, a number or (lo, hi) drawn per tumour; by default (0.5, 1.5), and
        (0, 4) with blend="difftumor", as published.
    gap_mm: organ left between two tumours; merge=True lets them touch.
    device: where the generator runs; by default the image's device. Images come back to their own.

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
        sigma_mm: float | Sequence[float] | None = None,
        gap_mm: float = 2.0,
        merge: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.handle = Handle(generator)
        self.organ_labels = masks.check_organ_labels(organ_labels)
        self.tumor_label = _check_tumor_label(tumor_label, self.organ_labels)
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
        self.sigma_mm = masks.check_range("sigma_mm", sigma_mm, least=0.0)
        self.gap_mm = masks.check_range("gap_mm", gap_mm, least=0.0)[0]
        self.merge = bool(merge)
        self.compute_device = None if device is None else torch.device(device)
        self.report: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []

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
        """A new (image, label) with tumours; the inputs are left as they are.

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
        _check_input(image, label, self.tumor_label)
        batched = image.ndim == 5
        frames = _frames(image, spacing, affine)
        if params is not None:
            _check_params(params, len(frames))
        if self.p == 0 and params is None:  # nothing to draw, nothing to load
            reason = f"left alone (p = {self.p:g})"
            self.report = [_left_alone(b, 0, reason) for b in range(len(frames))]
            self.params = [
                {"seed": None, "applied": False, "tumors": [], "reason": reason} for _ in frames
            ]
            return image, label
        seeds = [0] * len(frames) if params is not None else per_sample_seeds(seed, len(frames))

        new_image, new_label = image.clone(), label.clone()
        # plain views of the clones: same memory, no subclass (MetaTensor) bookkeeping per operation
        images = _plain(new_image) if batched else _plain(new_image)[None]
        labels = _plain(new_label) if batched else _plain(new_label)[None]
        originals = _plain(image) if batched else _plain(image)[None]

        report: list[dict[str, Any]] = []
        new_params: list[dict[str, Any]] = []
        jobs: list[_Job] = []
        generator = self._generator_for(image.device)
        # a caller's autocast would do the resampling and the feather in half precision
        with torch.autocast(image.device.type, enabled=False):
            for b, frame in enumerate(frames):
                record, results = self._masks(
                    originals[b, 0], labels[b, 0], frame, seeds[b], params[b] if params else None
                )
                new_params.append(record)
                if not record["applied"]:
                    report.append(_left_alone(b, 0, record["reason"]))
                for i, result in enumerate(results):
                    if isinstance(result, Skip):
                        report.append(_left_alone(b, i, result.reason))
                    else:
                        jobs.append(self._crop(b, i, originals[b, 0], result, frame, generator))
            for job, change in self._generate(jobs, generator):
                target = images[job.sample, 0], labels[job.sample, 0]
                report.append(self._blend(job, change, *target, generator.name))

        self.report = sorted(report, key=lambda r: (r["sample"], r["index"]))
        self.params = new_params
        return new_image, new_label

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
    ) -> tuple[dict[str, Any], list[LocalMask | Skip]]:
        """Which tumours one sample (X, Y, Z) gets: drawn from the seed, or again from params."""
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
            gap_mm=self.gap_mm,
            merge=self.merge,
            forbid=self._forbidden(image, label, frame),
        )
        record["tumors"] = [r.params.to_dict() for r in results if isinstance(r, LocalMask)]
        return record, results

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
            present = label == self.tumor_label
            if bool(present.any()):
                grown = masks.dilate(present, self.gap_mm, frame.spacing)
                forbid = grown if forbid is None else forbid | grown
        return forbid

    def _crop(
        self,
        sample: int,
        index: int,
        image: Tensor,
        tumor: LocalMask,
        frame: Frame,
        generator: Generator | HandcraftedGenerator,
    ) -> _Job:
        """The crop around a tumour on the generator's grid, in [0, 1], and the mask on it."""
        stop = [s + n for s, n in zip(tumor.start, tumor.mask.shape, strict=True)]
        feathered = reach(tumor.params.sigma_mm, frame.spacing, self.blend)
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
            _check_hu(hu)
        hu = hu.nan_to_num(nan=0.0, posinf=HU_HIGH, neginf=HU_LOW).clamp(HU_LOW, HU_HIGH)
        crop = grid.cut((hu - HU_LOW) / (HU_HIGH - HU_LOW))
        inside = torch.zeros_like(hu)
        place = [
            slice(s - part.start, e - part.start)
            for s, e, part in zip(tumor.start, stop, grid.source, strict=True)
        ]
        inside[tuple(place)] = tumor.mask.to(inside.dtype)
        share = grid.cut(inside)
        # half a voxel's share, or less where a tumour is smaller than the generator's voxels
        return _Job(sample, index, tumor, grid, crop, share >= (0.5 * share.max()).clamp(max=0.5))

    def _generate(
        self, jobs: list[_Job], generator: Generator | HandcraftedGenerator
    ) -> Iterable[tuple[_Job, Tensor]]:
        """Each job with what the generator makes of it, (side, side, side) in HU.

        Crops go through the networks together on a GPU and one by one on a CPU, where together is
        no faster and the last bit of a convolution depends on the batch.
        """
        device = self.compute_device or (jobs[0].crop.device if jobs else torch.device("cpu"))
        run = generator.change if self.blend == "change" else generator.inpaint
        size = 1 if device.type == "cpu" else GPU_BATCH
        for side in sorted({job.grid.side for job in jobs}):
            alike = [job for job in jobs if job.grid.side == side]
            for start in range(0, len(alike), size):
                part = alike[start : start + size]
                crops = torch.stack([job.crop for job in part])[:, None].to(device)
                inside = torch.stack([job.crop_mask for job in part])[:, None].to(device)
                with torch.autocast(device.type, enabled=False):
                    made = run(crops, inside, seed=[job.tumor.params.seed for job in part])
                made = made[:, 0].to(part[0].crop.device) * (HU_HIGH - HU_LOW)
                yield from zip(part, made, strict=True)

    def _blend(
        self, job: _Job, made: Tensor, image: Tensor, label: Tensor, name: str
    ) -> dict[str, Any]:
        """Write one tumour into image and label (X, Y, Z), in place; returns its record."""
        frame, tumor = job.grid.frame, job.tumor
        margin = reach(tumor.params.sigma_mm, frame.spacing, self.blend)
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
        weight = feather(inside, tumor.params.sigma_mm, frame.spacing, self.blend)
        made = job.grid.carry_back(made, where)
        before = image[where].clone()
        if self.blend == "change":
            change = weight * made / self.intensity.hu_per_unit
        else:
            hu = self.intensity.to_hu(before.float())
            change = weight * (made + HU_LOW - hu) / self.intensity.hu_per_unit
        # at least float32; float64 stays, or it would lose digits and range
        after = before.to(torch.promote_types(before.dtype, torch.float32)) + change
        if self.intensity.limits is not None:
            after = after.clamp(*self.intensity.limits)
        keep = (weight > 0) & before.isfinite()
        after = torch.where(keep, after.to(image.dtype), before)
        # no label on what cannot be seen: fat or air under an organ's label, a scale that clips
        if float((after != before)[inside].float().mean()) < 0.5:
            return _left_alone(job.sample, job.index, "the generator leaves this tissue as it is")
        image[where] = after
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
        hu_change = (after.float() - before.float())[inside].mean() * self.intensity.hu_per_unit
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
            "peak_weight": float(weight[inside].max()),
            "sigma_mm": tumor.params.sigma_mm,
            "generator": name,
            "seed": tumor.params.seed,
        }

    def extra_repr(self) -> str:
        return (
            f"generator={self.handle.source!r}, organ_labels={self.organ_labels}, "
            f"tumor_label={self.tumor_label}, p={self.p:g}, count={self.count}, "
            f"size_mm={self.size_mm}, intensity={self.intensity}, blend={self.blend!r}"
        )


def _left_alone(sample: int, index: int, reason: str) -> dict[str, Any]:
    return {"sample": sample, "index": index, "applied": False, "reason": reason}


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) if type(x) is not Tensor else x


def _check_tumor_label(tumor_label: int, organ_labels: tuple[int, ...]) -> int:
    try:
        whole = not isinstance(tumor_label, bool) and int(tumor_label) == tumor_label
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"tumor_label must be a whole number, got {tumor_label!r}")
    if tumor_label in organ_labels:
        raise ValueError(
            f"tumor_label must differ from organ_labels, got {tumor_label} in {organ_labels}; "
            "give the tumour a value of its own"
        )
    return int(tumor_label)


def _check_input(image: Tensor, label: Tensor, tumor_label: int) -> None:
    for name, value in (("image", image), ("label", label)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, got {type(value).__name__}; use torch.as_tensor"
            )
    if image.ndim not in (4, 5) or image.shape[-4] != 1 or 0 in image.shape:
        raise ValueError(
            "image must be (B, 1, X, Y, Z) or (1, X, Y, Z) with at least one voxel, got "
            f"{tuple(image.shape)}; add or select the channel with image[None]"
        )
    if label.shape != image.shape:
        raise ValueError(
            f"label must have the image's shape {tuple(image.shape)}, got {tuple(label.shape)}"
        )
    if not image.is_floating_point():
        raise TypeError(
            f"image must be floating point, got {image.dtype}; convert it with image.float()"
        )
    if label.is_complex():
        raise TypeError(f"label must hold whole numbers, got {label.dtype}")
    if label.device != image.device:
        raise ValueError(
            f"image and label must be on one device, got {image.device} and {label.device}"
        )
    held = torch.tensor(tumor_label).to(label.dtype)
    if label.dtype == torch.bool or int(held) != tumor_label:
        raise ValueError(
            f"tumor_label {tumor_label} does not fit the label's dtype {label.dtype}; "
            "convert the label, for example with label.to(torch.int16)"
        )


def _check_hu(hu: Tensor) -> None:
    """No 3 cm of a patient has all its HU within 3 of water: such an image was scaled already."""
    highest = float(hu.nan_to_num(nan=0.0).abs().max())
    if 0 < highest <= 3:
        raise ValueError(
            "image must be in Hounsfield units with intensity=HU(), but around a tumour no value "
            f"is beyond +-{highest:.3g}; say how it was scaled with intensity=ts.Scaled(a_min, "
            "a_max, b_min, b_max) or ts.ZScore(mean, std, low, high)"
        )


def _check_params(params: Any, batch: int) -> None:
    needed = {"applied", "tumors"}
    if (
        not isinstance(params, Sequence)
        or len(params) != batch
        or not all(isinstance(record, dict) and needed <= record.keys() for record in params)
    ):
        raise ValueError(
            f"params must hold one record for each of the {batch} samples, got "
            f"{type(params).__name__} of {len(params) if isinstance(params, Sequence) else 1}; "
            "pass synth.params of an earlier call with the same batch"
        )


def _frames(image: Tensor, spacing: Any, affine: Any) -> list[Frame]:
    """One frame per sample."""
    batch = len(image) if image.ndim == 5 else 1
    if spacing is not None and affine is not None:
        raise ValueError("spacing and affine must not both be given; the affine holds the spacing")
    if spacing is None and affine is None:
        affine = getattr(image, "affine", None)  # a MetaTensor's
    if affine is not None:
        parts = _per_sample(affine, 2, batch, "affine must be 4x4 or (B, 4, 4)")
        return [frame_from_affine(part) for part in parts]
    if spacing is None:
        return [frame_from_spacing(1.0)] * batch
    parts = _per_sample(spacing, 1, batch, "spacing must be (dx, dy, dz) in mm or (B, 3)")
    return [frame_from_spacing(part) for part in parts]


def _per_sample(value: Any, ndim: int, batch: int, rule: str) -> list[Any]:
    """``value`` for each sample, where it has ``ndim`` dimensions for one and one more for all."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        tensor = _plain(tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}, got {value!r}") from error
    if tensor.ndim == 0 and ndim == 1:
        return [float(tensor)] * batch
    if tensor.ndim == ndim:
        return [tensor.numpy()] * batch
    if tensor.ndim == ndim + 1 and len(tensor) == batch:
        return list(tensor.numpy())
    raise ValueError(f"{rule} with B = {batch}, got shape {tuple(tensor.shape)}")
