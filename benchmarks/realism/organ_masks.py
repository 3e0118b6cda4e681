"""Is every draw a tumour inside the organ or a reasoned skip, and how long does it take?

    python -m benchmarks.realism.organ_masks ORGAN_MASK_DIR [--draws 200]

ORGAN_MASK_DIR holds NIfTI organ masks (label 1). Times are of placing and drawing one tumour once
the organ's box is known, and of finding the box.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from benchmarks.common import spread, write
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import Skip


def measure(path: Path, draws: int, size_mm: tuple[float, float]) -> dict:
    scan = nib.load(path)
    label = torch.from_numpy(np.asarray(scan.dataobj).astype(np.uint8))
    spacing = [float(s) for s in scan.header.get_zooms()[:3]]
    start = time.perf_counter()
    region = OrganRegion.of_label(label, 1)
    box_ms = (time.perf_counter() - start) * 1e3
    settings = PlacementSettings(size_mm=size_mm)
    times, diameters, reasons = [], [], Counter()
    for seed in range(draws):
        rng = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        (result,) = place(region, spacing, settings, rng)
        times.append((time.perf_counter() - start) * 1e3)
        if isinstance(result, Skip):
            reasons[result.reason] += 1
            continue
        tumor = torch.zeros(label.shape, dtype=torch.bool)
        tumor[result.slices] = result.mask
        assert tumor.any() and bool((label[tumor] == 1).all()), (path, seed)
        assert ndimage.label(result.mask.numpy(), np.ones((3, 3, 3)))[1] == 1, (path, seed)
        diameters.append(result.diameter_mm)
    return {
        "mask": path.name.removesuffix(".nii.gz"),
        "shape": list(label.shape),
        "spacing_mm": [round(s, 2) for s in spacing],
        "inside": len(diameters),
        "skipped": dict(reasons),
        "diameter_mm": spread(diameters),
        "ms": spread(times),
        "box_ms": round(box_ms, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    size_mm = (5.0, 20.0)
    rows = []
    for path in sorted(args.folder.glob("*.nii.gz")):
        rows.append(measure(path, args.draws, size_mm))
        print(rows[-1])
    cube = torch.ones(96, 96, 96, dtype=torch.uint8)
    region, times = OrganRegion.of_label(cube, 1), []
    settings = PlacementSettings(size_mm=size_mm)
    for seed in range(args.draws):
        rng = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        place(region, (1, 1, 1), settings, rng)
        times.append((time.perf_counter() - start) * 1e3)
    write(
        "organ_masks",
        {"size_mm": size_mm, "draws": args.draws, "cube_96_ms": spread(times), "organs": rows},
    )


if __name__ == "__main__":
    main()
