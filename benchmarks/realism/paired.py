"""Real tumours of a scan, and synthetic ones of their size and contrast elsewhere in the liver.

Everything is painted on the scan's own grid, as a user would, and stored as the scan is: HU in
the steps of its file. To be measured, real and synthetic tumours are resampled to 1 mm alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import tumorsynth as ts
from benchmarks.realism.lesions import Lesion, core_contrast
from benchmarks.realism.scans import LIVER, REAL, SYNTHETIC, Scan
from tumorsynth.geometry import Box, bounding_box

LEAST_VOXELS = 8  # of a real tumour
LEAST_DIAMETER_MM = 5.0  # of a tumour, real or synthetic
MARGIN_MM = 17.0  # around a tumour that is measured
GAP_MM = 10.0  # between a synthetic tumour and any real one: what is measured lies up to 8 mm off
TRIES = 40  # places that are looked at
SAME_SIZE = (0.95, 1.05)  # of the real tumour's diameter
LEAST_SIZE = 0.8  # of it
NEAR_HU = 3.0  # a contrast this near to the real one is not corrected
LEAST_ASKED_HU = 8.0  # from fainter ones no response can be told
RESPONSES = (0.4, 1.5)  # HU in the core for each HU asked: thick slices and small tumours take some


@dataclass
class Tumor:
    """A tumour in its scan.

    hu: (X, Y, Z), the whole scan with it. mask: (X, Y, Z) bool. contrast_hu: see
    `benchmarks.realism.lesions.core_contrast`.
    """

    scan: Scan
    hu: Tensor
    mask: np.ndarray
    lesion: Lesion
    contrast_hu: float

    @property
    def diameter_mm(self) -> float:
        """Diameter of the sphere of the same volume."""
        return diameter_of(self.mask, self.scan)


def diameter_of(mask: np.ndarray, scan: Scan) -> float:
    return (6 * float(mask.sum()) * math.prod(scan.spacing) / math.pi) ** (1 / 3)


def real_tumors(scan: Scan) -> list[Tumor]:
    """Connected annotated tumours (26 neighbours) of at least 5 mm."""
    parts, count = ndimage.label(scan.label.numpy() == REAL, np.ones((3, 3, 3)))
    found = []
    for k in range(1, count + 1):
        mask = parts == k
        if mask.sum() >= LEAST_VOXELS:
            found.append(_tumor(scan, scan.hu, mask))
    return [each for each in found if each.diameter_mm >= LEAST_DIAMETER_MM]


@dataclass
class Made:
    """A synthetic tumour, its mask on the untouched scan, what was asked for, and the seed."""

    tumor: Tumor
    sham: Tumor
    asked_hu: float
    seed: int


def make(
    generator: Any,
    scan: Scan,
    diameter_mm: float,
    contrast_hu: float,
    seed: int,
    taken: np.ndarray | None = None,
) -> Made | str:
    """Paint a tumour of a diameter and a measured contrast; or say why there is none.

    The contrast that is asked of the generator is corrected once where the measured one is off by
    more than 3 HU, so that generators are compared at the same contrast. No voxel of ``taken``
    (X, Y, Z) becomes tumour.
    """
    seed = _free_seed(scan, diameter_mm, contrast_hu, seed, taken)
    if seed < 0:
        return (
            f"no room for {diameter_mm:.0f} mm, {GAP_MM:.0f} mm off real tumours, in {TRIES} draws"
        )
    asked = contrast_hu
    painted = _paint(generator, scan, diameter_mm, asked, seed)
    if isinstance(painted, str):
        return painted
    image, mask = painted
    sham = _tumor(scan, scan.hu, mask)
    made = _tumor(scan, as_stored(image, scan), mask)
    off = made.contrast_hu - contrast_hu
    if abs(asked) >= LEAST_ASKED_HU and abs(off) > NEAR_HU:
        response = np.clip((made.contrast_hu - sham.contrast_hu) / asked, *RESPONSES)
        asked = float((contrast_hu - sham.contrast_hu) / response)
        painted = _paint(generator, scan, diameter_mm, asked, seed)
        if isinstance(painted, str):
            return painted
        made = _tumor(scan, as_stored(painted[0], scan), mask)
    return Made(made, sham, round(asked, 1), seed)


def pairs(
    generator: Any, scan: Scan, real: list[Tumor], each: int, seed: int
) -> Iterator[Made | str]:
    """``each`` synthetic tumours for every real one, or the reasons why there are fewer."""
    for k, tumor in enumerate(real):
        if math.isnan(tumor.contrast_hu):
            continue
        for n in range(each):
            first = seed + 10_000 * (each * k + n)
            yield make(generator, scan, tumor.diameter_mm, tumor.contrast_hu, first)


def _free_seed(
    scan: Scan, diameter_mm: float, contrast_hu: float, seed: int, taken: np.ndarray | None
) -> int:
    """The first seed from ``seed`` on whose tumour is far enough from real ones; -1 for none.

    The place and the outline depend on the seed alone, so the quick `hu2023` shows them.
    """
    for attempt in range(seed, seed + TRIES):
        painted = _paint("hu2023", scan, diameter_mm, contrast_hu, attempt)
        if isinstance(painted, str):
            continue
        mask = painted[1]
        size = diameter_of(mask, scan) / diameter_mm  # organs without room get a smaller tumour
        free = scan.from_real_mm[mask].min() >= GAP_MM and (taken is None or not taken[mask].any())
        if free and size > LEAST_SIZE:
            return attempt
    return -1


def _paint(
    generator: Any, scan: Scan, diameter_mm: float, contrast_hu: float, seed: int
) -> tuple[Tensor, np.ndarray] | str:
    """The scan with a tumour, and its mask; or the reason of the skip."""
    size = tuple(max(LEAST_DIAMETER_MM, diameter_mm * factor) for factor in SAME_SIZE)
    synth = ts.SynthesizeTumor(
        generator, LIVER, SYNTHETIC, count=1, size_mm=size, contrast_hu=contrast_hu
    )
    with warnings.catch_warnings():  # real tumours are faint, too
        warnings.simplefilter("ignore", UserWarning)
        image, label, report, _ = synth.synthesize(
            scan.hu[None], scan.label[None], scan.spacing, seed=seed
        )
    if not report[0]["applied"]:
        return str(report[0]["reason"])
    return image[0], (label[0] == SYNTHETIC).numpy()


def as_stored(image: Tensor, scan: Scan) -> Tensor:
    """Round what changed as the scan's file would: to whole HU, or to its coarser steps."""
    changed, steps = image != scan.hu, scan.steps_hu
    out = image.clone()
    if float((steps[1:] - steps[:-1]).median()) > 1:
        middle = (steps[1:] + steps[:-1]) / 2
        out[changed] = steps[torch.bucketize(image[changed], middle)]
    elif bool((steps == steps.round()).all()):
        out[changed] = image[changed].round()
    return out


def _tumor(scan: Scan, hu: Tensor, mask: np.ndarray) -> Tumor:
    organ = (scan.label == LIVER).numpy() & ~mask
    lesion = _at_1_mm(scan, hu.numpy(), mask, organ)
    contrast = core_contrast(lesion.hu, lesion.tumor, lesion.organ)
    return Tumor(scan, hu, mask, lesion, contrast)


def _at_1_mm(scan: Scan, hu: np.ndarray, mask: np.ndarray, organ: np.ndarray) -> Lesion:
    """The surroundings of a tumour at 1 mm, linearly interpolated, masks at a half."""
    box = bounding_box(torch.from_numpy(mask), 0)
    assert box is not None
    box = box.grown([math.ceil(MARGIN_MM / s) for s in scan.spacing])
    part = box.within(Box.whole(mask.shape)).slices

    def resampled(volume: np.ndarray) -> np.ndarray:
        values = volume[part].astype(np.float32)
        sides = zip(scan.spacing, values.shape, strict=True)
        zoom = [max(1, round(mm * n)) / n for mm, n in sides]
        return ndimage.zoom(values, zoom, order=1, mode="nearest", grid_mode=True)

    tumor = resampled(mask) >= 0.5
    about = {"case": scan.name}
    return Lesion(resampled(hu), tumor, (resampled(organ) >= 0.5) & ~tumor, about)
