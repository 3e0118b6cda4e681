"""Paint: cut the crop around a tumour, run a generator on it, match the result to the scan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tumorsynth.appearance.background import EXTENSION_MM, fill_background, measure_tissue
from tumorsynth.appearance.blend import feather_reach
from tumorsynth.appearance.contrast import similar_level_around
from tumorsynth.appearance.contrast_priors import ContrastPrior, add_structure
from tumorsynth.appearance.noise import (
    feather_mm,
    grain_region,
    match_to_scan,
    measure_grain,
    softening_mm,
)
from tumorsynth.devices import onto, or_on_cpu
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.generators.store import Handle
from tumorsynth.geometry import Box, CropGrid, Floats3, plan_crop
from tumorsynth.intensity import HU
from tumorsynth.pipeline.records import PaintRequest, Sample, TumorId
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.validation import check_hu, check_scale
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.sample import sample_contrast_hu
from tumorsynth.placement.types import LocalMask, Skip, SkipCode
from tumorsynth.threads import own_threads, waits_busily

CONTEXT_MM = 16.0  # of the scan on each side of a tumour, at least, that its crop shows
ONE_THREAD_WORK = 1.5e12  # parameters times voxels, up to which networks run on one thread
GPU_BATCH = 8  # crops in one pass of the networks; halved where memory does not suffice


def request_painting(
    settings: Settings, generator: TumorGenerator, id: TumorId, sample: Sample, tumor: LocalMask
) -> PaintRequest | Skip:
    """Cut the crop around a tumour, in the generator's scale and on its grid.

    Returns:
        The request, or a Skip where the generator cannot paint in this tissue.

    Raises:
        ValueError: if the image around the tumour cannot be in the scale of ``intensity``.
    """
    spacing, to_hu = sample.frame.spacing, settings.intensity.to_hu
    grain_mm = (0.0, 0.0, 0.0)
    if settings.blend == "change":
        grain_mm = _grain_around(settings, sample, tumor)
    grid, region = _plan(settings, generator, sample, tumor, grain_mm)
    hu = to_hu(sample.image[grid.source.slices].float())
    if isinstance(settings.intensity, HU):
        check_hu(hu)
    else:
        check_scale(hu, settings.intensity)
    inside = torch.zeros(region.shape, dtype=torch.bool, device=sample.image.device)
    inside[tumor.box.relative_to(region).slices] = onto(tumor.mask, sample.image.device)

    local_hu = to_hu(sample.image[region.slices].float())
    local_label = sample.label[region.slices]
    tissue = measure_tissue(local_hu, local_label, settings.organ_labels, inside, generator.window)
    reason = tissue.outside_window(generator.window)
    if reason is not None:
        return Skip(SkipCode.OUTSIDE_WINDOW, reason, tumor.params.drawn_mm)
    fill = fill_background(
        local_hu, tissue, inside, spacing, grain_mm, tumor.params, generator.window
    )
    in_source = region.relative_to(grid.source).slices
    if fill is not None:
        hu = hu.clone()  # to_hu may return the sample itself
        hu[in_source] += fill.generator_change_hu
    low, high = generator.window
    hu = hu.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
    outline = _mask_on_grid(grid, inside, in_source, hu)
    shown = outline
    if fill is not None:
        shown = _mask_on_grid(grid, fill.generator_mask, in_source, hu)
    return PaintRequest(
        id=id,
        tumor=tumor,
        grid=grid,
        crop=grid.cut((hu - low) / (high - low)),
        crop_mask=shown,
        crop_outline=outline,
        grain_mm=grain_mm,
        region=region,
        inside=inside,
        outside_share=0.0 if fill is None else tissue.outside_share,
        fill=fill,
    )


def _plan(
    settings: Settings,
    generator: TumorGenerator,
    sample: Sample,
    tumor: LocalMask,
    grain_mm: Floats3,
) -> tuple[CropGrid, Box]:
    """Return a tumour's crop, and the region that its feather and its fill may change."""
    frame, spacing = sample.frame, sample.frame.spacing
    sigma_mm = feather_mm(tumor.params.sigma_mm, grain_mm)
    feathered = feather_reach(sigma_mm, spacing, settings.blend, softening_mm(grain_mm))
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


def with_contrast(
    settings: Settings, generator: TumorGenerator, request: PaintRequest, seed: int
) -> PaintRequest:
    """Return the request with this noise seed and the contrast that follows from it."""
    params = replace(request.tumor.params, seed=seed)
    if isinstance(settings.contrast_hu, ContrastPrior):
        low, high = generator.window
        hu = request.crop[None, None] * (high - low) + low
        level = float(similar_level_around(hu, request.crop_mask[None, None]))
        contrast_hu, structure_hu = settings.contrast_hu.sample(seed, params.diameter_mm, level)
        params = replace(params, contrast_hu=contrast_hu, structure_hu=structure_hu)
    else:
        contrast = sample_contrast_hu(settings.contrast_hu, seed)
        params = replace(params, contrast_hu=contrast)
    return replace(request, tumor=replace(request.tumor, params=params))


class Painter:
    """Runs a generator on crops, several at a time on a GPU.

    Args:
        handle: the transform's generator, on any device.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.batch_limit = GPU_BATCH  # lowered for good where a GPU's memory is too small

    def paint(
        self, settings: Settings, generator: TumorGenerator, requests: Sequence[PaintRequest]
    ) -> Iterator[tuple[PaintRequest, Tensor]]:
        """Yield each request with what the generator makes of it, (side, side, side) in HU.

        The result is a change with blend="change", and a tumour with blend="difftumor". On a CPU
        crops go one by one: a batch is no faster there, and the last bit of a convolution depends
        on it.
        """
        if not requests:
            return
        device, blend = settings.device or requests[0].crop.device, settings.blend
        for side in sorted({request.grid.side for request in requests}):
            waiting = [request for request in requests if request.grid.side == side]
            while waiting:
                batch = waiting[: self._batch_size(device)]
                run = partial(self._run_generator, batch, generator, blend)
                generated = or_on_cpu("the generator", device, run)
                if generated is None:  # outside of the exception, which would keep the memory
                    self._halve_batch(len(batch))
                    continue
                waiting = waiting[len(batch) :]
                for request, one in zip(batch, generated, strict=True):
                    yield request, one if blend != "change" else _matched(request, one, generator)

    def _batch_size(self, device: torch.device) -> int:
        return 1 if device.type == "cpu" else self.batch_limit

    def _run_generator(
        self,
        batch: Sequence[PaintRequest],
        generator: TumorGenerator,
        blend: str,
        device: torch.device,
    ) -> Tensor | None:
        """Return (batch, side, side, side) in HU; None if the batch exceeds a GPU's memory."""
        if device.type == "cpu" != generator.device.type:  # or_on_cpu falls back to the CPU
            generator = self.handle.get(device)
        run = generator.change if blend == "change" else generator.inpaint
        params = [request.tumor.params for request in batch]
        needed = Box.hull([request.needed for request in batch])
        # with_contrast draws a contrast for all tumours of a call, or for none
        contrasts = [one.contrast_hu for one in params if one.contrast_hu is not None]
        try:
            crops = onto(torch.stack([request.crop for request in batch])[:, None], device)
            masks = onto(torch.stack([request.crop_mask for request in batch])[:, None], device)
            with _threads(generator, crops), torch.autocast(device.type, enabled=False):
                generated = run(
                    crops,
                    masks,
                    seed=[one.seed for one in params],
                    contrast_hu=contrasts or None,
                    near=needed.slices,
                )
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            return None
        low, high = generator.window
        generated = generated[:, 0].to(batch[0].crop.device) * (high - low)
        return generated if blend == "change" else generated + low

    def _halve_batch(self, tried: int) -> None:
        """Run fewer crops at a time from now on; warn the first time."""
        if self.batch_limit == GPU_BATCH:
            warnings.warn(
                f"the GPU's memory does not hold {tried} crops at once: going on with "
                f"{tried // 2}, and fewer if need be",
                stacklevel=2,
            )
        self.batch_limit = tried // 2
        torch.cuda.empty_cache()


def _threads(generator: TumorGenerator, crops: Tensor) -> AbstractContextManager[None]:
    """Return the context for a generator's CPU threads.

    Networks get all threads of the program if their operators are long enough to share, or if
    waiting threads sleep: spinning threads starve other programs and each other. A generator
    without ``parameter_count`` gets all threads.
    """
    parameters = getattr(generator, "parameter_count", None)
    if parameters == 0:
        return nullcontext()
    small = parameters is not None and parameters * crops.numel() <= ONE_THREAD_WORK
    return nullcontext() if small and waits_busily() else own_threads()


def _matched(request: PaintRequest, change: Tensor, generator: TumorGenerator) -> Tensor:
    """Match a change to the sharpness and the noise of its scan, and add rim and core."""
    low, high = generator.window
    crop = request.crop.to(change.device) * (high - low) + low
    grain_mm = [request.grain_mm[axis] for axis in request.grid.frame.axes]
    change = match_to_scan(crop, change, request.crop_mask, grain_mm, generator.even)
    params = request.tumor.params
    return add_structure(change, request.crop_outline, params.structure_hu, params.seed)


def _grain_around(settings: Settings, sample: Sample, tumor: LocalMask) -> Floats3:
    """Return the width of the scan's noise grain around a tumour, along the tensor's axes."""
    region = grain_region(tumor.box, sample.frame.spacing, sample.image.shape).slices
    hu = settings.intensity.to_hu(sample.image[region].float())
    organ = is_organ(sample.label[region], settings.organ_labels)
    return measure_grain(hu, organ, sample.frame.spacing)


def _mask_on_grid(
    grid: CropGrid, mask: Tensor, where: tuple[slice, slice, slice], like: Tensor
) -> Tensor:
    """Resample a mask, of a part of the grid's source, onto the grid.

    A voxel counts from half its volume on, or less if the tumour is smaller than a voxel.
    """
    whole = torch.zeros_like(like)
    whole[where] = mask.to(like.dtype)
    share = grid.cut(whole)
    return share >= (0.5 * share.max()).clamp(max=0.5)
