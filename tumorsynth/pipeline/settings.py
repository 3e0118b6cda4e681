"""`Settings`: the arguments of a transform, checked once; no stage changes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tumorsynth.appearance.blend import BLENDS
from tumorsynth.appearance.contrast import check_contrast
from tumorsynth.appearance.contrast_priors import ContrastPrior, get_contrast_prior
from tumorsynth.appearance.gate import Gate, check_gate
from tumorsynth.appearance.mass_effect import MassEffect, check_mass_effect
from tumorsynth.arguments import check_flag, check_probability
from tumorsynth.devices import parse_device
from tumorsynth.intensity import Intensity
from tumorsynth.label_maps import LabelMap, LabelMapLike, organ_values, read_label_map
from tumorsynth.placement.arguments import (
    MAX_GAP_MM,
    MAX_SIGMA_MM,
    check_count,
    check_organ_labels,
    check_range,
    check_size,
    check_tumor_label,
)
from tumorsynth.placement.exophytic import check_bulge
from tumorsynth.placement.settings import OwnShape, PlacementSettings
from tumorsynth.placement.user_shapes import read_shapes

FEATHER_MM = {"change": (0.5, 1.5), "difftumor": (0.0, 4.0)}  # sigma; the second as published


@dataclass(frozen=True)
class Settings:
    """What the stages of `SynthesizeTumor` need to know.

    Args:
        organ_labels: label values in which a tumour may sit.
        tumor_label: label value of a tumour's voxels.
        p: probability that a sample gets tumours.
        placement: how many tumours a sample gets, how large, of what shape.
        intensity: what the image's values mean in HU.
        blend: "change" or "difftumor".
        contrast_hu: range or prior of the contrast; None leaves it to the generator.
        gate: limits that a tumour has to keep; None accepts every tumour.
        mass_effect: share of a tumour's volume that pushes tissue aside instead of replacing it.
        bulge: the argument as given, from which ``placement.bulge`` follows.
        any_tissue: whether tumours may lie in tissue that the generator is not for.
        device: where the generator runs; None for the image's own device.
        label_map: the names of the label's values, where organ_labels were given by name.
    """

    organ_labels: tuple[int, ...]
    tumor_label: int
    p: float
    placement: PlacementSettings
    intensity: Intensity
    blend: str
    contrast_hu: tuple[float, float] | ContrastPrior | None
    gate: Gate | None
    mass_effect: MassEffect
    bulge: bool | float | Sequence[float]
    any_tissue: bool
    device: torch.device | None
    label_map: LabelMap | None = None

    @property
    def keeps_visible(self) -> bool:
        """Whether a contrast that the scan's noise would hide is raised, or the tumour skipped.

        Not where the user chose the contrast, nor with the published blend.
        """
        return self.contrast_hu is None and self.blend == "change"

    def with_contrast(self, contrast_hu: Any) -> Settings:
        """Return the settings with another ``contrast_hu``, given as to `SynthesizeTumor`."""
        contrast = _check_contrast(contrast_hu)
        placement = replace(self.placement, contrast_hu=_range_of(contrast))
        return replace(self, contrast_hu=contrast, placement=placement)

    @property
    def count(self) -> Any:
        """The argument ``count``."""
        return self.placement.count

    @property
    def size_mm(self) -> Any:
        """The argument ``size_mm``."""
        return self.placement.size_mm

    @property
    def sigma_mm(self) -> Any:
        """Smallest and largest feather."""
        return self.placement.sigma_mm

    @property
    def gap_mm(self) -> float:
        """Organ left between two tumours."""
        return self.placement.gap_mm

    @property
    def merge(self) -> bool:
        """Whether tumours may touch."""
        return self.placement.merge

    @property
    def shapes(self) -> Sequence[str]:
        """Outlines of the masks in ``shapes``."""
        return self.placement.outlines


Contrast = tuple[float, float] | ContrastPrior | None


def _check_contrast(contrast_hu: Any) -> Contrast:
    if isinstance(contrast_hu, str):
        return get_contrast_prior(contrast_hu)
    return contrast_hu if isinstance(contrast_hu, ContrastPrior) else check_contrast(contrast_hu)


def _range_of(contrast: Contrast) -> tuple[float, float] | None:
    return None if isinstance(contrast, ContrastPrior) else contrast


def check_settings(
    *,
    organ_labels: int | str | Iterable[int | str],
    tumor_label: int,
    p: float,
    count: int | Sequence[int] | None,
    size_mm: float | Sequence[float] | str,
    intensity: Intensity,
    blend: str,
    contrast_hu: float | Sequence[float] | str | ContrastPrior | None,
    sigma_mm: float | Sequence[float] | None,
    gap_mm: float,
    merge: bool,
    device: torch.device | str | None,
    gate: bool | Gate | None,
    mass_effect: float | str | MassEffect,
    shapes: Any,
    bulge: bool | float | Sequence[float],
    any_tissue: bool,
    label_map: LabelMapLike = None,
    own_shapes: Sequence[OwnShape] = (),
) -> Settings:
    """Return the settings for the arguments of `SynthesizeTumor`, documented there.

    Args:
        own_shapes: those that the generator brings along.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for an argument of the wrong type.
    """
    named = read_label_map(label_map)
    tumor_label = check_tumor_label(tumor_label, ())
    regions = None if named is None else named.without(tumor_label)
    labels = check_organ_labels(organ_values(organ_labels, regions))
    check_tumor_label(tumor_label, labels)
    p = check_probability("p", p)
    check_count(count)
    check_size(size_mm)
    if not isinstance(intensity, Intensity) or isinstance(intensity, type):
        raise TypeError(
            f"intensity must be ts.HU(), ts.Scaled(...) or ts.ZScore(...), got {intensity!r}"
        )
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
    contrast = _check_contrast(contrast_hu)
    sigma = check_range(
        "sigma_mm", FEATHER_MM[blend] if sigma_mm is None else sigma_mm, 0.0, MAX_SIGMA_MM
    )
    gap = check_range("gap_mm", gap_mm, 0.0, MAX_GAP_MM)[0]
    parsed_device = None if device is None else parse_device(device)
    checked_gate, checked_effect = check_gate(gate), check_mass_effect(mass_effect)
    outlines = read_shapes(shapes)
    return Settings(
        organ_labels=labels,
        tumor_label=tumor_label,
        p=p,
        placement=PlacementSettings(
            size_mm=size_mm,
            count=count,
            sigma_mm=sigma,
            contrast_hu=_range_of(contrast),
            gap_mm=gap,
            merge=check_flag("merge", merge),
            outlines=outlines,
            own_shapes=() if outlines else own_shapes,
            bulge=check_bulge(bulge, size_mm),
        ),
        intensity=intensity,
        blend=blend,
        contrast_hu=contrast,
        gate=checked_gate,
        mass_effect=checked_effect,
        bulge=bulge,
        any_tissue=check_flag("any_tissue", any_tissue),
        device=parsed_device,
        label_map=named,
    )
