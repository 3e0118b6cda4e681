"""A value of `tumor_label` that is taken: the label holds it as an organ, not as tumours.

Real tumours may have the value (LiTS: 1 liver, 2 tumour): that it is present proves nothing.
Tumours of an organ touch it, other organs hardly: the measure is the contact, the share of the
value's surface that borders the organ. How little of it is suspicious depends on what else the
label holds:

- at least two other values, a map of organs: less than MIN_CONTACT;
- one other value (KiTS: 1 kidney, 2 tumour, 3 cyst): less than MIN_CONTACT_ALONE;
- none (liver and spleen, or lung and tumours with nodes): less than MIN_CONTACT_ALONE, and a volume
  of MIN_ORGAN_ML.

A vessel or another structure inside the organ passes for tumours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.geometry import Box
from tumorsynth.once import Once
from tumorsynth.placement.organ import holds, is_organ, organ_box

MIN_CONTACT = 0.25  # real tumours have 0.27 to 0.98, neighbours of the liver up to 0.21
MIN_CONTACT_ALONE = 0.05
CLEARLY_NO_CONTACT = 0.1
MIN_ORGAN_ML = 60.0
MAX_JUDGED = 8  # samples, after which a transform is taken to be right


class TakenLabelCheck:
    """Warns once, for one transform, if the label holds an organ of the value of ``tumor_label``.

    Args:
        tumor_label: the value, as the user gave it.
        organ_labels: values of the organ, as the user gave them.
    """

    def __init__(self, tumor_label: int, organ_labels: tuple[int, ...]) -> None:
        self.tumor_label, self.organ_labels = tumor_label, organ_labels
        self._left = MAX_JUDGED
        self._warning = Once()

    @property
    def is_open(self) -> bool:
        """Whether a sample that holds the value should still be judged."""
        return self._left > 0 and not self._warning.given

    def close(self) -> None:
        """Judge no more samples."""
        self._left = 0

    def judge(
        self,
        label: Tensor,
        box: Box | None = None,
        organ: Tensor | None = None,
        voxel_mm3: float | None = None,
    ) -> None:
        """Judge one sample, and warn if its voxels of the value look like an organ.

        Args:
            label: (X, Y, Z), before any tumour is added.
            box: around the voxels of the value, if known.
            organ: bool (X, Y, Z), the organ, where it is in a map of its own.
            voxel_mm3: volume of a voxel, if known.
        """
        found = measure(label, self.tumor_label, self.organ_labels, box, organ)
        if found is None:
            return
        self._left -= 1
        if not found.looks_like_an_organ(voxel_mm3):
            return
        self._warning.give(
            f"label holds {found.voxels} voxels of {self.tumor_label} = tumor_label before any "
            f"tumour was added, mostly away from organ_labels {self.organ_labels}, as another "
            "organ would be, and tumours would merge into it; pass tumor_label="
            f"{free_value(label)}, which the label does not hold"
        )


@dataclass(frozen=True)
class TakenValue:
    """How a label holds the value of ``tumor_label`` before any tumour is added.

    Args:
        voxels: of the value.
        contact: share of their surface that borders the organ.
        others: number of other values above 0 in the label, counted up to 2.
    """

    voxels: int
    contact: float
    others: int

    def looks_like_an_organ(self, voxel_mm3: float | None = None, *, clearly: bool = False) -> bool:
        """Return whether the voxels look like another organ rather than tumours.

        Args:
            voxel_mm3: volume of a voxel; without it a label of two values is not suspected.
            clearly: ask for more evidence.
        """
        if self.others > 1:
            return self.contact < (CLEARLY_NO_CONTACT if clearly else MIN_CONTACT)
        if self.others == 0:
            ml = 0.0 if voxel_mm3 is None else self.voxels * voxel_mm3 / 1000
            return self.contact < MIN_CONTACT_ALONE and ml >= MIN_ORGAN_ML
        return self.contact < MIN_CONTACT_ALONE


def measure(
    label: Tensor,
    tumor_label: int,
    organ_labels: tuple[int, ...],
    box: Box | None = None,
    organ: Tensor | None = None,
) -> TakenValue | None:
    """Measure how a label holds a value.

    Args:
        label: (X, Y, Z).
        tumor_label: the value.
        organ_labels: values of the organ.
        box: around the voxels of the value, if known.
        organ: bool (X, Y, Z), the organ, where it is in a map of its own.

    Returns:
        None if the label lacks the value or the organ, or is nothing but the value.
    """
    label = label.detach()
    box = box or organ_box(label, tumor_label)
    if box is None:
        return None
    slices = box.grown(1).within(Box.whole(label.shape)).slices
    tumor = label[slices] == tumor_label
    near = is_organ(label[slices], organ_labels) if organ is None else organ[slices] & ~tumor
    surface = touching = 0
    for axis in range(3):
        n = tumor.shape[axis] - 1
        (t0, t1), (o0, o1) = (
            (mask.narrow(axis, 0, n), mask.narrow(axis, 1, n)) for mask in (tumor, near)
        )
        surface += int((t0 ^ t1).sum())
        touching += int((t0 & o1).sum()) + int((o0 & t1).sum())
    if surface == 0:
        return None
    if touching == 0 and not _has_organ(label, organ_labels, organ):
        return None
    coarse = (slice(None, None, 2),) * 3  # an eighth of the time
    label = label[coarse].to(torch.int64)  # torch compares no wide unsigned integers
    known = is_organ(label, (*organ_labels, tumor_label)) if organ is None else organ[coarse]
    is_other = (label > 0) & (label != tumor_label) & ~known
    highest = label.where(is_other, torch.zeros_like(label)).max()
    others = int(highest > 0) + int((is_other & (label != highest)).any())
    return TakenValue(int(tumor.sum()), touching / surface, others)


def _has_organ(label: Tensor, organ_labels: tuple[int, ...], organ: Tensor | None) -> bool:
    return organ_box(label, organ_labels) is not None if organ is None else bool(organ.any())


def free_value(label: Any) -> int:
    """Return a value above all that a label map holds; if its dtype has none, the first gap.

    Args:
        label: a tensor or an array of whole numbers.
    """
    values = torch.as_tensor(label)
    array = values.cpu().numpy()  # torch finds no highest of wide unsigned integers
    above = int(array.max()) + 1
    if above > 0 and holds(values.dtype, above):
        return above
    held = set(np.unique(array).tolist())
    return next(value for value in range(1, len(held) + 2) if value not in held)
