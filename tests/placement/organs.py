"""Organs to place tumours in, and short forms of `place` for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask, Skip

ISO = (1.0, 1.0, 1.0)


def make_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ellipsoid(shape, spacing, half_mm, dtype=torch.uint8) -> Tensor:
    """An organ (value 1) in the middle of the volume."""
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    inside = (x / half_mm[0]) ** 2 + (y / half_mm[1]) ** 2 + (z / half_mm[2]) ** 2 < 1
    return inside.to(dtype)


def tube(radius_mm: float, spacing=ISO) -> Tensor:
    """A bent thin organ, like a pancreas."""
    shape = [round(n / s) for n, s in zip((90, 60, 40), spacing, strict=True)]
    axes = [torch.arange(n) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    bend = 30 + 12 * torch.sin(x / 15)
    inside = (y - bend) ** 2 + (z - 20) ** 2 < radius_mm**2
    return (inside & (x > 8) & (x < 82)).to(torch.uint8)


def place_in(
    label: Tensor,
    spacing=ISO,
    seed: int = 0,
    *,
    organ_labels: Any = 1,
    forbidden: Tensor | None = None,
    **settings: Any,
) -> list[LocalMask | Skip]:
    """Place tumours in a label; settings are those of `PlacementSettings`."""
    region = OrganRegion.of_label(label, organ_labels, forbidden)
    return place(region, spacing, PlacementSettings(**settings), make_rng(seed))


def place_one(label: Tensor, spacing=ISO, seed: int = 0, **settings: Any) -> LocalMask | Skip:
    """Place one tumour of 8 to 20 mm, unless the settings say otherwise."""
    return place_in(label, spacing, seed, **{"size_mm": (8, 20), **settings})[0]


def least_labelled_share(tumor: LocalMask) -> float:
    """The least share of a voxel that is labelled, and that it suits the tumour's thickness.

    Half of a voxel where that leaves half of the volume or more; of tumours clearly thinner than a
    voxel, half of what they fill of the fullest. Of the rest, what makes up their volume.
    """
    share, mask = tumor.share.double(), tumor.mask
    half, volume = 0.5 * float(share.max()), float(share.sum())
    lines = [
        int(tumor.fine_mask.sum(axis).max()) / k for axis, k in enumerate(tumor.factors) if k > 1
    ]
    if not lines or (half == 0.5 and int((share >= 0.5).sum()) >= 0.5 * volume):
        return 0.5
    if min(lines) < 0.8:
        return half
    assert int(mask.sum()) >= 0.5 * volume
    if min(lines) > 1.3 and int((share >= 0.5).sum()) < 0.5 * volume:  # best filled, by volume
        least = float(share[mask].min())
        fewer, more = (int((share > least).sum()), int((share >= least).sum()))
        assert abs(more - volume) <= abs(fewer - volume) or fewer < 0.5 * volume
    return float(share[mask].min())
