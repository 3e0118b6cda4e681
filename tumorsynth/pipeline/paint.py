"""Paint: run a generator on the crops around tumours and match its results to the scan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tumorsynth.appearance.contrast_priors import add_structure, sample_lumps_share
from tumorsynth.appearance.noise import match_to_scan, sample_own_variation
from tumorsynth.appearance.tissue import SOFT_TISSUE, TissueRange
from tumorsynth.devices import on_cpu, onto, or_on_cpu
from tumorsynth.fetching import together_on_cpu
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.generators.store import Handle
from tumorsynth.geometry import Box
from tumorsynth.once import Once
from tumorsynth.pipeline.pose import pose_of
from tumorsynth.pipeline.records import PaintRequest
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement.types import TumorParams
from tumorsynth.threads import own_threads, waits_busily

ONE_THREAD_WORK = 1.5e12  # parameters times voxels, up to which networks run on one thread
# How far a generator's values may be beyond its window, in widths of the window and in multiples of
# a requested contrast. No tissue is further away.
MAX_BEYOND_WINDOW = 0.5
MAX_OVER_CONTRAST = 3.0
# A tumour's mean is that of tissue, or not far from what it was: a wide window permits no metal
TUMOR_HU = SOFT_TISSUE.voxel_hu
MAX_UNKNOWN_HU = 1500.0  # the densest bone, for a generator whose card names no tissue
MAX_FROM_HEALTHY_HU = 250.0
DARKEST_ASKED_HU = -40.0  # in soft tissue; what is darker is fat
GPU_BATCH = 8  # crops in one pass of the networks; halved where memory does not suffice


class Painter:
    """Runs a generator on crops, several at a time on a GPU.

    Args:
        handle: the transform's generator, on any device.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.batch_limit = GPU_BATCH  # lowered for good where a GPU's memory is too small
        self._implausible, self._fat = Once(), Once()  # the warnings

    def paint(
        self, settings: Settings, generator: TumorGenerator, requests: Sequence[PaintRequest]
    ) -> Iterator[list[tuple[PaintRequest, Tensor]]]:
        """Yield, batch by batch, each request with what the generator makes of it.

        That is (side, side, side) in HU: a change with blend="change", and a tumour with
        blend="difftumor". On a CPU crops go one by one: a batch is no faster there, and the last
        bit of a convolution depends on it. A replay therefore forms the batches of the call, with
        the crops of tumours that were painted again by themselves, and of tumours that were
        rejected. Of the latter it yields nothing.
        """
        if not requests:
            return
        device = settings.device or requests[0].crop.device
        requests = _with_masks_on_cpu(requests)
        for kind in sorted({_batch_kind(request) for request in requests}):
            waiting = [request for request in requests if _batch_kind(request) == kind]
            while waiting:
                batch, generated = waiting[: self._batch_size(device)], None
                if any(_is_read(request) for request in batch):
                    run = partial(self._run_generator, batch, generator, settings.blend)
                    generated = or_on_cpu("the generator", device, run)
                    if generated is None:  # outside of the exception, which would keep the memory
                        self._halve_batch(len(batch))
                        continue
                waiting = waiting[len(batch) :]
                made = []
                for number, request in enumerate(batch):
                    if request.tumor.params.repainted and not request.rejected:
                        made.append((request, self.paint_alone(settings, generator, request)))
                    elif _is_read(request):
                        assert generated is not None
                        change = _finished(settings, generator, request, generated[number])
                        made.append((request, change))
                yield made

    def paint_alone(
        self, settings: Settings, generator: TumorGenerator, request: PaintRequest
    ) -> Tensor:
        """Return what the generator makes of one request by itself, with its raised contrast."""
        params = request.tumor.params
        asked = replace(params, contrast_hu=params.asked_hu)
        asking = replace(request, tumor=replace(request.tumor, params=asked))
        run = partial(self._run_generator, [asking], generator, settings.blend)
        generated = or_on_cpu("the generator", settings.device or request.crop.device, run)
        assert generated is not None  # one crop that does not fit raises an error
        return _finished(settings, generator, request, generated[0])

    def warn_of_implausible(self, reason: str) -> None:
        """Warn, once a transform, that tumours are skipped since the generator is at fault."""
        self._implausible.give(f"tumours are skipped: {reason}")

    def warn_of_fat(self, request: PaintRequest, settings: Settings) -> None:
        """Warn, once a transform, of a requested contrast that makes fat of soft tissue."""
        asked, level = request.tumor.params.contrast_hu, request.noise.level_hu
        if asked is None or level is None or settings.any_tissue:
            return
        if level > 0 and level + asked < DARKEST_ASKED_HU:
            self._fat.give(
                f"contrast_hu asks for a tumour of {level + asked:.0f} HU in tissue of "
                f"{level:.0f} HU, which is fat or gas; give a contrast nearer to 0, or "
                "any_tissue=True (--any-tissue) if you mean it"
            )

    def forms_batches(self, device: torch.device) -> bool:
        """Whether several crops go through the networks at once on a device."""
        return self._batch_size(device) > 1

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
        method = "change" if blend == "change" else "inpaint"
        run = getattr(generator, method)
        params = [request.tumor.params for request in batch]
        needed = Box.hull([request.needed for request in batch])
        contrasts = [one.contrast_hu for one in params if one.contrast_hu is not None]
        more = {}
        if getattr(generator, "takes_poses", False):
            more["poses"] = [pose_of(request) for request in batch]
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
                    **more,
                )
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            return None
        _check_result(f"{generator.name}.{method}()", generated, crops)
        low, high = generator.window
        width = _width_or_nan(generated, params, needed, generator.window, blend)
        generated = generated[:, 0] * torch.where(
            _is_tissue(generated, crops, masks, params, needed, generator, blend), width, math.nan
        )
        generated = generated.to(batch[0].crop.device)
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


def _check_result(source: str, generated: object, crops: Tensor) -> None:
    """Raise an error unless a generator, perhaps a third party's, returned a tensor like its crops.

    Args:
        source: the method that returned it, for the message.
        generated: what it returned.
        crops: what it got.

    Raises:
        TypeError: for anything but a tensor of the crops' dtype.
        ValueError: for another shape, part of which would be used silently.
    """
    shape = tuple(crops.shape)
    fix = "return one value for each voxel of the crop"
    if not isinstance(generated, Tensor):
        raise TypeError(f"{source} must return a tensor, got {type(generated).__name__}; {fix}")
    if generated.shape != crops.shape:
        raise ValueError(
            f"{source} must return its crop's shape {shape}, got {tuple(generated.shape)}; {fix}"
        )
    if generated.dtype != crops.dtype:
        raise TypeError(
            f"{source} must return its crop's dtype {crops.dtype}, got {generated.dtype}; convert "
            "the result with .to(crop.dtype)"
        )


def _width_or_nan(
    generated: Tensor,
    params: Sequence[TumorParams],
    needed: Box,
    window: tuple[float, float],
    blend: str,
) -> Tensor:
    """Return the window's width in HU for each crop (B, 1, 1, 1), NaN for implausible values.

    A crop times NaN changes no voxel, and `finish` looks for the reason then: no GPU is waited for
    here.

    Args:
        generated: (B, 1, side, side, side), what the generator made.
        params: of the B tumours.
        needed: the part of the crops that is read.
        window: of the generator.
        blend: "change" for a change, from -1 to 1 within the window, else tissue, from 0 to 1.
    """
    width = window[1] - window[0]
    widths = []
    for crop, one in zip(generated[:, 0], params, strict=True):
        values, largest = crop[needed.slices], 1.0
        if blend != "change":
            values, largest = values - 0.5, 0.5
        largest += MAX_BEYOND_WINDOW + MAX_OVER_CONTRAST * abs(one.contrast_hu or 0.0) / width
        # False for NaN
        widths.append(torch.where(values.abs().amax() <= largest, width, math.nan))
    return torch.stack(widths).to(generated)[:, None, None, None]


def _is_tissue(
    generated: Tensor,
    crops: Tensor,
    masks: Tensor,
    params: Sequence[TumorParams],
    needed: Box,
    generator: TumorGenerator,
    blend: str,
) -> Tensor:
    """Return whether each tumour's mean is such as a tumour may have: (B, 1, 1, 1), on the device.

    Args:
        generated: (B, 1, side, side, side), what the generator made.
        crops: what it got.
        masks: of the tumours.
        params: of the B tumours.
        needed: the part of the crops that is read.
        generator: whose window and card count.
        blend: "change" for a change, else tissue.
    """
    part = (slice(None), 0, *needed.slices)
    inside = masks[part]
    before, made = (
        torch.where(inside, values[part], 0.0).sum((1, 2, 3), keepdim=True)
        / inside.sum((1, 2, 3), keepdim=True).clamp(min=1)
        for values in (crops, generated)
    )
    width, low = generator.window[1] - generator.window[0], generator.window[0]
    change = (made if blend == "change" else made - before) * width
    before = before * width + low
    darkest, brightest = TUMOR_HU
    own = TissueRange.of_card(generator.card)
    if own is None:
        brightest = MAX_UNKNOWN_HU
    else:
        darkest, brightest = min(darkest, own.voxel_hu[0]), max(brightest, own.voxel_hu[1])
    asked = MAX_OVER_CONTRAST * torch.tensor([abs(one.contrast_hu or 0.0) for one in params])
    most = onto(MAX_FROM_HEALTHY_HU + asked, before.device).to(before)[:, None, None, None]
    after = before + change
    near = change.abs() <= most
    return near | ((after >= darkest) & (after <= brightest))


def _threads(generator: TumorGenerator, crops: Tensor) -> AbstractContextManager[None]:
    """Return the context for a generator's CPU threads.

    Large networks use all CPU threads, and so does a generator without ``parameter_count``. Small
    ones do so only where idle threads sleep; spinning threads would slow down other processes.
    """
    parameters = getattr(generator, "parameter_count", None)
    if parameters == 0:
        return nullcontext()
    small = parameters is not None and parameters * crops.numel() <= ONE_THREAD_WORK
    return nullcontext() if small and waits_busily() else own_threads()


def _batch_kind(request: PaintRequest) -> tuple[int, bool]:
    """What the crops of a batch share: their side, and whether a contrast is requested."""
    return request.grid.side, request.tumor.params.contrast_hu is not None


def _is_read(request: PaintRequest) -> bool:
    """Whether the result of a request's batch is used, not only its crop to fill the batch."""
    return not (request.rejected or request.tumor.params.repainted)


def _with_masks_on_cpu(requests: Sequence[PaintRequest]) -> list[PaintRequest]:
    """Copy the crops' masks of all requests at once, with one host-device synchronisation.

    A tumour whose voxels the CPU knows is matched to its scan without any.
    """
    masks = [request.crop_mask for request in requests]
    if on_cpu(masks[0]):
        return list(requests)
    copies = together_on_cpu(masks)
    return [
        replace(request, mask_on_cpu=copy) for request, copy in zip(requests, copies, strict=True)
    ]


def _finished(
    settings: Settings, generator: TumorGenerator, request: PaintRequest, generated: Tensor
) -> Tensor:
    """Match a result to its scan, unless the published blend takes it as it is."""
    return generated if settings.blend != "change" else _matched(request, generated, generator)


def _matched(request: PaintRequest, change: Tensor, generator: TumorGenerator) -> Tensor:
    """Match a change to the sharpness and the noise of its scan, and add rim and core."""
    low, high = generator.window
    crop = onto(request.crop, change.device) * (high - low) + low
    mask = request.crop_mask if request.mask_on_cpu is None else request.mask_on_cpu
    grain_mm = [request.fine_grain_mm[axis] for axis in request.grid.frame.axes]
    params = request.tumor.params
    own_variation = sample_own_variation(params.seed) if generator.even else None
    change = match_to_scan(crop, change, mask, grain_mm, own_variation, request.edge_mm)
    return add_structure(
        change,
        request.crop_outline,
        params.structure_hu,
        params.seed,
        params.heterogeneity_hu,
        params.diameter_mm,
        sample_lumps_share(params.seed, params.diameter_mm) if generator.even else 0.0,
    )
