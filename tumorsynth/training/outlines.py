"""Tighten annotated outlines to the visible edge of each tumour.

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

from tumorsynth.appearance.contrast import contrast_of
from tumorsynth.appearance.surroundings import level_around
from tumorsynth.training.data import Case, Tumor, connected_components

MIDDLE_VOXELS = 100  # the most contrasting ones, which give the contrast of a tumour's middle
MIN_CONTRAST_HU = 8.0  # a fainter tumour keeps its outline
MIN_KEPT_SHARE = 0.25  # of the annotated volume; what would be less keeps its outline
MARGIN_MM = 10  # of tissue around a tumour


def tighten_outlines(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, tissue: tuple[float, float]
) -> tuple[list[Case], list[Tumor]]:
    """Shrink each tumour to where it can be seen.

    Visible is where a tumour differs from the tissue around it by at least half of the contrast of
    its middle; its largest connected component is kept, and the rest becomes 0.

    Args:
        cases: the scans; they are not changed.
        tumors: tumours of these cases.
        tumor_label: label value of tumours.
        tissue: HU range of the tissue around tumours.

    Returns:
        Cases with new labels, and tumours with new boxes and diameters.
    """
    labels = [None if case.label is None else case.label.clone() for case in cases]
    tightened = []
    for tumor in tumors:
        case, label = cases[tumor.case], labels[tumor.case]
        assert case.label is not None and label is not None
        box = tumor_surroundings(tumor)
        annotated = tumor_mask(case, tumor, tumor_label)[box]
        seen = _visible_part(case.hu[box].float(), annotated, tissue)
        if seen is None:
            tightened.append(tumor)
            continue
        label[box][annotated & ~seen] = 0
        voxels = seen.nonzero() + torch.tensor([part.start for part in box])
        low, high = voxels.min(0).values.tolist(), (voxels.max(0).values + 1).tolist()
        diameter_mm = (6 * len(voxels) / math.pi) ** (1 / 3)
        tightened.append(Tumor(tumor.case, tuple(low), tuple(high), diameter_mm))
    new_cases = [replace(case, label=label) for case, label in zip(cases, labels, strict=True)]
    return new_cases, tightened


def tumor_surroundings(tumor: Tumor) -> tuple[slice, slice, slice]:
    """Return the slices of a tumour's box and 10 mm around it, clipped to the scan."""
    a, b, c = (
        slice(max(0, lo - MARGIN_MM), hi + MARGIN_MM)
        for lo, hi in zip(tumor.low, tumor.high, strict=True)
    )
    return a, b, c


def tumor_mask(case: Case, tumor: Tumor, tumor_label: int) -> Tensor:
    """Return the mask (X, Y, Z) of this tumour alone; the scan's other tumours are left out."""
    assert case.label is not None
    box = tuple(slice(lo, hi) for lo, hi in zip(tumor.low, tumor.high, strict=True))
    mask = torch.zeros_like(case.label, dtype=torch.bool)
    mask[box] = case.label[box] == tumor_label
    return mask


def _visible_part(hu: Tensor, tumor: Tensor, tissue: tuple[float, float]) -> Tensor | None:
    """The visible part of an annotated tumour (X, Y, Z), or None to keep its outline."""
    smooth = remove_noise(hu)
    volume, mask = smooth[None, None], tumor[None, None]
    level = level_around(volume, mask, tissue)
    contrast = float(contrast_of(volume, mask, level))
    if abs(contrast) < MIN_CONTRAST_HU:
        return None
    depth = (smooth - float(level)) * (1 if contrast > 0 else -1)
    inside = depth[tumor]
    middle = float(inside.topk(min(MIDDLE_VOXELS, len(inside))).values.median())
    seen = tumor & (depth > middle / 2)
    opened = seen & _dilate(~_dilate(~seen))  # threads of noise do not connect parts
    parts = connected_components(opened)
    if not parts:
        return None
    low, high, _ = max(parts, key=lambda part: part[2])
    kept = torch.zeros_like(seen)
    where = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    kept[where] = opened[where]
    kept = tumor & ~_dilate(~_dilate(kept))  # closed: holes of noise are filled
    return kept if int(kept.sum()) >= MIN_KEPT_SHARE * int(tumor.sum()) else None


def remove_noise(hu: Tensor) -> Tensor:
    """Smooth (..., X, Y, Z) by two means of 3 mm, about a Gaussian of 1.2 mm."""
    for _ in range(2):
        hu = F.avg_pool3d(hu[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return hu


def _dilate(mask: Tensor) -> Tensor:
    """Dilate a mask (X, Y, Z) by the six neighbours."""
    padded = F.pad(mask, (1,) * 6)
    x, y, z = mask.shape
    grown = mask.clone()
    for dx, dy, dz in ((0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)):
        grown |= padded[dx : dx + x, dy : dy + y, dz : dz + z]
    return grown
