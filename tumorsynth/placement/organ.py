"""Where the organ is in a label: which voxels carry its values, and the box around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.devices import on_cpu
from tumorsynth.placement.arguments import check_organ_labels
from tumorsynth.placement.shape import Bools

SLAB = 2**20  # voxels of a label that are looked at together on a CPU


@dataclass(frozen=True)
class Box:
    """Voxels start <= index < stop along each axis."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def grown(self, by_mm: float, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
        """Slices of the box and at least this much and a voxel around it."""
        by = [math.ceil(by_mm / s) + 1 for s in spacing]
        x, y, z = (
            slice(max(0, a - n), b + n) for a, b, n in zip(self.start, self.stop, by, strict=True)
        )
        return x, y, z


def organ_box(label: Tensor, organ_labels: int | Iterable[int]) -> Box | None:
    """The tight box around all voxels (X, Y, Z) carrying one of the labels; None if none does."""
    if label.ndim != 3:
        raise ValueError(f"label must be (X, Y, Z), got shape {tuple(label.shape)}")
    labels = check_organ_labels(organ_labels)
    order = sorted(range(3), key=label.stride, reverse=True)  # a NIfTI's is the reverse
    label = label.permute(order)
    if on_cpu(label):
        planes, across = _seen(*as_array(label, labels))
        lines: list[Bools] = [planes, *(np.logical_or.reduce(across, axis) for axis in (1, 0))]
    else:
        organ = is_organ(label, labels)
        there = organ.any(0)
        found = torch.cat([organ.any(2).any(1), there.any(1), there.any(0)]).cpu()  # one wait
        lines = [line.numpy() for line in found.split(list(label.shape))]
    start, stop = [0, 0, 0], [0, 0, 0]
    for axis, line in zip(order, lines, strict=True):
        hits = np.flatnonzero(line)
        if len(hits) == 0:
            return None
        start[axis], stop[axis] = int(hits[0]), int(hits[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _seen(values: NDArray[Any], labels: Sequence[int]) -> tuple[Bools, Bools]:
    """Which planes of values (X, Y, Z) have one of the labels, and which lines along X (Y, Z).

    By slabs that fit a cache: fresh memory as large as the label would cost more than the looking.
    """
    length, *sides = values.shape
    slab = max(1, SLAB // max(1, math.prod(sides)))
    line, plane = np.zeros(length, dtype=bool), np.zeros(sides, dtype=bool)
    for first in range(0, length, slab):
        hits = carries(values[first : first + slab], labels)
        if hits.any():
            line[first : first + slab] = hits.any((1, 2))
            plane |= np.logical_or.reduce(hits, 0)
    return line, plane


def as_array(label: Tensor, labels: Sequence[int]) -> tuple[NDArray[Any], list[int]]:
    """A label on the CPU in its own memory, for `carries`, and those of the labels it may have."""
    if label.dtype is torch.bfloat16:  # which numpy does not have
        label, labels = is_organ(label, labels), (1,)
    values = label.numpy()
    held = [value for value in labels if holds(label.dtype, value)]
    return values.view(np.uint8) if values.dtype == bool else values, held


def carries(values: NDArray[Any], labels: Sequence[int]) -> Bools:
    """As `is_organ`, of an array whose type has all of the labels."""
    if not labels:
        return np.zeros(values.shape, dtype=bool)
    found: Bools = values == labels[0]
    for value in labels[1:]:
        found |= values == value
    return found


def is_organ(label: Tensor, labels: Sequence[int]) -> Tensor:
    """Where the label (X, Y, Z) has one of the values: bool."""
    organ = None
    for value in labels:
        if holds(label.dtype, value):  # or torch would compare with what it wraps or rounds to
            here = label == value
            organ = here if organ is None else organ.logical_or_(here)
    return torch.zeros_like(label, dtype=torch.bool) if organ is None else organ


@lru_cache(maxsize=1024)
def holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a dtype has this very number; 257 in uint8 would be 1."""
    return torch.tensor(value).to(dtype).item() == value
