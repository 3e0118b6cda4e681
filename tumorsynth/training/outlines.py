"""Annotated tumours, outlined where they can be seen.

Annotators draw generously: the visible edge of a liver tumour lies 1 to 2 mm inside the outline. A
generator trained on such outlines paints a faint rim into every mask, and hardly anything into a
small one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.contrast import contrast_of, level_around
from tumorsynth.training.data import Case, Tumor, components

DEEPEST = 100  # voxels that say how far the middle of a tumour differs from the tissue around it
FAINT_HU = 8.0  # a tumour of less contrast keeps its outline
LEAST = 0.25  # of the annotated volume; what would be less keeps its outline


def visible(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, tissue: tuple[float, float]
) -> tuple[list[Case], list[Tumor]]:
    """Cases and tumours with each tumour where it differs from the tissue around it by at least
    half of what its middle does, the largest connected part of that; the rest of it becomes 0."""
    labels = [None if case.label is None else case.label.clone() for case in cases]
    found = []
    for tumor in tumors:
        case, label = cases[tumor.case], labels[tumor.case]
        assert case.label is not None and label is not None
        box = tuple(
            slice(max(0, a - 10), b + 10) for a, b in zip(tumor.low, tumor.high, strict=True)
        )
        own = alone(case, tumor, tumor_label)[box]
        seen = _half(case.hu[box].float(), own, tissue)
        if seen is None:
            found.append(tumor)
            continue
        label[box][own & ~seen] = 0
        at = seen.nonzero() + torch.tensor([part.start for part in box])
        low, high = at.min(0).values.tolist(), (at.max(0).values + 1).tolist()
        size = (6 * len(at) / math.pi) ** (1 / 3)
        found.append(Tumor(tumor.case, tuple(low), tuple(high), size))
    return [replace(case, label=label) for case, label in zip(cases, labels, strict=True)], found


def alone(case: Case, tumor: Tumor, tumor_label: int) -> Tensor:
    """The mask of this tumour: others are surroundings, as tumours of a patient's own are later."""
    assert case.label is not None
    box = tuple(slice(lo, hi) for lo, hi in zip(tumor.low, tumor.high, strict=True))
    own = torch.zeros_like(case.label, dtype=torch.bool)
    own[box] = case.label[box] == tumor_label
    return own


def _half(hu: Tensor, tumor: Tensor, tissue: tuple[float, float]) -> Tensor | None:
    """The visible part of the annotated ``tumor`` (X, Y, Z), or None to leave it as it is."""
    smooth = smoothed(hu)
    volume, mask = smooth[None, None], tumor[None, None]
    level = level_around(volume, mask, tissue)
    contrast = float(contrast_of(volume, mask, level))
    if abs(contrast) < FAINT_HU:
        return None
    depth = (smooth - float(level)) * (1 if contrast > 0 else -1)
    inside = depth[tumor]
    middle = float(inside.topk(min(DEEPEST, len(inside))).values.median())
    seen = tumor & (depth > middle / 2)
    # opened by a voxel: threads of noise do not hold parts together
    cross = _cross(~_cross(~seen))
    parts = components(seen & cross)
    if not parts:
        return None
    low, high, _ = max(parts, key=lambda part: part[2])
    kept = torch.zeros_like(seen)
    where = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    kept[where] = (seen & cross)[where]
    kept = tumor & ~_cross(~_cross(kept))  # closed: holes of noise are filled
    return kept if int(kept.sum()) >= LEAST * int(tumor.sum()) else None


def smoothed(hu: Tensor) -> Tensor:
    """(..., X, Y, Z) without its noise: two 3 mm means, about a Gaussian of 1.2 mm."""
    for _ in range(2):
        hu = F.avg_pool3d(hu[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return hu


def _cross(mask: Tensor) -> Tensor:
    """A dilation by the six neighbours."""
    padded = F.pad(mask, (1,) * 6)
    x, y, z = mask.shape
    grown = mask.clone()
    for dx, dy, dz in ((0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)):
        grown |= padded[dx : dx + x, dy : dy + y, dz : dz + z]
    return grown
