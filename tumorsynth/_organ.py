"""Where the organ is in a label: which voxels carry its values, and the box around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tumorsynth._placing_arguments import check_organ_labels

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
    # In the order of memory (a NIfTI's is the reverse), and on a CPU by slabs that fit a cache:
    # fresh memory as large as the label would cost more than the looking.
    order = sorted(range(3), key=label.stride, reverse=True)
    label = label.permute(order)
    length, wide, deep = label.shape
    slab = max(1, SLAB // max(1, wide * deep)) if label.device.type == "cpu" else max(1, length)
    line: list[Tensor] = []
    plane: Tensor | None = None
    for part in label.split(slab):
        organ = marked(part, labels)
        line.append(organ.amax((1, 2)))
        seen = organ.amax(0)
        plane = seen if plane is None else torch.maximum(plane, seen)
    assert plane is not None
    lines = torch.cat([*line, plane.amax(1), plane.amax(0)]).cpu()  # one wait for a GPU
    start, stop = [0, 0, 0], [0, 0, 0]
    for axis, line_of in zip(order, lines.split([length, wide, deep]), strict=True):
        hits = line_of.nonzero()
        if len(hits) == 0:
            return None
        start[axis] = int(hits[0])
        stop[axis] = int(hits[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def is_organ(label: Tensor, labels: tuple[int, ...]) -> Tensor:
    """Where the label (X, Y, Z) has one of the values: bool."""
    organ = None
    for value in labels:
        if holds(label.dtype, value):  # or torch would compare with what it wraps or rounds to
            here = label == value
            organ = here if organ is None else organ.logical_or_(here)
    return torch.zeros_like(label, dtype=torch.bool) if organ is None else organ


def marked(label: Tensor, labels: tuple[int, ...]) -> Tensor:
    """As `is_organ`, with numbers that are not 0 where it is True: on a CPU torch compares into the
    label's own number format up to eight times as fast as into bool."""
    if label.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32):
        return is_organ(label, labels).view(torch.uint8)
    found = None
    for value in labels:
        if holds(label.dtype, value):
            here = label.clone().eq_(value)
            found = here if found is None else torch.maximum(found, here)
    return torch.zeros_like(label) if found is None else found


@lru_cache(maxsize=1024)
def holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a dtype has this very number; 257 in uint8 would be 1."""
    return torch.tensor(value).to(dtype).item() == value
