"""What goes between the stages of `SynthesizeTumor`: settings, a tumour's job, its draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.contrast_priors import ContrastPrior
from tumorsynth.gate import Gate
from tumorsynth.geometry import CropGrid
from tumorsynth.intensity import Intensity
from tumorsynth.masks import LocalMask
from tumorsynth.mass_effect import MassEffect
from tumorsynth.weights import Handle

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
    crop_mask: Tensor  # bool, the same shape
    grain_mm: tuple[float, float, float]  # how sharp the scan is there, along the tensor's axes

    @property
    def sigma_mm(self) -> tuple[float, float, float]:
        """The feather along the tensor's axes: as drawn, and no sharper than the scan."""
        a, b, c = (max(self.tumor.params.sigma_mm, g) for g in self.grain_mm)
        return a, b, c


@dataclass
class Draft:
    """What one tumour would make of its part of the sample."""

    where: tuple[slice, slice, slice]
    before: Tensor
    after: Tensor
    inside: Tensor  # bool, the tumour
    peak_weight: float
    hu_change: float  # mean in the tumour
    empty: bool  # nothing to be seen


def left_alone(sample: int, index: int, reason: str) -> dict[str, Any]:
    return {"sample": sample, "index": index, "applied": False, "reason": reason}
