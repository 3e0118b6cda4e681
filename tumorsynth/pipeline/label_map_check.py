"""Whether labels are those of ``label_map``: looked at in the first samples of a transform."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tumorsynth.label_maps import LabelMap
from tumorsynth.once import Once

MAX_CHECKED = 8  # samples, after which a transform is taken to be right
MAX_VOXELS = 500_000  # of a sample that are looked at


class LabelMapCheck:
    """Refuses labels with values that a public set does not have, in the first samples.

    Args:
        label_map: the map; without one there is nothing to check.
        tumor_label: the tumours' value, which need not be in the map.
    """

    def __init__(self, label_map: LabelMap | None, tumor_label: int) -> None:
        self.label_map, self.tumor_label = label_map, tumor_label
        self._left = MAX_CHECKED if label_map is not None and label_map.is_complete else 0

    @property
    def is_open(self) -> bool:
        """Whether more samples should be checked."""
        return self._left > 0

    def close(self) -> None:
        """Check no more samples."""
        self._left = 0

    def check_all(self, labels: Iterable[Tensor]) -> None:
        """Check the labels of several samples, as many as are still to be checked.

        Raises:
            ValueError: if one contradicts the map.
        """
        for label in labels:
            if self.is_open and self.label_map is not None:
                self.label_map.check(label_values(label), self.tumor_label)
                self._left -= 1


def label_values(label: Tensor) -> list[int]:
    """Return the values of a label, in a grid of at most MAX_VOXELS voxels, ascending.

    Args:
        label: (..., X, Y, Z), whole numbers of any dtype.
    """
    step = max(1, math.ceil((label.numel() / MAX_VOXELS) ** (1 / 3)))
    voxels = label.detach()[..., ::step, ::step, ::step]
    return [int(v) for v in torch.unique(voxels.to(torch.int64)).tolist()]


def warn_of_taken_value(label_map: LabelMap | None, tumor_label: int) -> None:
    """Warn if a label map says that the tumours' value is another structure's."""
    name = None if label_map is None else label_map.name_of(tumor_label)
    if label_map is None or name is None or label_map.is_tumor(name):
        return
    Once().give(
        f"tumor_label must be free in the label, but {tumor_label} is {name} in label_map "
        f"{label_map.source!r}, and tumours would merge into it; pass "
        f"tumor_label={label_map.free_value()}, which the map does not have",
    )
