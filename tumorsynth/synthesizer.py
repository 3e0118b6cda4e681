"""`SynthesizeTumor` adds tumours to a batch; `synthesize` shows the stages in order."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.mass_effect import MassEffect
from tumorsynth.appearance.visibility import FaintTumorWarning, faint_warning, is_faint
from tumorsynth.arguments import check_probability, keywords_of, known_keywords
from tumorsynth.devices import allow_deterministic_products, parse_device, plain_defaults
from tumorsynth.fetching import Task, run_together
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.generators.store import Handle
from tumorsynth.geometry import Box
from tumorsynth.intensity import HU, Intensity
from tumorsynth.label_maps import LabelMapLike
from tumorsynth.once import Once
from tumorsynth.pipeline.call import Call, Synthesis
from tumorsynth.pipeline.displace import displace_and_paint
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.frames import Carried, find_frames
from tumorsynth.pipeline.grow import NoRoomToGrowWarning, grow_params, no_room_to_grow
from tumorsynth.pipeline.label_map_check import LabelMapCheck, warn_of_taken_value
from tumorsynth.pipeline.paint import Painter
from tumorsynth.pipeline.params_grid import replay_frames
from tumorsynth.pipeline.place_batch import PlacedSample, not_selected, place_samples
from tumorsynth.pipeline.records import Record, Sample, TumorRecord, split_batch
from tumorsynth.pipeline.requests import request_tumors, skip_records
from tumorsynth.pipeline.settings import Settings, check_settings
from tumorsynth.pipeline.taken_label import TakenLabelCheck
from tumorsynth.pipeline.validation import (
    as_whole,
    check_first_phase,
    check_input,
    check_params,
    check_same_voxels,
)
from tumorsynth.placement.organ import fetch_box
from tumorsynth.placement.types import Skip
from tumorsynth.random_streams import per_sample_seeds
from tumorsynth.threads import one_thread
from tumorsynth.tracing import untraced


@keywords_of()
class SynthesizeTumor(nn.Module):
    """Adds synthetic tumours, image and label, to a batch of CT volumes or patches.

    After a call, ``report`` has one dict per tumour, or per reason for none, and ``params``
    replays the call.

    Args:
        generator: a bundled name ("liver-early", "lung", "hu2023"), a generator folder, a hub id,
            a bank of lesions (`tumorsynth.CopyPaste`), or a loaded generator:
            `tumorsynth.Generator` or anything else that is a `tumorsynth.TumorGenerator`. A name
            loads once per process and device, on first use.
        organ_labels: label values in which a tumour may sit, one int or several; or names, with
            ``label_map``: "liver", ("liver", "pancreas"), "kidney" for left and right.
        tumor_label: the value that a tumour's voxels get. Choose one that the label does not hold,
            or that of real tumours in it: a warning, once, says if it is another organ's.
        p: probability that a sample gets tumours.
        count: tumours per sample, at most 100: a number, (lo, hi) inclusive, or None to draw it
            from the cases behind the size prior.
        size_mm: equivalent diameter (of the sphere of the same volume): a number, (lo, hi) drawn
            log-uniformly, or a prior: "liver", "kidney", "pancreas", "cyst", "lung".
        intensity: the image's scale: ``HU()``, ``Scaled(...)`` or ``ZScore(...)``.
        blend: "change" adds the difference that the generator makes and keeps the scan's own
            noise; "difftumor" blends the decoded voxels, as published.
        contrast_hu: HU between a tumour's core and the tissue around, negative for darker: a
            number, (lo, hi) drawn per tumour, or a prior of an organ and a phase ("liver-portal",
            "kidney-arterial", "pancreas-unenhanced", ...) with rims, necrotic cores and lumps. None
            leaves the contrast to the generator; where the scan's noise would hide the tumour,
            the contrast is raised, or the tumour skipped. A contrast of yours stays.
        sigma_mm: feather of the edge, a number or (lo, hi) drawn per tumour. None means
            (0.5, 1.5), and (0, 4) with blend="difftumor", as published. With blend="change" the
            feather is never sharper than the scan, and more than 1.5 makes an infiltrating margin,
            of which the inner half lies in the label.
        gap_mm: least distance between two tumours.
        merge: whether tumours may touch.
        device: where the generator runs; None for the image's device. Results come back to the
            image's device.
        gate: True, or a `tumorsynth.Gate` with your own limits, scores each tumour. One
            beyond a limit is made again with the next seed, up to ``tries`` attempts in all, and
            then skipped. The
            report has the scores.
        mass_effect: share of a tumour's volume, 0 to 0.9, that pushes the tissue around it aside,
            in image and label; the rest replaces tissue. "auto" is 0 below 20 mm and grows to 0.6
            at 50 mm; or a `tumorsynth.MassEffect`. With 0 only the tumours change.
        shapes: real tumour masks as shapes, which are turned, mirrored, slightly bent and scaled:
            a folder of NIfTI files, or a list of files or of (mask, spacing).
        bulge: exophytic growth, into unlabelled fat around the organ. True follows the masks
            behind size_mm="kidney" or "cyst"; otherwise the share of a tumour's volume beyond the
            organ, 0 to 0.9, a number or (lo, hi) drawn per tumour. With False tumours stay inside
            the organ.
        any_tissue: whether to paint also where the organ's tissue is unlike the one that the
            generator's card names (``tissue_range``). With False, and without ``contrast_hu``, such
            places are avoided, and a tumour that finds no other is skipped.
        label_map: which values the names in ``organ_labels`` have: that of a public set
            ("totalsegmentator", "totalsegmentator-v1", "amos", "btcv", "flare22",
            "abdomenatlas", "kits", "lits", "msd-pancreas"), a dict of your own, or the path of a
            dataset.json. A label with values that a public set does not have is an error.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.
        FileNotFoundError: for an unknown generator.

    Examples:
        >>> synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=2, count=(1, 3))
        >>> image, label = synth(image, label, spacing=(0.8, 0.8, 2.5), seed=7)
        >>> synth.report[0]["diameter_mm"]
    """

    @plain_defaults()
    def __init__(
        self,
        generator: str | os.PathLike[str] | TumorGenerator = "liver-early",
        organ_labels: int | str | Iterable[int | str] = (1,),
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
        any_tissue: bool = False,
        label_map: LabelMapLike = None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.handle = Handle(arguments.pop("generator"))
        self.settings = check_settings(**arguments, own_shapes=self.handle.own_shapes)
        self.report: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.painter = Painter(self.handle)
        self.unknown_size = Once()  # the warning
        self.taken_label = TakenLabelCheck(self.tumor_label, self.organ_labels)
        self.faint_tumor = Once()  # likewise
        self.label_map_check = LabelMapCheck(self.settings.label_map, self.tumor_label)
        warn_of_taken_value(self.settings.label_map, self.tumor_label)
        self.no_room_to_grow = Once()

    @untraced
    @known_keywords
    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        label: Tensor,
        spacing: Any = None,
        *,
        affine: Any = None,
        override_affine: bool = False,
        seed: int | Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
        contrast_hu: float | Sequence[float] | str | ContrastPrior | None = None,
        first_phase: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return a new (image, label) with tumours; the inputs stay as they are.

        If no sample gets a tumour, the inputs themselves come back, uncopied. The call sets
        ``report`` and ``params``. Label values within 0.01 of a whole number are rounded.

        Args:
            image: (B, 1, X, Y, Z) or (1, X, Y, Z), floating point, in the scale of ``intensity``.
            label: the same shape, whole numbers of any dtype.
            spacing: mm per voxel along X, Y, Z: three numbers, (B, 3), a list of B tensors (3,), or
                three tensors (B,) as torch's ``default_collate`` makes of tuples. With B = 3 the
                last two look alike and are refused, unless both mean the same.
            affine: voxel to RAS mm, 4x4 or (B, 4, 4), in place of ``spacing``; gives the
                orientation as well. The default of both is the affine of the MetaTensor that image
                or label is. Without one, voxels count as 1 mm; there, and where it stems from
                one that libraries give to plain arrays, the transform warns once.
            override_affine: whether ``spacing`` or ``affine`` win over a MetaTensor's affine that
                contradicts them, instead of an error. They always win over one that stems from
                plain arrays.
            seed: one int (sample b uses seed + b) or one per sample; None draws it from torch's
                global generator. A sample's tumours depend on its own seed alone, not on the batch.
            params: ``synth.params`` of an earlier call, to repeat it bit by bit, on a grid of the
                same shape, voxel size, orientation and place; or what `grow` made of them.
            contrast_hu: with ``params``, the contrast of another phase, in place of theirs: as for
                the constructor.
            first_phase: with ``params``, the image that they were drawn in, where ``image`` is
                another phase, registered to it. The tumours then take the very same voxels.

        Returns:
            Image and label, of the inputs' shapes, dtypes and devices.

        Raises:
            ValueError: for input that cannot work. An organ that is absent or has no room is no
                error: the report says why the sample is unchanged.
            TypeError: for input of the wrong type.
        """
        image, label, self.report, self.params = self.synthesize(
            image,
            label,
            spacing,
            affine=affine,
            override_affine=override_affine,
            seed=seed,
            params=params,
            contrast_hu=contrast_hu,
            first_phase=first_phase,
        )
        return image, label

    @untraced
    @known_keywords
    @torch.no_grad()
    @plain_defaults()
    @one_thread()
    def synthesize(
        self,
        image: Tensor,
        label: Tensor,
        spacing: Any = None,
        *,
        affine: Any = None,
        override_affine: bool = False,
        seed: int | Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
        contrast_hu: float | Sequence[float] | str | ContrastPrior | None = None,
        first_phase: Tensor | None = None,
        exclude: Mapping[int, Skip] | None = None,
        carried: Sequence[Carried] | None = None,
    ) -> Synthesis:
        """Return what `forward` makes together with its report and params, and keep neither.

        For several threads that share a transform, and for adapters. Arguments and errors are
        those of `forward`.

        Args:
            exclude: skips for samples, by their number in the batch.
            carried: affines that came along, where image and label are no MetaTensors.
        """
        settings, exclude = self.settings, exclude or {}
        check_input(image, label, settings.tumor_label)
        if contrast_hu is not None or first_phase is not None:
            settings = self._of_other_phase(image, params, contrast_hu, first_phase)
        label = as_whole("label", label)
        if carried is None:
            carried = [Carried.of("image", image), Carried.of("label", label)]
            if first_phase is not None:
                carried.append(Carried.of("first_phase", first_phase))
        frames, doubt = find_frames(
            image.shape[-3:],
            len(image) if image.ndim == 5 else 1,
            carried,
            spacing=spacing,
            affine=affine,
            override_affine=override_affine,
        )
        if params is not None:
            check_params(params, len(frames), seed)
            frames = replay_frames(params, image.shape[-3:], frames, exclude)
        elif settings.p == 0:  # draw nothing and load no generator
            placed = [PlacedSample(not_selected(settings, None), []) for _ in frames]
            return Synthesis.of(image, label, skip_records(placed), placed)
        if doubt is not None:
            self.unknown_size.give(doubt)
        seeds = [0] * len(frames) if params is not None else per_sample_seeds(seed, len(frames))
        for device in {image.device, settings.device or image.device}:
            allow_deterministic_products(device)
        generator = self.handle.get(settings.device or image.device)
        new_contrast = contrast_hu is not None
        call = Call(settings, generator, self.painter, new_contrast)
        if new_contrast and first_phase is None:
            check_same_voxels(params or (), call.tissue is not None)
        samples = split_batch(image, label, frames, first_phase)
        # a caller's autocast would resample and feather in half precision
        with torch.autocast(image.device.type, enabled=False):
            if self.label_map_check.is_open and params is None:
                self.label_map_check.check_all(sample.label for sample in samples)
            placed = place_samples(
                settings, samples, seeds, params, exclude, call.tissue, new_contrast
            )
            if self.taken_label.is_open and params is None and any(p.results for p in placed):
                self._judge_tumor_label(samples, placed)
            requests = request_tumors(call, samples, placed)
            records = requests.records
            if not requests:
                return Synthesis.of(image, label, records, placed)
            new_image, new_label = image.clone(), label.clone()
            if first_phase is not None and requests.displace:
                first_phase = first_phase.clone()  # its tissue moves, too
            samples = split_batch(new_image, new_label, frames, first_phase)
            records += paint_and_finish(call, requests.paint, samples, placed)
            records += displace_and_paint(call, requests.displace, samples, placed)
        if params is None and settings.gate is None:  # else the user decides
            self._warn_of_faint(records)
        self._warn_of_no_room(records)
        if not any(isinstance(record, TumorRecord) for record in records):
            return Synthesis.of(image, label, records, placed)
        return Synthesis.of(new_image, new_label, records, placed)

    def _judge_tumor_label(self, samples: Sequence[Sample], placed: Sequence[PlacedSample]) -> None:
        """Warn once if samples that get tumours hold an organ of the tumours' value."""
        boxes = run_together(map(self._box_of_tumor_label, samples, placed))
        for sample, box in zip(samples, boxes, strict=True):
            if box is not None and self.taken_label.is_open:
                self.taken_label.judge(sample.label, box, voxel_mm3=sample.frame.voxel_mm3)

    def _box_of_tumor_label(self, sample: Sample, placed: PlacedSample) -> Task[Box | None]:
        if placed.tumor_box is None and self.settings.merge and placed.results:  # not searched yet
            return (yield from fetch_box(sample.label, (self.tumor_label,)))
        return placed.tumor_box

    def _warn_of_faint(self, records: Iterable[Record]) -> None:
        """Warn of a tumour that is hardly visible, once a transform."""
        for record in records:
            if isinstance(record, TumorRecord) and is_faint(record.visibility):
                assert record.visibility is not None
                words = faint_warning(record.visibility, record.diameter_mm)
                self.faint_tumor.give(words, FaintTumorWarning)

    def _warn_of_no_room(self, records: Iterable[Record]) -> None:
        """Warn of a tumour that could not grow as far as asked for, once a transform."""
        for record in records:
            growth = record.growth if isinstance(record, TumorRecord) else None
            if growth is not None and not growth.has_room:
                self.no_room_to_grow.give(no_room_to_grow(growth), NoRoomToGrowWarning)

    def _of_other_phase(
        self, image: Tensor, params: Any, contrast_hu: Any, first_phase: Tensor | None
    ) -> Settings:
        """Check what a call says about another phase; return the settings for it."""
        if params is None:
            name = "contrast_hu" if first_phase is None else "first_phase"
            raise ValueError(
                f"{name} of a call must go with params, whose tumours it puts into another phase, "
                "got no params; pass params=synth.params of the first phase, or give contrast_hu "
                "to the constructor"
            )
        if first_phase is not None:
            check_first_phase(first_phase, image)
        return self.settings if contrast_hu is None else self.settings.with_contrast(contrast_hu)

    def grow(self, params: Sequence[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
        """Return params of the same tumours at another size, for ``params=`` of a call.

        Place, shape and texture stay. Of two sizes of one tumour the smaller lies within the
        larger, voxel by voxel, whatever the factors. A tumour that the organ leaves no room for
        grows as far as it can; the report's ``growth`` and a warning say so.

        Args:
            params: ``synth.params``, or what this method returned.
            factor: new diameter over the one in ``params``, 0.05 to 20; below 1 tumours shrink.
                A volume that doubles has a factor of 2^(1/3) = 1.26.

        Raises:
            ValueError: for other params, and for a factor that is out of range.

        Examples:
            >>> image, label = synth(ct, organ, spacing=spacing, seed=7)
            >>> later, later_label = synth(
            ...     ct, organ, spacing=spacing, params=synth.grow(synth.params, 1.3)
            ... )
        """
        return grow_params(params, factor, self.settings.mass_effect)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments by name, as checked; the generator by its name or folder."""
        _, *names = inspect.signature(SynthesizeTumor).parameters
        values = {name: getattr(self.settings, name) for name in names}
        return {"generator": self.handle.source, **values}

    @property
    def organ_labels(self) -> tuple[int, ...]:
        """Label values in which a tumour may sit."""
        return self.settings.organ_labels

    @property
    def tumor_label(self) -> int:
        """The value that a tumour's voxels get."""
        return self.settings.tumor_label

    @property
    def intensity(self) -> Intensity:
        """What the image's values mean."""
        return self.settings.intensity

    @property
    def p(self) -> float:
        """Probability that a sample gets tumours; can be set."""
        return self.settings.p

    @p.setter
    def p(self, value: float) -> None:
        self.settings = replace(self.settings, p=check_probability("p", value))

    @property
    def device(self) -> torch.device | None:
        """Where the generator runs, None for the image's device; can be set."""
        return self.settings.device

    @device.setter
    def device(self, value: torch.device | str | None) -> None:
        device = None if value is None else parse_device(value)
        self.settings = replace(self.settings, device=device)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
