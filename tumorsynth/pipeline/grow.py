"""Change the size of tumours that were made before: params of another point in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from tumorsynth.appearance.mass_effect import MassEffect
from tumorsynth.arguments import is_bool
from tumorsynth.pipeline.records import Growth, SampleParams
from tumorsynth.pipeline.validation import check_params
from tumorsynth.placement.types import PARAM_BOUNDS, TumorParams

FACTOR_RANGE = (0.05, 20.0)  # of a diameter


class NoRoomToGrowWarning(UserWarning):
    """A tumour could not grow as far as asked for."""


def check_factor(name: str, factor: Any) -> float:
    """Return a growth factor.

    Raises:
        ValueError: unless it is a number within FACTOR_RANGE.
    """
    low, high = FACTOR_RANGE
    real: Any = Real
    if not isinstance(factor, real) or is_bool(factor) or not low <= factor <= high:
        raise ValueError(
            f"{name} must be the new diameter over the old one, a number from {low:g} to {high:g}, "
            f"got {factor!r}; pass for example 1.3"
        )
    return float(factor)


def grow_params(
    params: Sequence[Mapping[str, Any]], factor: float, mass_effect: MassEffect
) -> list[dict[str, Any]]:
    """Return params in which each tumour's diameter is ``factor`` times as large.

    Args:
        params: ``synth.params`` of an earlier call, or what this function returned.
        factor: new diameter over that in ``params``.
        mass_effect: of the transform; only "auto" changes with the size.

    Raises:
        ValueError: for other params, and for a factor that is out of range.
    """
    factor = check_factor("factor", factor)
    count = len(params) if isinstance(params, Sequence) and not isinstance(params, str) else 1
    check_params(params, count)
    grown = []
    for entry in params:
        sample = SampleParams.from_dict(entry)
        tumors = [_grow(tumor, factor, mass_effect).to_dict() for tumor in sample.tumors]
        grown.append({**entry, "tumors": tumors})
    return grown


def _grow(tumor: TumorParams, factor: float, mass_effect: MassEffect) -> TumorParams:
    first = tumor.first
    diameter_mm, drawn_mm = tumor.diameter_mm * factor, tumor.drawn_mm * factor
    low, high = PARAM_BOUNDS["diameter_mm"].low, PARAM_BOUNDS["diameter_mm"].high
    if not low <= min(diameter_mm, drawn_mm) <= max(diameter_mm, drawn_mm) <= high:
        raise ValueError(
            f"a tumour must have {low:g} to {high:g} mm, but factor={factor:g} makes one of "
            f"{tumor.diameter_mm:.4g} mm {diameter_mm:.4g} mm; pass a factor nearer to 1"
        )
    if math.isclose(diameter_mm, first.diameter_mm, rel_tol=1e-9):
        return replace(first, drawn_mm=drawn_mm)
    displaced, fixed_capsule = tumor.displaced, tumor.fixed_capsule
    if mass_effect.share == "auto":
        displaced = mass_effect.share_at(diameter_mm)
        if first.displaced == 0:
            fixed_capsule = mass_effect.capsule == "fixed" and displaced > 0
    return replace(
        tumor,
        diameter_mm=diameter_mm,
        drawn_mm=drawn_mm,
        displaced=displaced,
        fixed_capsule=fixed_capsule,
        first_mm=first.diameter_mm,
        first_displaced=first.displaced,
    )


def no_room_to_grow(growth: Growth) -> str:
    """Return the warning of a tumour that could not grow as far as asked for."""
    return (
        f"a tumour must stay in its organ, which has no room for {growth.requested_factor:.3g} "
        f"times its diameter of {growth.first_diameter_mm:.1f} mm: its label reached "
        f"{growth.reached_factor:.3g} times (the report's growth says which); pass a smaller "
        "factor, or start with a smaller tumour"
    )
