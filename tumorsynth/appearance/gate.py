"""The quality gate: scores of one tumour in its scan, and the limits that they must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tumorsynth.along_axis import multiply_along
from tumorsynth.appearance.blend import filter_on
from tumorsynth.appearance.painted import PaintedTumor
from tumorsynth.appearance.segmenter import SegmenterScorer
from tumorsynth.appearance.visibility import VISIBLE_FROM, measure_visibility
from tumorsynth.arguments import any_bool, format_beside, is_bool, keywords_of
from tumorsynth.geometry import Frame, Rows3
from tumorsynth.placement.rasterize import flatness

Scorer = Callable[[Tensor, Tensor, tuple[float, float, float]], float]

GATE_MARGIN_MM = 8.0  # tissue around a tumour that it is compared with
EDGE_ZONE_MM = 2.0  # nearer tissue is left out: the feather lies there
CORE_DEPTH_MM = 1.0  # the core begins this far inside the outline
EDGE_DEPTH_MM = 1.5  # the edge's slope is measured this far to both sides of the outline
MIN_VOXELS = 30  # or triples of neighbours, behind each score
NO_EDGE_MM = 99.0  # width of an edge that is not there
SOLID_TISSUE_HU = (20.0, 220.0)  # in such organs a tumour is neither fat, fluid nor calcium
MAD_TO_SD = 1.4826  # standard deviation over median absolute deviation, of normal noise
LEAST = 0.5  # of a scorer's number, where nothing is said


@keywords_of()
@dataclass(frozen=True)
class Gate:
    """Limits (low, high) on the scores of a tumour; None for no limit.

    A score that cannot be measured, for example because no organ is left around the tumour, breaks
    no limit. With None for all scores the gate measures and never rejects.

    Args:
        tries: attempts at one place, each with the next seed, before the tumour is skipped.
        contrast_hu: mean of the tumour's core minus the median of the organ 2 to 8 mm around it.
        off_hu: that contrast minus the requested one, if any. Also catches the wrong sign.
        level_hu: mean of the core, where the organ around is solid tissue (20 to 220 HU). Catches
            fat, fluid and calcium.
        visibility: contrast over the noise of the organ around, for the tumour's size
            (`tumorsynth.appearance.visibility`). From 5 on people tell a tumour from noise.
        noise_ratio: voxel-to-voxel noise in the core over that of the organ around.
        edge_mm: width of the edge at the outline, from 10 to 90 %. Edges of 2 mm and sharper read
            2, a missing edge 99; wide edges of small tumours read up to a third too narrow.
        flatness: shortest over longest axis of the outline.
        scorer: a `tumorsynth.SegmenterScorer`, or a function or network called with
            (hu, tumor_mask, spacing): the scan with the tumour and 8 mm around it (X, Y, Z), a bool
            mask, mm. It returns a number, or whether the tumour may stay. It must be deterministic,
            or seeds no longer repeat a call.
        least: lowest number of ``scorer`` that passes.
        most: highest number of ``scorer`` that passes; None for no limit.

    Raises:
        ValueError: for limits that are not (low, high), and for ``tries`` below 1 or above 100.
        TypeError: for a scorer that cannot be called.

    Examples:
        >>> synth = ts.SynthesizeTumor(gate=ts.Gate(visibility=(8.0, math.inf), tries=5))
    """

    tries: int = 3
    contrast_hu: tuple[float, float] | None = None
    off_hu: tuple[float, float] | None = (-15.0, 15.0)
    level_hu: tuple[float, float] | None = (10.0, 300.0)
    visibility: tuple[float, float] | None = (VISIBLE_FROM, math.inf)
    noise_ratio: tuple[float, float] | None = (0.4, 1.7)
    edge_mm: tuple[float, float] | None = None
    flatness: tuple[float, float] | None = (0.2, 1.0)
    scorer: Scorer | None = None
    least: float = LEAST
    most: float | None = None

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
        for name in ("least", "most"):
            _check_limit(name, getattr(self, name), optional=name == "most")
        if self.most is not None and self.least > self.most:
            raise ValueError(
                f"least must not be above most, got least={self.least} and most={self.most}; for "
                "what a segmenter misses pass for example least=0.0, most=0.3"
            )
        self._check_limits_fit_scorer()

    def _check_limits_fit_scorer(self) -> None:
        limits = {"least": self.least, "most": self.most}
        given = " and ".join(f"{k}={v:g}" for k, v in limits.items() if v is not None)
        if self.scorer is None and (self.least != LEAST or self.most is not None):
            raise ValueError(
                f"least and most are limits of a scorer, got {given} without one; pass "
                "scorer=ts.SegmenterScorer(network, ...), or leave them out"
            )
        if self.scores_samples and not all(0 <= (v or 0) <= 1 for v in limits.values()):
            raise ValueError(
                "least and most of a SegmenterScorer must be shares from 0 to 1, got "
                f"{given}; pass for example 0.7 for 70 %"
            )

    def scores(
        self,
        hu: Tensor,
        tumor_mask: Tensor,
        organ: Tensor,
        spacing: tuple[float, float, float],
        requested_hu: float | None = None,
        shear: Rows3 | None = None,
        painted: PaintedTumor | None = None,
    ) -> dict[str, float | None]:
        """Return the scores of a tumour: those of `measure` and, with a scorer, "scorer".

        Args:
            hu: as for `measure`, like the next three.
            tumor_mask: the tumour.
            organ: the tissue to compare with.
            spacing: mm per voxel.
            requested_hu: requested contrast; None if the generator chose it.
            shear: of the scan's axes; see `tumorsynth.geometry.Frame`.
            painted: the tumour in its sample, for scorers that need more than what is around it.
        """
        scores = measure(hu, tumor_mask, organ, spacing, shear)
        contrast = scores["contrast_hu"]
        if requested_hu is not None and contrast is not None:
            scores["off_hu"] = contrast - requested_hu
        if self.scorer is not None:
            in_sample = self.scores_samples and painted is not None
            value = float(
                self.scorer.score(painted)  # type: ignore[attr-defined]
                if in_sample
                else self.scorer(hu, tumor_mask, spacing)
            )
            scores["scorer"] = value if math.isfinite(value) else None
        return scores

    def without_scorer(self) -> Gate:
        """Return this gate for a replay, whose params hold what the scorer decided."""
        if self.scorer is None:
            return self
        return replace(self, scorer=None, least=LEAST, most=None)

    @property
    def scores_samples(self) -> bool:
        """Whether the scorer takes the tumour in its sample (`PaintedTumor`)."""
        return isinstance(self.scorer, SegmenterScorer)

    def objection(self, scores: dict[str, float | None]) -> str | None:
        """Return why a tumour with these scores is rejected; None if it passes."""
        for name in LIMITS:
            limits, value = getattr(self, name), scores.get(name)
            if limits is None or value is None or limits[0] <= value <= limits[1]:
                continue
            found = format_beside(value, limits, ".3g")
            return f"{name} {found} is not within {limits[0]:g} to {limits[1]:g}"
        if self.scorer is not None:
            value = scores["scorer"]
            if value is None:
                return "the scorer gave no number"
            if value < self.least:
                found = format_beside(value, [self.least], ".3g")
                return f"the scorer gave {found}, less than {self.least:g}"
            if self.most is not None and value > self.most:
                found = format_beside(value, [self.most], ".3g")
                return f"the scorer gave {found}, more than {self.most:g}"
        return None


LIMITS = tuple(f.name for f in fields(Gate) if f.name not in ("tries", "scorer", "least", "most"))


def _check_limit(name: str, value: Any, optional: bool) -> None:
    real: Any = Real
    if value is None and optional:
        return
    if not isinstance(value, real) or is_bool(value) or math.isnan(value):
        raise ValueError(
            f"{name} must be a number of the scorer's, got {value!r}; for a share pass 0 to 1"
        )


def check_gate(gate: bool | Gate | None) -> Gate | None:
    """Return the gate of a ``gate=`` argument.

    Args:
        gate: True for the default limits, False or None for no gate.

    Raises:
        TypeError: for anything else.
    """
    if gate is None or gate is False:
        return None
    if gate is True:
        return Gate()
    if not isinstance(gate, Gate):
        raise TypeError(
            f"gate must be True, False or a tumorsynth.Gate, got {gate!r}; pass for example "
            "tumorsynth.Gate(tries=5)"
        )
    return gate


def measure(
    hu: Tensor,
    tumor_mask: Tensor,
    organ: Tensor,
    spacing: Sequence[float],
    shear: Rows3 | None = None,
) -> dict[str, float | None]:
    """Measure the scores of one tumour.

    Args:
        hu: (X, Y, Z), the scan with the tumour and about 8 mm around it.
        tumor_mask: bool, same shape.
        organ: bool, same shape: the tissue to compare with, without any tumour.
        spacing: mm per voxel.
        shear: of the scan's axes.

    Returns:
        A number for each limit of `Gate`; None where there is too little to measure.
    """
    organ = organ & ~tumor_mask & hu.isfinite()
    hu = hu.float().nan_to_num(0.0, 0.0, 0.0)
    depth = _depth_mm(tumor_mask, spacing, shear)
    core = tumor_mask & (depth > CORE_DEPTH_MM)
    if int(core.sum()) < MIN_VOXELS:
        core = tumor_mask
    around = organ & (depth < -EDGE_ZONE_MM)
    scores: dict[str, float | None] = dict.fromkeys(LIMITS)
    scores["flatness"] = flatness(tumor_mask, spacing, shear)
    tissue = hu[around]
    if len(tissue) < MIN_VOXELS:
        return scores
    level, organ_level = float(hu[core].mean()), float(tissue.median())
    organ_sd = MAD_TO_SD * float((tissue - organ_level).abs().median())
    contrast = level - organ_level
    scores["contrast_hu"] = contrast
    if SOLID_TISSUE_HU[0] < organ_level < SOLID_TISSUE_HU[1]:
        scores["level_hu"] = level
    scores["visibility"] = measure_visibility(hu, tumor_mask, around, spacing, shear)
    core_noise, organ_noise = _noise_sd(hu, core, spacing), _noise_sd(hu, around, spacing)
    if core_noise is not None and organ_noise:
        scores["noise_ratio"] = core_noise / organ_noise
    if abs(contrast) > 0.5 * organ_sd:
        scores["edge_mm"] = _edge_mm(hu, depth, tumor_mask | organ, contrast)
    return scores


def _noise_sd(hu: Tensor, where: Tensor, spacing: Sequence[float]) -> float | None:
    """Standard deviation of the noise, from second differences, which ignore slopes."""
    differences = []
    for axis in sorted(range(3), key=lambda a: spacing[a])[:2]:  # thick slices are too far apart
        n = hu.shape[axis] - 2
        if n < 1:
            continue
        left, middle, right = (hu.narrow(axis, k, n) for k in range(3))
        fits = where.narrow(axis, 0, n) & where.narrow(axis, 1, n) & where.narrow(axis, 2, n)
        differences.append((left - 2 * middle + right)[fits])
    values = torch.cat(differences) if differences else hu.new_empty(0)
    if len(values) < MIN_VOXELS:
        return None
    return MAD_TO_SD / math.sqrt(6) * float(values.abs().median())


def _edge_mm(hu: Tensor, depth: Tensor, where: Tensor, contrast: float) -> float | None:
    """Width of the edge from 10 to 90 %, from the slope of HU over depth at the outline."""
    near = where & (depth.abs() < EDGE_DEPTH_MM)
    if int(near.sum()) < MIN_VOXELS:
        return None
    x, y = depth[near], hu[near]
    x = x - x.mean()
    slope = float((x * (y - y.mean())).sum() / x.square().sum().clamp(min=1e-6))
    # the 10 to 90 % width of an error function is 1.02 of its height over its steepest slope
    return min(1.02 * contrast / slope, NO_EDGE_MM) if slope * contrast > 0 else NO_EDGE_MM


def _depth_mm(tumor_mask: Tensor, spacing: Sequence[float], shear: Rows3 | None) -> Tensor:
    """Distance to the outline in mm, positive inside, accurate to half a voxel near it.

    A flat outline filtered with a Gaussian is an error function of the distance to it.
    """
    sigma = max(1.5, 0.7 * max(spacing))
    share = tumor_mask.to(torch.float32)
    if shear is not None:
        x, y, z = spacing
        share = filter_on(Frame((x, y, z), shear=shear), share, [sigma / s for s in spacing])
    for axis, s in enumerate(spacing if shear is None else ()):
        at = torch.arange(share.shape[axis], device=share.device) * (s / sigma)
        matrix = torch.exp(-0.5 * (at[:, None] - at).square()) * (
            s / sigma / math.sqrt(2 * math.pi)
        )
        share = multiply_along(matrix, share, axis)
    share = share.clamp(1e-4, 1 - 1e-4)
    return sigma * math.sqrt(2) * torch.erfinv(2 * share - 1)
