"""The organ in a label: which voxels belong to it, the box around them, and `OrganRegion`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.devices import on_cpu
from tumorsynth.fetching import Task, run_alone
from tumorsynth.geometry import Box
from tumorsynth.placement.arguments import check_organ_labels
from tumorsynth.placement.types import Bools

SLAB_VOXELS = 2**20  # voxels of a label that are searched at a time on a CPU


@dataclass(frozen=True)
class OrganRegion:
    """The part of a sample that matters for placement: its organ, and what no tumour may take.

    Args:
        label: (X, Y, Z), all of the sample's label or a part with every voxel of the organ.
        organ_labels: the label's values that are the organ.
        organ_box: tight box around the organ in the sample; None if it has no voxel.
        forbidden: bool, shaped like ``label``: voxels no tumour may take; None for none.
        part: where ``label`` lies in the sample.
        sample_shape: voxels of the whole sample.
        image: shaped like ``label``; None if the organ's values do not matter.
        image_range: lowest and highest value of ``image`` at which the organ may hold a tumour.
        tumor_box: tight box around earlier tumours in the sample; None if there are none, or if
            they do not matter.
    """

    label: Tensor
    organ_labels: tuple[int, ...]
    organ_box: Box | None
    forbidden: Tensor | None
    part: Box
    sample_shape: tuple[int, int, int]
    image: Tensor | None = None
    image_range: tuple[float, float] = (-math.inf, math.inf)
    tumor_box: Box | None = None

    @classmethod
    def of_label(
        cls, label: Tensor, organ_labels: int | Iterable[int], forbidden: Tensor | None = None
    ) -> OrganRegion:
        """Return the region of a whole label.

        Args:
            label: (X, Y, Z), whole numbers of any dtype on any device.
            organ_labels: the value or values that are the organ.
            forbidden: bool (X, Y, Z), voxels no tumour may take.

        Raises:
            ValueError: if the shapes do not fit or ``organ_labels`` are not whole numbers.
        """
        labels = check_organ_labels(organ_labels)
        box = organ_box(label, labels)
        if forbidden is not None and (
            forbidden.shape != label.shape or forbidden.dtype != torch.bool
        ):
            raise ValueError(
                f"forbidden must be bool and shaped like label {tuple(label.shape)}, got "
                f"{forbidden.dtype} {tuple(forbidden.shape)}; pass for example image.isnan()"
            )
        whole = Box.whole(label.shape)
        return cls(label, labels, box, forbidden, whole, whole.shape)

    def to_cpu(self) -> OrganRegion:
        """Return the region on the CPU, after one host-device synchronisation."""
        return run_alone(self.fetch())

    def fetch(self) -> Task[OrganRegion]:
        """Return the region on the CPU."""
        if on_cpu(self.label):
            return self
        (code,) = yield [self._code()]
        forbidden = None if self.forbidden is None and self.image is None else code > 1
        return replace(self, label=code & 1, organ_labels=(1,), forbidden=forbidden, image=None)

    def _code(self) -> Tensor:
        """Return 1 in the organ plus 2 where no tumour may be: uint8."""
        organ, forbidden = is_organ(self.label, self.organ_labels), self.forbidden
        if self.image is not None:  # a mask is less to copy than an image
            unsuited = organ & is_outside(self.image, self.image_range)
            forbidden = unsuited if forbidden is None else forbidden | unsuited
        code = organ.to(torch.uint8)
        if forbidden is not None:
            code += 2 * forbidden.to(torch.uint8)
        return code


def organ_box(label: Tensor, organ_labels: int | Iterable[int]) -> Box | None:
    """Return the tight box around all voxels that carry one of the labels.

    Args:
        label: (X, Y, Z), any dtype and device.
        organ_labels: one value or several.

    Returns:
        The box, or None if no voxel carries one of the labels.
    """
    if label.ndim != 3:
        raise ValueError(
            f"label must be (X, Y, Z), got shape {tuple(label.shape)}; pass one sample without "
            "its channel, label[0]"
        )
    labels = check_organ_labels(organ_labels)
    if not on_cpu(label):
        return run_alone(fetch_box(label, labels))
    order = _slowest_first(label)
    planes, across = _planes_and_lines_with(*as_array(label.permute(order), labels))
    return _box_of_hits([planes, *(np.logical_or.reduce(across, axis) for axis in (1, 0))], order)


def fetch_box(label: Tensor, labels: Sequence[int]) -> Task[Box | None]:
    """Return `organ_box` as a task, of labels that are checked."""
    if on_cpu(label):
        return organ_box(label, labels)
    lines = yield lines_with(label, [labels])
    return boxes_of_lines(label, lines)[0]


def lines_with(label: Tensor, values: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return what `boxes_of_lines` needs of a label on a device: three lines for each set.

    Args:
        label: (X, Y, Z), any dtype and device.
        values: the sets of values, each checked.
    """
    label = label.permute(_slowest_first(label))
    lines = []
    for labels in values:
        organ = is_organ(label, labels)
        projected = organ.any(0)
        lines += [organ.any(2).any(1), projected.any(1), projected.any(0)]
    return lines


def boxes_of_lines(label: Tensor, lines: Sequence[Tensor]) -> list[Box | None]:
    """Return `organ_box` of each set of values.

    Args:
        label: as `lines_with` got it.
        lines: what that returned, on the CPU.
    """
    hits, order = [line.numpy() for line in lines], _slowest_first(label)
    return [_box_of_hits(hits[n : n + 3], order) for n in range(0, len(hits), 3)]


def _slowest_first(label: Tensor) -> list[int]:
    """Return the axes in the order of the memory; a NIfTI's memory has its axes in reverse."""
    return sorted(range(3), key=label.stride, reverse=True)


def _box_of_hits(hits: Sequence[Bools], order: Sequence[int]) -> Box | None:
    """Return the box whose planes are hit along three axes, which belong to these of the label."""
    start, stop = [0, 0, 0], [0, 0, 0]
    for axis, line in zip(order, hits, strict=True):
        index = np.flatnonzero(line)
        if len(index) == 0:
            return None
        start[axis], stop[axis] = int(index[0]), int(index[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _planes_and_lines_with(values: NDArray[Any], labels: Sequence[int]) -> tuple[Bools, Bools]:
    """Find which planes (X,) and which lines along X (Y, Z) hold one of the labels.

    Searches slabs that fit a cache: an array as large as the label costs more than the search.
    """
    length, *sides = values.shape
    slab = max(1, SLAB_VOXELS // max(1, math.prod(sides)))
    planes, lines = np.zeros(length, dtype=bool), np.zeros(sides, dtype=bool)
    for first in range(0, length, slab):
        hits = carries(values[first : first + slab], labels)
        if hits.any():
            planes[first : first + slab] = hits.any((1, 2))
            lines |= np.logical_or.reduce(hits, 0)
    return planes, lines


def as_array(label: Tensor, labels: Sequence[int]) -> tuple[NDArray[Any], list[int]]:
    """Return a CPU label as an array that shares its memory, and the labels its dtype can hold."""
    if label.dtype is torch.bfloat16:  # unknown to numpy
        label, labels = is_organ(label, labels), (1,)
    values = label.numpy()
    held = [value for value in labels if holds(label.dtype, value)]
    return values.view(np.uint8) if values.dtype == bool else values, held


def carries(values: NDArray[Any], labels: Sequence[int]) -> Bools:
    """Return where an array has one of the labels, all of which its dtype must hold."""
    if not labels:
        return np.zeros(values.shape, dtype=bool)
    found: Bools = values == labels[0]
    for value in labels[1:]:
        found |= values == value
    return found


def is_organ(label: Tensor, labels: Sequence[int]) -> Tensor:
    """Return where a label has one of the values: bool, of the same shape."""
    organ = None
    for value in labels:
        if holds(label.dtype, value):  # torch compares with the wrapped or rounded value otherwise
            here = label == value
            organ = here if organ is None else organ.logical_or_(here)
    return torch.zeros_like(label, dtype=torch.bool) if organ is None else organ


def is_outside(values: Any, limits: tuple[float, float]) -> Any:
    """Return where a tensor's or an array's values are below or above two limits; not for NaN."""
    return (values < limits[0]) | (values > limits[1])


@lru_cache(maxsize=1024)
def holds(dtype: torch.dtype, value: int) -> bool:
    """Return whether a dtype can hold this number; 257 in uint8 would become 1."""
    return torch.tensor(value).to(dtype).item() == value
