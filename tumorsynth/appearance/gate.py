"""The quality gate: cheap scores of one tumour in its scan, and the limits that it must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tumorsynth.arguments import any_bool, is_bool
from tumorsynth.placement.rasterize import flatness

Scorer = Callable[[Tensor, Tensor, tuple[float, float, float]], float]

REACH_MM = 8.0  # the tissue around a tumour that is looked at
NEAR_MM = 2.0  # its feather and its edge lie nearer than this
ENOUGH = 30  # voxels, or neighbours in a row, that a figure needs
NO_EDGE_MM = 99.0  # width of an edge that is not there
SOLID = 20.0, 220.0  # HU of solid organs: around these a tumour has no business being fat or fluid


@dataclass(frozen=True)
class Gate:
    """Limits (low, high) on the scores of a tumour; None: any value will do.

    A score that cannot be measured, say because no organ is left around the tumour, breaks no
    limit. ``Gate(visibility=None, ...)`` with None for all measures and never rejects.

    tries: tumours made for one place before it is given up, each with the next seed.
    contrast_hu: mean of the tumour's core minus the median of the organ 2 to 8 mm around it.
    off_hu: that contrast minus the one asked for, if any: also of the wrong sign.
    level_hu: the core itself, where the organ around is solid tissue (20 to 220 HU): neither fat,
        fluid nor calcium.
    visibility: contrast, without its sign, over the standard deviation of the organ around.
    noise_ratio: voxel-to-voxel noise in the core over that of the organ around.
    edge_mm: width of the edge, 10 to 90 %, at the outline; 2 mm and sharper reads 2, none
        at all 99, wide ones of small tumours read up to a third too narrow.
    flatness: shortest over longest axis of the outline.
    scorer: called with (hu, tumor_mask, spacing), the scan with the tumour and 8 mm around it
        (X, Y, Z), bool mask and mm; returns a number, or whether the tumour may stay. It must
        reach ``least``. It must give the same answer for the same input, or seeds no longer repeat
        a call. A trained network is called like any other function.
    """

    tries: int = 3
    contrast_hu: tuple[float, float] | None = None
    off_hu: tuple[float, float] | None = (-15.0, 15.0)
    level_hu: tuple[float, float] | None = (10.0, 300.0)
    visibility: tuple[float, float] | None = (0.4, math.inf)
    noise_ratio: tuple[float, float] | None = (0.4, 1.7)
    edge_mm: tuple[float, float] | None = None
    flatness: tuple[float, float] | None = (0.2, 1.0)
    scorer: Scorer | None = None
    least: float = 0.5

    def __post_init__(self) -> None:
        whole = isinstance(self.tries, int) and not is_bool(self.tries)
        if not whole or not 1 <= self.tries <= 100:
            raise ValueError(
                f"tries must be a whole number from 1 to 100, got {self.tries!r}; the default is 3"
            )
        for name in LIMITS:
            pair = getattr(self, name)
            if pair is None:
                continue
            try:
                low, high = (float(v) for v in pair)
            except (TypeError, ValueError):
                low = high = math.nan
            if any_bool(pair) or not low <= high:
                raise ValueError(
                    f"{name} must be (low, high) with low <= high, or None for no limit, got "
                    f"{pair!r}; the default is {type(self).__dataclass_fields__[name].default}"
                )
            object.__setattr__(self, name, (low, high))
        if self.scorer is not None and not callable(self.scorer):
            raise TypeError(
                f"scorer must be a function of (hu, tumor_mask, spacing), got {self.scorer!r}; "
                "pass the function or network itself, or None"
            )

    def scores(
        self,
        hu: Tensor,
        tumor_mask: Tensor,
        organ: Tensor,
        spacing: tuple[float, float, float],
        asked_hu: float | None = None,
    ) -> dict[str, float | None]:
        """The scores of a tumour, those of :func:`measure` and, with a scorer, "scorer".

        asked_hu: the contrast asked for, None where the generator chose it.
        """
        found = measure(hu, tumor_mask, organ, spacing)
        contrast = found["contrast_hu"]
        if asked_hu is not None and contrast is not None:
            found["off_hu"] = contrast - asked_hu
        if self.scorer is not None:
            value = float(self.scorer(hu, tumor_mask, spacing))
            found["scorer"] = value if math.isfinite(value) else None
        return found

    def objection(self, scores: dict[str, float | None]) -> str | None:
        """Why a tumour of these scores must not stay; None if it may."""
        for name in LIMITS:
            limits, value = getattr(self, name), scores.get(name)
            if limits is None or value is None or limits[0] <= value <= limits[1]:
                continue
            return f"{name} {value:.3g} is not within {limits[0]:g} to {limits[1]:g}"
        if self.scorer is not None:
            value = scores["scorer"]
            if value is None:
                return "the scorer gave no number"
            if value < self.least:
                return f"the scorer gave {value:.3g}, less than {self.least:g}"
        return None


LIMITS = tuple(f.name for f in fields(Gate) if f.name not in ("tries", "scorer", "least"))


def check_gate(gate: bool | Gate | None) -> Gate | None:
    """The gate of a ``gate=`` argument: True is the default one, False and None are none."""
    if gate is None or gate is False:
        return None
    if gate is True:
        return Gate()
    if not isinstance(gate, Gate):
        raise TypeError(
            f"gate must be True, False or a tumorsynth.appearance.gate.Gate, got {gate!r}; pass for example "
            "Gate(visibility=(1.0, 5.0))"
        )
    return gate


def measure(
    hu: Tensor, tumor_mask: Tensor, organ: Tensor, spacing: Sequence[float]
) -> dict[str, float | None]:
    """Scores of one tumour, as named in :class:`Gate`; None where there is too little to measure.

    hu: (X, Y, Z), the scan with the tumour and about 8 mm around it. tumor_mask, organ: bool,
    likewise; organ is the tissue to compare with, without any tumour. spacing: mm.
    """
    organ = organ & ~tumor_mask & hu.isfinite()
    hu = hu.float().nan_to_num(0.0, 0.0, 0.0)
    depth = _depth(tumor_mask, spacing)
    core = tumor_mask & (depth > 1.0)
    if int(core.sum()) < ENOUGH:
        core = tumor_mask
    around = organ & (depth < -NEAR_MM)
    scores: dict[str, float | None] = dict.fromkeys(LIMITS)
    scores["flatness"] = flatness(tumor_mask, spacing)
    tissue = hu[around]
    if len(tissue) < ENOUGH:
        return scores
    level, normal = float(hu[core].mean()), float(tissue.median())
    spread = 1.4826 * float((tissue - normal).abs().median())
    contrast = level - normal
    scores["contrast_hu"] = contrast
    if SOLID[0] < normal < SOLID[1]:
        scores["level_hu"] = level
    if spread > 0:
        scores["visibility"] = abs(contrast) / spread
    inside, outside = _noise(hu, core, spacing), _noise(hu, around, spacing)
    if inside is not None and outside:
        scores["noise_ratio"] = inside / outside
    scores["edge_mm"] = _edge(hu, depth, tumor_mask | organ, contrast, spread)
    return scores


def _noise(hu: Tensor, where: Tensor, spacing: Sequence[float]) -> float | None:
    """Standard deviation of the noise from second differences, which see no slope."""
    found = []
    for axis in sorted(range(3), key=lambda a: spacing[a])[:2]:  # slices are too far apart
        n = hu.shape[axis] - 2
        if n < 1:
            continue
        left, middle, right = (hu.narrow(axis, k, n) for k in range(3))
        fits = where.narrow(axis, 0, n) & where.narrow(axis, 1, n) & where.narrow(axis, 2, n)
        found.append((left - 2 * middle + right)[fits])
    values = torch.cat(found) if found else hu.new_empty(0)
    if len(values) < ENOUGH:
        return None
    return 1.4826 / math.sqrt(6) * float(values.abs().median())


def _edge(hu: Tensor, depth: Tensor, where: Tensor, contrast: float, spread: float) -> float | None:
    """10 to 90 % width in mm, from the slope of HU over depth at the outline."""
    near = where & (depth.abs() < 1.5)
    if int(near.sum()) < ENOUGH or abs(contrast) <= 0.5 * spread:
        return None
    x, y = depth[near], hu[near]
    x = x - x.mean()
    slope = float((x * (y - y.mean())).sum() / x.square().sum().clamp(min=1e-6))
    # an error function's 10 to 90 % width is 1.02 of its height over its steepest slope
    return min(1.02 * contrast / slope, NO_EDGE_MM) if slope * contrast > 0 else NO_EDGE_MM


def _depth(tumor_mask: Tensor, spacing: Sequence[float]) -> Tensor:
    """Distance in mm to the outline, positive inside, good to half a voxel near it.

    A flat outline filtered with a Gaussian is an error function of the distance to it.
    """
    sigma = max(1.5, 0.7 * max(spacing))
    share = tumor_mask.to(torch.float32)
    for axis, s in enumerate(spacing):
        at = torch.arange(share.shape[axis], device=share.device) * (s / sigma)
        matrix = torch.exp(-0.5 * (at[:, None] - at).square()) * (
            s / sigma / math.sqrt(2 * math.pi)
        )
        share = torch.movedim(torch.tensordot(matrix, share, dims=([1], [axis])), 0, axis)
    share = share.clamp(1e-4, 1 - 1e-4)
    return sigma * math.sqrt(2) * torch.erfinv(2 * share - 1)
