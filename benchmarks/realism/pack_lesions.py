"""Real and synthetic lesions of scans at 1 mm, cut out with their surroundings."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy import ndimage

import tumorsynth as ts
from benchmarks.realism.lesions import Lesion
from tumorsynth.training.data import Case

PER_CALL, GAP_MM = 8, 10.0  # tumours in one call, and organ between them: shells end 8 mm off
MARGIN = 32  # mm of scan kept on each side of a lesion's centre or box


def real_lesions(
    cases: list[Case], organ_labels: list[int], tumor_label: int, least_voxels: int = 50
) -> list[Lesion]:
    """Every connected annotated tumour (26 neighbours)."""
    lesions = []
    for case in cases:
        if case.label is None:
            continue
        hu, label = case.hu.numpy().astype(np.float32), case.label.numpy()
        parts, count = ndimage.label(label == tumor_label, np.ones((3, 3, 3)))
        for k, box in enumerate(ndimage.find_objects(parts), 1):
            where = tuple(slice(max(0, b.start - MARGIN), b.stop + MARGIN) for b in box)
            tumor = parts[where] == k
            if tumor.sum() >= least_voxels:
                about = {"case": case.name, "centre": [(b.start + b.stop) // 2 for b in box]}
                organ = np.isin(label[where], organ_labels)
                lesions.append(Lesion(hu[where], tumor, organ, about))
    return lesions


def synthetic_lesions(
    generator: str,
    cases: list[Case],
    organ_labels: list[int],
    tumor_label: int,
    count: int,
    seed: int,
    **options: Any,
) -> tuple[list[Lesion], list[Lesion], dict[str, Any]]:
    """``count`` synthetic tumours, the same masks on the untouched scans, and how it went.

    ``options`` go to SynthesizeTumor. Fewer where the organs have no room for more.
    """
    synth = ts.SynthesizeTumor(
        generator, organ_labels, tumor_label, count=PER_CALL, gap_mm=GAP_MM, **options
    )
    made: list[Lesion] = []
    sham: list[Lesion] = []
    reasons: dict[str, int] = {}
    annotated = [case for case in cases if case.label is not None]
    start, call = time.perf_counter(), 0
    while len(made) < count and call < 4 * count:
        case = annotated[call % len(annotated)]
        hu, label = case.hu.float()[None], case.label[None]
        image, new_label = synth(hu, label, seed=seed + call)
        for record in synth.report:
            if not record["applied"]:
                reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
                continue
            centre = record["centre_voxel"]
            where = tuple(slice(max(0, c - MARGIN), c + MARGIN) for c in centre)
            new = ((new_label == tumor_label) & (label != tumor_label))[0][where].numpy()
            parts, _ = ndimage.label(new, np.ones((3, 3, 3)))
            at = tuple(c - part.start for c, part in zip(centre, where, strict=True))
            organ = np.isin(new_label[0][where].numpy(), organ_labels)
            about = {"case": case.name, "centre": centre, "call_seed": seed + call}
            about["hu_change"] = round(record["hu_change"], 1)
            tumor = parts == parts[at]
            made.append(Lesion(image[0][where].numpy(), tumor, organ, about))
            sham.append(Lesion(hu[0][where].numpy(), tumor, organ, about))
        call += 1
    seconds = time.perf_counter() - start
    how = {"calls": call, "seconds": round(seconds, 1), "skipped": reasons}
    return made[:count], sham[:count], how
