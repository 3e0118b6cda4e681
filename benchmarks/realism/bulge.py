"""How far do tumours stick out of the kidney: drawn ones, and real ones?

    python -m benchmarks.realism.bulge TUMOR_SHAPES_DIR ORGAN_MASK_DIR [--count 120]

Of each tumour the share within the convex hull of the kidney's other tissue, as the components'
table of KiTS23 gives it (hull_inside_frac), against drawn tumours of the same diameters in the
kidneys of ORGAN_MASK_DIR, with fat all around, by the priors "kidney" and "cyst". In sample: the
priors were set by these figures. "label": the share of a drawn tumour beyond the kidney's label,
the sinus included, which is what is drawn; "off" is how far the share reached is from that.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.stats import ks_2samp

import tumorsynth as ts
from benchmarks.common import spread, write
from tumorsynth.placement.exophytic import ExophyticRegion
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.organ_priors import PRIORS
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import Skip

SOURCES = {"kidney": "kits23_tumor", "cyst": "kits23_cyst"}
LARGEST_MM = {"kidney": 60.0, "cyst": 40.0}
SMALLEST_MM = 8.0
BANDS_MM = (8, 15, 25, 40, 60)
MARGIN_MM = 40.0  # of fat around the kidneys
VOXEL_MM = 1.5  # about; finer masks are thinned out
Organ = tuple[torch.Tensor, tuple[float, float, float]]


def real(folder: Path, name: str) -> np.ndarray:
    """(N, 2): diameter in mm and share within the hull, by diameter."""
    with (folder / "kits23_components.csv").open() as file:
        found = [
            (float(row["eq_diam_mm"]), float(row["hull_inside_frac"]))
            for row in csv.DictReader(file)
            if row["source"] == SOURCES[name] and row["hull_inside_frac"]
        ]
    return np.array(sorted(f for f in found if SMALLEST_MM <= f[0] <= LARGEST_MM[name]))


def organs(folder: Path) -> list[Organ]:
    """Labels (X, Y, Z) of kidneys in 40 mm of nothing, and their spacing."""
    found = []
    for file in sorted(folder.glob("kidney_*.nii.gz")):
        scan = nib.load(file)
        spacing = [float(s) for s in scan.header.get_zooms()[:3]]
        steps = [max(1, round(VOXEL_MM / s)) for s in spacing]
        kidney = (np.asarray(scan.dataobj) > 0)[tuple(slice(None, None, n) for n in steps)]
        x, y, z = (s * n for s, n in zip(spacing, steps, strict=True))
        kidney = np.pad(kidney, [(int(np.ceil(MARGIN_MM / s)),) * 2 for s in (x, y, z)])
        found.append((torch.from_numpy(kidney.astype(np.uint8)), (x, y, z)))
    return found


def hull_share(kidneys: np.ndarray, tumor: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Share of a tumour within the convex hull of the rest of the kidney that it touches."""
    parts, count = ndimage.label(kidneys)
    touched = parts[ndimage.binary_dilation(tumor, iterations=2) & kidneys]
    which = np.bincount(touched, minlength=count + 1).argmax()
    rest = (parts == which) & ~tumor
    surface = rest & ~ndimage.binary_erosion(rest)
    planes = ConvexHull(np.argwhere(surface) * spacing).equations
    points = np.argwhere(tumor) * spacing
    points = points[:: 1 + len(points) // 4000]
    return float((points @ planes[:, :3].T + planes[:, 3] <= 1e-6).all(1).mean())


def drawn(name: str, kidneys: list[Organ], diameters: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(N, 4): diameter, share within the hull, share beyond the label, share asked; and the CPU
    time of each placing in ms."""
    prior, rows, took = PRIORS[name], [], []
    for k, diameter in enumerate(diameters):
        label, spacing = kidneys[k % len(kidneys)]
        hu = torch.where(label > 0, 150.0, -100.0)
        region = OrganRegion.of_label(label, 1)
        rng = torch.Generator().manual_seed(k)
        start = time.process_time()
        settings = PlacementSettings(size_mm=float(diameter), prior=prior, bulge=prior)
        growth = ExophyticRegion(hu, label, (1,), spacing, ts.HU())
        (tumor,) = place(region, spacing, settings, rng, growth)
        took.append(1e3 * (time.process_time() - start))
        if isinstance(tumor, Skip):
            continue
        inside, kidney = np.zeros(label.shape, bool), label.numpy() > 0
        inside[tumor.slices] = tumor.mask.numpy()
        beyond = float((inside & ~kidney).sum() / inside.sum())
        rows.append((diameter, hull_share(kidney, inside, spacing), beyond, tumor.params.bulge))
    return np.array(rows), took


def quartiles(values: np.ndarray) -> list[float]:
    return [round(float(v), 2) for v in np.percentile(values, [25, 50, 75])] if len(values) else []


def compare(name: str, shapes: Path, kidneys: list[Organ], count: int) -> dict[str, Any]:
    table = real(shapes, name)
    chosen = table[np.linspace(0, len(table) - 1, count).astype(int), 0]
    made, took = drawn(name, kidneys, chosen)
    bands = {}
    for low, high in zip(BANDS_MM, BANDS_MM[1:], strict=False):
        some, ours = (t[(t[:, 0] >= low) & (t[:, 0] < high)] for t in (table, made))
        if len(some) and len(ours):
            bands[f"{low} to {high} mm"] = {
                "real": len(some),
                "drawn": len(ours),
                "real_in_hull": quartiles(some[:, 1]),
                "drawn_in_hull": quartiles(ours[:, 1]),
                "drawn_beyond_label": quartiles(ours[:, 2]),
            }
    percent = [5, 25, 50, 75, 95]
    return {
        "real": len(table),
        "drawn": len(made),
        "skipped": count - len(made),
        "ks_in_hull": round(float(ks_2samp(table[:, 1], made[:, 1]).statistic), 3),
        "percentiles_5_25_50_75_95": {
            "real_in_hull": np.percentile(table[:, 1], percent).round(2).tolist(),
            "drawn_in_hull": np.percentile(made[:, 1], percent).round(2).tolist(),
            "drawn_beyond_label": np.percentile(made[:, 2], percent).round(2).tolist(),
        },
        "off_mean": round(float(np.abs(made[:, 2] - made[:, 3]).mean()), 3),
        "by_size_quartiles": bands,
        "placing_cpu_ms": spread(took),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path, metavar="TUMOR_SHAPES_DIR")
    parser.add_argument("organs", type=Path, metavar="ORGAN_MASK_DIR")
    parser.add_argument("--count", type=int, default=120, help="drawn tumours per prior")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kidneys = organs(args.organs)
    results: dict[str, Any] = {
        "question": str(__doc__).splitlines()[0],
        "kidneys": len(kidneys),
        "largest_mm": LARGEST_MM,
    }
    for name in SOURCES:
        results[name] = compare(name, args.shapes, kidneys, args.count)
        print(name, results[name], flush=True)
    write("bulge", results)


if __name__ == "__main__":
    main()
