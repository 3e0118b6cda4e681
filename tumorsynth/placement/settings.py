"""`PlacementSettings`: which tumours `place` samples for one organ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tumorsynth.placement.arguments import (
    MAX_GAP_MM,
    MAX_SIGMA_MM,
    SIZE_LIMITS_MM,
    check_count,
    check_range,
    check_size,
)
from tumorsynth.placement.organ_priors import SizePrior, get_prior


class SizeRange(NamedTuple):
    """Smallest and largest equivalent diameter in mm."""

    low: float
    high: float


class OwnShape(NamedTuple):
    """A shape that a generator brings along.

    Attributes:
        outline: see `user_shapes`.
        diameter_mm: its true size.
        upright: whether its third axis stays upright, as for a mask of thick slices, whose steps
            lie in planes; it is then turned and mirrored within and across its slices only.
    """

    outline: str
    diameter_mm: float
    upright: bool = False


@dataclass(frozen=True)
class PlacementSettings:
    """How many tumours a sample gets, how large they are, and what they look like.

    Args:
        size_mm: equivalent diameter: a number, (lo, hi) for log-uniform sizes, or a prior or its
            name. A prior's tumours take at most a quarter of the organ's largest connected part,
            unless they are of the prior's smallest size.
        count: number of tumours, (lo, hi) inclusive, or None for the prior's own counts per case.
        sigma_mm: feather, a number or (lo, hi) for uniform values. Placement only passes it on.
        contrast_hu: (lo, hi) for uniform contrasts; None leaves the contrast to the generator.
            Placement only passes it on.
        gap_mm: organ left between two tumours, at least one voxel.
        merge: whether tumours may touch and overlap.
        prior: shapes and capsule contact; by default those of the prior in ``size_mm``, else
            those of "liver".
        outlines: outlines of real masks (see `user_shapes`). Each tumour gets one of them, turned,
            mirrored or not, slightly bent and scaled to its size, instead of the prior's shape.
        own_shapes: shapes of the generator's own lesions, among which each tumour gets one of
            about its size. Those in ``outlines`` win.
        bulge: distribution of the share of a tumour beyond the organ (see
            `exophytic.check_bulge`); None keeps tumours inside.

    Raises:
        ValueError: if a value is out of range or a prior is unknown.

    Examples:
        >>> PlacementSettings(size_mm=(5, 20), count=3)
        >>> PlacementSettings(size_mm="kidney", count=None)
    """

    size_mm: float | Sequence[float] | str | SizePrior
    count: int | Sequence[int] | None = 1
    sigma_mm: float | Sequence[float] = 1.0
    contrast_hu: tuple[float, float] | None = None
    gap_mm: float = 2.0
    merge: bool = False
    prior: str | SizePrior | None = None
    outlines: Sequence[str] = ()
    own_shapes: Sequence[OwnShape] = ()
    bulge: SizePrior | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_size(self.size_mm)
        get_prior(self.prior or "liver")
        check_range("sigma_mm", self.sigma_mm, 0.0, MAX_SIGMA_MM)
        check_range("gap_mm", self.gap_mm, 0.0, MAX_GAP_MM)
        check_count(self.count)

    @property
    def size_prior(self) -> SizePrior | None:
        """The prior that sizes come from; None for log-uniform sizes."""
        return get_prior(self.size_mm) if isinstance(self.size_mm, str | SizePrior) else None

    @property
    def shape_prior(self) -> SizePrior:
        """The prior of shapes, capsule contact and counts."""
        return get_prior(self.prior or self.size_prior or "liver")

    @property
    def size_range(self) -> SizeRange:
        """The sizes a tumour may have."""
        if isinstance(self.size_mm, str | SizePrior):
            return SizeRange(*get_prior(self.size_mm).range_mm)
        return SizeRange(*check_range("size_mm", self.size_mm, *SIZE_LIMITS_MM))

    @property
    def sigma_range_mm(self) -> tuple[float, float]:
        """Smallest and largest feather."""
        return check_range("sigma_mm", self.sigma_mm, 0.0, MAX_SIGMA_MM)

    def draw_count(self, rng: torch.Generator) -> int:
        """Sample how many tumours a sample gets."""
        pair = check_count(self.count)
        if pair is None:
            return self.shape_prior.draw_count(rng)
        low, high = pair
        return int(torch.randint(low, high + 1, (), generator=rng))
