"""Checks of the arguments that say which tumours are wanted: how many, how large, where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

from tumorsynth.arguments import any_bool, is_bool
from tumorsynth.placement.organ_priors import SizePrior, get_prior

# Limits that keep every call within reasonable time and memory
MAX_COUNT = 100
MAX_ORGAN_LABELS = 1000
SIZE_LIMITS_MM = (0.1, 200.0)
MAX_SIGMA_MM = 20.0
MAX_GAP_MM = 100.0
FIXES = {
    "size_mm": 'pass for example size_mm=(5, 20), in mm, or a named prior: size_mm="liver"',
    "sigma_mm": "pass for example sigma_mm=(0.5, 1.5), in mm, or None",
}


def check_organ_labels(labels: int | Iterable[int]) -> tuple[int, ...]:
    """Return organ labels as a tuple of ints.

    Args:
        labels: one whole number or several, of any number type.

    Raises:
        ValueError: if they are not whole numbers of at most 64 bits, or hold 0.
    """
    found: tuple[int, ...] = ()
    try:
        given: list[Any] = (
            list(islice(labels, MAX_ORGAN_LABELS + 1)) if isinstance(labels, Iterable) else [labels]
        )
    except TypeError:  # a 0-d array claims to be iterable
        given = [labels]
    try:
        if (
            not isinstance(labels, str | bytes | Mapping)
            and len(given) <= MAX_ORGAN_LABELS
            and all(not is_bool(v) and int(v) == v and -(2**63) <= int(v) < 2**63 for v in given)
        ):
            found = tuple(int(v) for v in given)
    except (TypeError, ValueError, OverflowError):
        pass
    if not found:
        fix = "pass for example organ_labels=1 or organ_labels=(1, 5)"
        if isinstance(labels, str | bytes) or any(isinstance(v, str | bytes) for v in given):
            fix = "look up which number the label has for it, and pass for example organ_labels=1"
        raise ValueError(
            "organ_labels must be the organ's values in the label, one whole number of at most 64 "
            f"bits or at most {MAX_ORGAN_LABELS} of them, got {repr(labels)[:200]}; {fix}"
        )
    if 0 in found:
        raise ValueError(
            "organ_labels must not hold 0, which is the background of a label: tumours would lie "
            f"in air and in other organs, got {repr(labels)[:200]}; look up which number the label "
            "has for the organ, and pass for example organ_labels=1"
        )
    return found


def check_tumor_label(tumor_label: int, organ_labels: tuple[int, ...]) -> int:
    """Return the label value of a tumour.

    Raises:
        ValueError: unless it is a whole number and none of the organ's.
    """
    try:
        whole = not is_bool(tumor_label) and int(tumor_label) == tumor_label
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or not -(2**63) <= tumor_label < 2**63:
        raise ValueError(
            f"tumor_label must be a whole number of at most 64 bits, got {tumor_label!r}; try 2"
        )
    if tumor_label in organ_labels:
        raise ValueError(
            f"tumor_label must differ from organ_labels, got {tumor_label} in {organ_labels}; "
            "give the tumour a value of its own"
        )
    return int(tumor_label)


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Return mm per voxel along X, Y, Z; raise ValueError unless three positive finite numbers."""
    values = tuple(float(s) for s in spacing)
    if len(values) != 3 or not all(math.isfinite(s) and s > 0 for s in values):
        raise ValueError(
            f"spacing must be three positive numbers in mm, got {values}; "
            "pass spacing=(dx, dy, dz) or affine=..."
        )
    return values[0], values[1], values[2]


def check_range(
    name: str, value: float | Sequence[float], least: float, most: float
) -> tuple[float, float]:
    """Return (lo, hi) of a number or a pair.

    Args:
        name: the argument's name, for the error.
        value: a number, which stands for lo and hi, or (lo, hi).
        least: smallest allowed lo.
        most: largest allowed hi.

    Raises:
        ValueError: unless least <= lo <= hi <= most.
    """
    try:
        pair = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 2
    except (TypeError, ValueError, OverflowError):
        pair = []
    if len(pair) != 2 or any_bool(value) or not least <= pair[0] <= pair[1] <= most:  # NaN included
        raise ValueError(
            f"{name} must be a number or (lo, hi) with {least:g} <= lo <= hi <= {most:g}, "
            f"got {value!r}; {FIXES.get(name, f'pass {name}=1')}"
        )
    return pair[0], pair[1]


def check_size(size_mm: float | Sequence[float] | str | SizePrior) -> None:
    """Raise ValueError unless this is a size, a range of sizes or a known prior."""
    if isinstance(size_mm, str | SizePrior):
        get_prior(size_mm)
    else:
        check_range("size_mm", size_mm, *SIZE_LIMITS_MM)


def check_count(count: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (lo, hi) of a number of tumours; None, for the prior's own counts, passes through.

    Raises:
        ValueError: unless whole numbers with 0 <= lo <= hi <= MAX_COUNT.
    """
    if count is None:
        return None
    pair = tuple(count) if isinstance(count, Sequence) else (count, count)
    whole = len(pair) == 2 and all(isinstance(c, Integral) and not is_bool(c) for c in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= MAX_COUNT:
        raise ValueError(
            f"count must be a whole number or (lo, hi) with 0 <= lo <= hi <= {MAX_COUNT}, "
            f"got {count!r}; pass count=1, count=(1, 3), or None for as many as the prior's cases "
            "have"
        )
    return int(pair[0]), int(pair[1])
