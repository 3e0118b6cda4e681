"""The arguments that tell which tumours are asked for: how many, how large, where; checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

import torch

from tumorsynth.arguments import any_bool, is_bool
from tumorsynth.placement.size_priors import SizePrior, get_prior

# What may be asked for, so that no call takes the machine's memory or does not end
MAX_COUNT = 100
MAX_LABELS = 1000
SIZES_MM = (0.1, 200.0)
MAX_SIGMA_MM = 20.0
MAX_GAP_MM = 100.0
ADVICE = {
    "size_mm": 'pass for example size_mm=(5, 20), in mm, or a named prior: size_mm="liver"',
    "sigma_mm": "pass for example sigma_mm=(0.5, 1.5), in mm, or None",
}


def check_organ_labels(labels: int | Iterable[int]) -> tuple[int, ...]:
    """One whole number or several, of any number type, as a tuple; ValueError if they are not."""
    found: tuple[int, ...] = ()
    try:
        given: list[Any] = (
            list(islice(labels, MAX_LABELS + 1)) if isinstance(labels, Iterable) else [labels]
        )
    except TypeError:  # a 0-d array says it can be iterated over
        given = [labels]
    try:
        if (
            not isinstance(labels, str)
            and len(given) <= MAX_LABELS
            and all(not is_bool(v) and int(v) == v and -(2**63) <= int(v) < 2**63 for v in given)
        ):
            found = tuple(int(v) for v in given)
    except (TypeError, ValueError, OverflowError):
        pass
    if not found:
        raise ValueError(
            f"organ_labels must be a whole number or at most {MAX_LABELS}, of at most 64 bits, got "
            f"{repr(labels)[:200]}; try organ_labels=(1,)"
        )
    return found


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """mm per voxel along X, Y, Z; ValueError unless three positive finite numbers."""
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
    """(lo, hi) from a number or a pair, lo >= least, hi <= most."""
    try:
        pair = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 2
    except (TypeError, ValueError, OverflowError):
        pair = []
    if len(pair) != 2 or any_bool(value) or not least <= pair[0] <= pair[1] <= most:  # NaN included
        raise ValueError(
            f"{name} must be a number or (lo, hi) with {least:g} <= lo <= hi <= {most:g}, "
            f"got {value!r}; {ADVICE.get(name, f'pass {name}=1')}"
        )
    return pair[0], pair[1]


def sizes(
    size_mm: float | Sequence[float] | str | SizePrior, prior: str | SizePrior | None
) -> tuple[float, float, SizePrior | None, SizePrior]:
    """lo, hi, the prior that sizes come from (None: log-uniform), the prior of the shapes."""
    if isinstance(size_mm, (str, SizePrior)):
        sizes = get_prior(size_mm)
        return *sizes.range_mm, sizes, get_prior(prior or sizes)
    lo, hi = check_range("size_mm", size_mm, *SIZES_MM)
    return lo, hi, None, get_prior(prior or "liver")


def draw_count(count: int | Sequence[int] | None, prior: SizePrior, rng: torch.Generator) -> int:
    """How many tumours: the number, one of (lo, hi), or for None one of the prior's."""
    if count is None:
        return prior.draw_count(rng)
    pair = tuple(count) if isinstance(count, Sequence) else (count, count)
    whole = len(pair) == 2 and all(isinstance(c, Integral) and not is_bool(c) for c in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= MAX_COUNT:
        raise ValueError(
            f"count must be a whole number or (lo, hi) with 0 <= lo <= hi <= {MAX_COUNT}, "
            f"got {count!r}; pass count=1, count=(1, 3), or None for as many as the prior's cases "
            "have"
        )
    return int(torch.randint(int(pair[0]), int(pair[1]) + 1, (), generator=rng))


def check_size(size_mm: float | Sequence[float] | str | SizePrior) -> None:
    """Raise ValueError where `masks.place` would."""
    sizes(size_mm, None)


def check_count(count: int | Sequence[int] | None) -> None:
    """Raise ValueError where `masks.place` would."""
    draw_count(count, get_prior("liver"), torch.Generator())
