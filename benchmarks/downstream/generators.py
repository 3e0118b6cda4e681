"""The generator of an arm, and what its versions depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import tumorsynth as ts
from benchmarks.downstream.experiments import Job
from benchmarks.downstream.pack import Scan

ORGAN, TUMOR, HIDDEN = 1, 2, 3


def make_generator(job: Job, scans: Mapping[str, Scan]) -> tuple[Any, dict[str, Any]]:
    """Return what `SynthesizeTumor` takes as ``generator``, and its description for the cache."""
    name = job.arm.generator
    if name != "copy-paste":
        return name, {"generator": name}
    annotated = [
        (scans[n].hu.astype(np.float32), annotation(scans[n], taught), scans[n].spacing)
        for n, taught in job.annotated.items()
    ]
    bank = ts.CopyPaste.from_scans(annotated, tumor_label=TUMOR, organ_labels=ORGAN)
    return bank, {"generator": name, "annotated": job.annotated}


def annotation(scan: Scan, taught: tuple[int, ...]) -> np.ndarray:
    """Return a label map with the annotated tumours; the others are neither organ nor tumour."""
    label = scan.organ.astype(np.uint8)
    label[scan.lesions > 0] = HIDDEN
    label[np.isin(scan.lesions, list(taught))] = TUMOR
    return label
