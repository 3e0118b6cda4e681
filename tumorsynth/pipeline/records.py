"""What goes between the stages of `SynthesizeTumor`: settings, a tumour's job, its draft."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.appearance.background import SPARE_MM, Fill
from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.mass_effect import MassEffect
from tumorsynth.appearance.noise import MARGIN, softening
from tumorsynth.devices import onto
from tumorsynth.generators.store import Handle
from tumorsynth.geometry import CropGrid
from tumorsynth.intensity import Intensity
from tumorsynth.placement.types import LocalMask, Skip

NOTHING = "the generator leaves this tissue as it is"


class Settings(nn.Module):
    """What a transform was told, as its stages read it; checked and set by `SynthesizeTumor`."""

    handle: Handle
    organ_labels: tuple[int, ...]
    tumor_label: int
    p: float
    count: Any
    size_mm: Any
    intensity: Intensity
    blend: str
    contrast_hu: tuple[float, float] | ContrastPrior | None
    sigma_mm: tuple[float, float]
    gap_mm: float
    merge: bool
    compute_device: torch.device | None
    gate: Gate | None
    mass_effect: MassEffect
    outlines: Any
    bulge: Any
    _together: int  # crops in one pass of the networks on a GPU


@dataclass
class Job:
    """One tumour on its way through the generator."""

    sample: int
    index: int  # among the sample's tumours and skips
    number: int  # among the sample's params
    tumor: LocalMask
    grid: CropGrid
    crop: Tensor  # (side, side, side) in [0, 1]
    crop_mask: Tensor  # bool, the same shape: the tumour as the generator is shown it
    crop_outline: Tensor  # and as it will be
    grain_mm: tuple[float, float, float]  # how sharp the scan is there, along the tensor's axes
    where: tuple[slice, slice, slice]  # the part of the sample that the feather reaches
    inside: Tensor  # bool, the tumour there
    outside_share: float  # of the tumour, beyond the organ
    fill: Fill | None = None  # even tissue in place of fat, or of a lung's vessels

    @property
    def sigma_mm(self) -> tuple[float, float, float]:
        """The feather along the tensor's axes: as drawn, and seen as softly as the scan sees."""
        return feather_mm(self.tumor.params.sigma_mm, self.grain_mm)

    @property
    def near(self) -> tuple[slice, slice, slice]:
        """The part of the crop that is read once it is painted: what the feather reaches, and where
        the change is matched to the scan."""
        a, b, c = (
            slice(s, s + n) for s, n in zip(self.tumor.start, self.tumor.mask.shape, strict=True)
        )
        by = MARGIN + (0 if self.fill is None else math.ceil(SPARE_MM) + 1)
        wider = [slice(n.start - by, n.stop + by) for n in self.grid.near((a, b, c))]
        return hull([self.grid.near(self.where), wider], self.crop.shape)


# place, tumour as placed, and the sample's tumours that are still to come
Pushing = tuple[tuple[int, int, int], LocalMask, list[LocalMask]]


@dataclass(frozen=True)
class Room:
    """What came of pushing tissue aside for a tumour, and how to take it back."""

    content: Job | Skip
    before: tuple[tuple[slice, ...], Tensor, Tensor] | None  # the part, its image and its label
    displaced_mm: float  # at most


@dataclass
class Draft:
    """What one tumour would make of its part of the sample."""

    after: Tensor
    peak_weight: float
    hu_change: float  # mean in the tumour
    empty: bool  # nothing to be seen


def feather_mm(drawn_mm: float, grain_mm: Sequence[float]) -> tuple[float, float, float]:
    a, b, c = (
        max(math.hypot(drawn_mm, softer), g)
        for softer, g in zip(softening(grain_mm), grain_mm, strict=True)
    )
    return a, b, c


def region(
    tumor: LocalMask, margin: Sequence[int], size: Sequence[int], device: torch.device
) -> tuple[tuple[slice, slice, slice], Tensor]:
    """The tumour's box and a margin within the sample (X, Y, Z), and the tumour in it, bool."""
    x, y, z = (
        slice(max(0, s - m), min(n, s + length + m))
        for s, length, m, n in zip(tumor.start, tumor.mask.shape, margin, size, strict=True)
    )
    inside = torch.zeros(
        [part.stop - part.start for part in (x, y, z)], dtype=torch.bool, device=device
    )
    inside[
        tuple(
            slice(s - part.start, s - part.start + n)
            for s, part, n in zip(tumor.start, (x, y, z), tumor.mask.shape, strict=True)
        )
    ] = onto(tumor.mask, device)
    return (x, y, z), inside


def hull(boxes: Sequence[Sequence[slice]], shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The box around some boxes, within the shape."""
    x, y, z = (
        slice(max(0, min(s.start for s in along)), min(n, max(s.stop for s in along)))
        for n, *along in zip(shape, *boxes, strict=True)
    )
    return x, y, z


def left_alone(sample: int, index: int, reason: str) -> dict[str, Any]:
    return {"sample": sample, "index": index, "applied": False, "reason": reason}
