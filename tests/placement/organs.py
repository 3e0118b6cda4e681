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
    """Half of a voxel; of tumours that cannot fill one, half of what they fill of the fullest."""
    half = 0.5 * float(tumor.share.max())
    lines = [int(tumor.fine_mask.sum(axis).max()) for axis in range(3)]
    thin = any(n <= k for n, k in zip(lines, tumor.factors, strict=True) if k > 1)
    return half if thin or half < 0.25 else 0.5
