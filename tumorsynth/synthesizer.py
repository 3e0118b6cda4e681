"""`SynthesizeTumor`: adds tumours to a batch. `synthesize` shows the stages in order."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.mass_effect import MassEffect
from tumorsynth.arguments import check_probability
from tumorsynth.devices import parse_device, plain_defaults
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.generators.store import Handle
from tumorsynth.intensity import HU, Intensity
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.displace import displace_and_paint
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.paint import Painter
from tumorsynth.pipeline.place import PlacedSample, not_selected, place_samples
from tumorsynth.pipeline.records import Record, split_batch
from tumorsynth.pipeline.requests import request_tumors, skip_records
from tumorsynth.pipeline.settings import check_settings
from tumorsynth.pipeline.validation import check_batch, check_params
from tumorsynth.placement.types import Skip
from tumorsynth.random_streams import per_sample_seeds
from tumorsynth.threads import one_thread


class Synthesis(NamedTuple):
    """What one call made: image and label, and an entry of report and params as on the module."""

    image: Tensor
    label: Tensor
    report: list[dict[str, Any]]
    params: list[dict[str, Any]]


class SynthesizeTumor(nn.Module):
    """Adds synthetic tumours, image and label, to a batch of CT volumes or patches.

    After a call, ``report`` has one dict per tumour, or per reason for none, and ``params``
    replays the call.

    Args:
        generator: a bundled name ("liver-early", "lung", "hu2023"), a generator folder, a hub id,
            or a loaded generator: :class:`tumorsynth.Generator` or anything else that is a
            :class:`tumorsynth.TumorGenerator`. A name loads once per process and device, on first
            use.
        organ_labels: label values in which a tumour may sit, one int or several.
        tumor_label: the value that a tumour's voxels get.
        p: probability that a sample gets tumours.
        count: tumours per sample, at most 100: a number, (lo, hi) inclusive, or None for as many
            as the size prior's cases have.
        size_mm: equivalent diameter (of the sphere of the same volume): a number, (lo, hi) drawn
            log-uniformly, or a prior: "liver", "kidney", "pancreas", "cyst", "lung".
        intensity: what the image's values mean: ``HU()``, ``Scaled(...)`` or ``ZScore(...)``.
        blend: "change" adds the difference that the generator makes and keeps the scan's own
            noise; "difftumor" blends the decoded voxels, as published.
        contrast_hu: HU between a tumour and the tissue around it, negative for darker: a number,
            (lo, hi) drawn per tumour, or a prior of an organ and a phase ("liver-portal",
            "kidney-arterial", "pancreas-unenhanced", ...) with rims and necrotic cores. None
            leaves the contrast to the generator.
        sigma_mm: feather of the edge, a number or (lo, hi) drawn per tumour. None means
            (0.5, 1.5), and (0, 4) with blend="difftumor", as published. With blend="change" the
            feather is never sharper than the scan.
        gap_mm: organ left between two tumours.
        merge: let tumours touch.
        device: where the generator runs; None for the image's device. Results come back to the
            image's device.
        gate: True, or a :class:`tumorsynth.Gate` with your own limits: tumours are scored, made
            again with the next seed if a score is out of its limits, and skipped if that does not
            help. The report has the scores.
        mass_effect: share of a tumour's volume, 0 to 0.9, that pushes the tissue around it aside,
            in image and label; the rest replaces tissue. "auto" is 0 below 20 mm and grows to 0.6
            at 50 mm; or a :class:`tumorsynth.MassEffect`. With 0 nothing but the tumours changes.
        shapes: real tumour masks that give the tumours their shapes, turned, mirrored, slightly
            bent and scaled: a folder of NIfTI files, or a list of files or of (mask, spacing).
        bulge: exophytic growth, into unlabelled fat around the organ: True for as often and as far
            as in the masks behind size_mm="kidney" or "cyst", or the share of a tumour's volume
            beyond the organ's label, 0 to 0.9, a number or (lo, hi) drawn per tumour. With False
            labels change inside the organ only.

    Raises:
        ValueError: for an argument that is out of range or unknown.
        TypeError: for an argument of the wrong type.
        FileNotFoundError: for an unknown generator.

    Example:
        >>> synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=2, count=(1, 3))
        >>> image, label = synth(image, label, spacing=(0.8, 0.8, 2.5), seed=7)
        >>> synth.report[0]["diameter_mm"]
    """

    @plain_defaults()
    def __init__(
        self,
        generator: str | os.PathLike[str] | TumorGenerator = "liver-early",
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
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.handle = Handle(arguments.pop("generator"))
        self.settings = check_settings(**arguments)
        self.report: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.painter = Painter(self.handle)

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
        """Return a new (image, label) with tumours; the inputs stay as they are.

        Where no sample gets a tumour, the inputs themselves come back. Afterwards ``report`` and
        ``params`` are those of this call.

        Args:
            image: (B, 1, X, Y, Z) or (1, X, Y, Z), floating point, in the scale of ``intensity``.
            label: the same shape, whole numbers of any dtype.
            spacing: mm per voxel along X, Y, Z: three numbers, or (B, 3).
            affine: 4x4 or (B, 4, 4), voxel to RAS mm, instead; gives the orientation as well.
                Without either, a MetaTensor's affine counts, else 1 mm.
            seed: one int (sample b uses seed + b) or one per sample; by default drawn from torch's
                global generator. It alone decides what the call does to a sample.
            params: ``synth.params`` of an earlier call, to repeat bit by bit.

        Raises:
            ValueError: for input that cannot work. An organ that is absent or has no room is no
                error: the report says why the sample is unchanged.
            TypeError: for input of the wrong type.
        """
        made = self.synthesize(image, label, spacing, affine=affine, seed=seed, params=params)
        self.report, self.params = made.report, made.params
        return made.image, made.label

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
        seed: int | Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
        exclude: Mapping[int, Skip] | None = None,
    ) -> Synthesis:
        """Return what `forward` makes with its report and params, and keep neither.

        For several threads with one transform, and for adapters.

        Args:
            image: as for `forward`, like the others.
            label: the same shape.
            spacing: mm per voxel.
            affine: voxel to RAS mm.
            seed: one int, or one per sample.
            params: of an earlier call.
            exclude: why samples of these numbers are left alone.
        """
        settings, exclude = self.settings, exclude or {}
        frames = check_batch(image, label, settings.tumor_label, spacing, affine)
        if params is not None:
            check_params(params, len(frames))
        elif settings.p == 0:  # nothing to draw, nothing to load
            placed = [PlacedSample(not_selected(settings, None), []) for _ in frames]
            return _synthesis(image, label, skip_records(placed), placed)
        seeds = [0] * len(frames) if params is not None else per_sample_seeds(seed, len(frames))
        generator = self.handle.get(settings.device or image.device)
        call = Call(settings, generator, self.painter)
        samples = split_batch(image, label, frames)
        # a caller's autocast would resample and feather in half precision
        with torch.autocast(image.device.type, enabled=False):
            placed = place_samples(settings, samples, seeds, params, exclude)
            requests = request_tumors(call, samples, placed)
            if requests:  # otherwise the inputs come back themselves
                image, label = image.clone(), label.clone()
                samples = split_batch(image, label, frames)
            records = requests.records
            records += paint_and_finish(call, requests.paint, samples, placed)
            records += displace_and_paint(call, requests.displace, samples, placed)
        return _synthesis(image, label, records, placed)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments by name, as checked; the generator by its name or folder."""
        names = inspect.signature(SynthesizeTumor).parameters
        return {
            name: self.handle.source if name == "generator" else getattr(self.settings, name)
            for name in names
        }

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


def _synthesis(
    image: Tensor, label: Tensor, records: list[Record], placed: Sequence[PlacedSample]
) -> Synthesis:
    records.sort(key=lambda record: (record.sample, record.index))
    report = [record.to_dict() for record in records]
    return Synthesis(image, label, report, [sample.to_params() for sample in placed])
