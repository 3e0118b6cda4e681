"""Painting, the second stage of `SynthesizeTumor`: a tumour's crop through a generator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tumorsynth import masks
from tumorsynth._jobs import Job, Settings, feather_mm, hull, region
from tumorsynth.blend import reach
from tumorsynth.contrast import own_level
from tumorsynth.contrast_priors import ContrastPrior, structured
from tumorsynth.devices import onto, or_on_cpu
from tumorsynth.even_tissue import SPARE_MM, fill, tissue
from tumorsynth.generator import Generator
from tumorsynth.geometry import Frame, plan_crop
from tumorsynth.handcrafted import HandcraftedGenerator
from tumorsynth.inputs import check_hu, check_scale
from tumorsynth.intensity import HU
from tumorsynth.masks import LocalMask, Skip
from tumorsynth.texture import grain, match, neighbourhood, softening
from tumorsynth.threads import own_threads, waits_busily

CONTEXT_MM = 16.0  # at least this much of the scan on each side of a tumour goes into its crop
ONE_THREAD_WORK = 1.5e12  # parameters times voxels, up to which networks run on one thread
GPU_BATCH = 8  # crops in one pass of the networks; halved where memory does not suffice


class Painting(Settings):
    """From a tumour's voxels to what the generator makes of the crop around them."""

    def _crop(
        self,
        place: tuple[int, int, int],
        image: Tensor,
        label: Tensor,
        tumor: LocalMask,
        frame: Frame,
        generator: Generator | HandcraftedGenerator,
    ) -> Job | Skip:
        """The crop around a tumour on the generator's grid, in [0, 1], and the mask on it; or why
        this generator cannot paint there."""
        stop = [s + n for s, n in zip(tumor.start, tumor.mask.shape, strict=True)]
        grain_mm = (0.0, 0.0, 0.0)
        if self.blend == "change":
            grain_mm = self._grain(image, label, tumor, frame)
        sigma_mm = feather_mm(tumor.params.sigma_mm, grain_mm)
        feathered = reach(sigma_mm, frame.spacing, self.blend, softening(grain_mm))
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
        else:
            check_scale(hu, self.intensity)
        spare = (math.ceil((SPARE_MM + 1) / s) for s in frame.spacing)
        reached = [max(n, m) for n, m in zip(feathered, spare, strict=True)]
        where, there = region(tumor, reached, image.shape, image.device)
        local = self.intensity.to_hu(image[where].float())
        here = tissue(local, label[where], self.organ_labels, there, generator.window)
        unseen = here.unseen(generator.window)
        if unseen is not None:
            return Skip(unseen, tumor.params.drawn_mm)
        filled = fill(local, here, there, frame.spacing, grain_mm, tumor.params, generator.window)
        part = tuple(
            slice(w.start - g.start, w.stop - g.start)
            for w, g in zip(where, grid.source, strict=True)
        )
        if filled is not None:
            hu = hu.clone()  # the sample itself, where its scale is HU
            hu[part] += filled.shown_hu
        low, high = generator.window
        hu = hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
        crop = grid.cut((hu - low) / (high - low))

        def on_crop(inside: Tensor) -> Tensor:
            whole = torch.zeros_like(hu)
            whole[part] = inside.to(hu.dtype)
            share = grid.cut(whole)
            # half a voxel's share, or less where a tumour is smaller than the generator's voxels
            return share >= (0.5 * share.max()).clamp(max=0.5)

        outline = on_crop(there)
        shown = outline if filled is None else on_crop(filled.shown)
        outside = 0.0 if filled is None else here.outside_share
        return Job(
            *place, tumor, grid, crop, shown, outline, grain_mm, where, there, outside, filled
        )

    def _drawn(
        self, job: Job, record: dict[str, Any], generator: Generator | HandcraftedGenerator
    ) -> Job:
        """The job with what a contrast prior draws for it, noted in the sample's params."""
        if isinstance(self.contrast_hu, ContrastPrior):
            job = self._coloured(job, generator, job.tumor.params.seed)
            record["tumors"][job.number] = job.tumor.params.to_dict()
        return job

    def _coloured(self, job: Job, generator: Generator | HandcraftedGenerator, seed: int) -> Job:
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
        self, jobs: list[Job], generator: Generator | HandcraftedGenerator
    ) -> Iterable[tuple[Job, Tensor]]:
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
        self, part: list[Job], made: Tensor, generator: Generator | HandcraftedGenerator
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
            matched.append(structured(change, job.crop_outline, tumor.structure_hu, tumor.seed))
        return matched

    def _batch(self, device: torch.device) -> int:
        return 1 if device.type == "cpu" else self._together

    def _paint(
        self,
        part: list[Job],
        generator: Generator | HandcraftedGenerator,
        device: torch.device,
    ) -> Tensor | None:
        """What the generator makes of some jobs, (jobs, side, side, side) in HU; None where the
        GPU's memory does not hold them together."""
        if device.type == "cpu" != generator.device.type:  # in place of its own
            generator = self.handle.get(device)
        run = generator.change if self.blend == "change" else generator.inpaint
        drawn = [job.tumor.params for job in part]
        parts: dict[str, Any] = {}
        if isinstance(generator, Generator):
            parts["near"] = hull([job.near for job in part], part[0].crop.shape)
        try:
            crops = onto(torch.stack([job.crop for job in part])[:, None], device)
            inside = onto(torch.stack([job.crop_mask for job in part])[:, None], device)
            with _threads(generator, crops), torch.autocast(device.type, enabled=False):
                made = run(
                    crops,
                    inside,
                    seed=[params.seed for params in drawn],
                    contrast_hu=_asked([params.contrast_hu for params in drawn]),
                    **parts,
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


def _threads(
    generator: Generator | HandcraftedGenerator, crops: Tensor
) -> AbstractContextManager[None]:
    """The CPU threads for a generator's networks: all of the program's where an operator is long
    enough to be shared, or where threads that wait for each other leave the processor to others."""
    if not isinstance(generator, Generator):
        return nullcontext()
    networks = (generator.autoencoder, generator.denoiser)
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    small = parameters * crops.numel() <= ONE_THREAD_WORK
    return nullcontext() if small and waits_busily() else own_threads()


def _asked(contrasts: list[float | None]) -> list[float] | None:
    """The contrasts that tumours were drawn with; one call draws them for all or for none."""
    asked = [contrast for contrast in contrasts if contrast is not None]
    return asked or None
