"""Do vessels shine through tumours that lie on them?

    python -m benchmarks.realism.vessels CT_DIR [--only NAME ...] [-o vessels]

Tumours of 8 to 30 mm in livers, three a call. A vessel is liver that, filtered by 1.5 mm, is
brighter than its median by 2.5 of its standard deviations and by 15 HU at least. Of tumours that
hold more than 30 mm3 of vessel deeper than 2 mm: by how many HU the vessel is brighter than the
rest of the tumour at that depth, filtered by 1 mm, and by how many it was brighter than the liver
before. Slices are thinned out in the plane to about 1.4 mm; "soft" is the same scan blurred.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import write
from benchmarks.realism.scans import LIVER, SYNTHETIC, Scan, liver_scans
from tumorsynth.appearance.noise import MAD_TO_SD
from tumorsynth.placement.rasterize import equivalent_diameter

PLANE_MM = 1.4
SEEN_MM, SHOWN_MM = 1.5, 1.0
LEAST_SDS, LEAST_HU = 2.5, 15.0
DEEP_MM, LEAST_MM3 = 2.0, 30.0
SOFT = "ircadb_p01"  # also measured blurred
TOUCHING = np.ones((3, 3, 3))


def filtered(hu: np.ndarray, sigma_mm: float, spacing: tuple[float, ...]) -> np.ndarray:
    made: np.ndarray = ndimage.gaussian_filter(hu, [sigma_mm / s for s in spacing])
    return made


def views(scan: Scan) -> Iterator[tuple[str, Tensor, Tensor, tuple[float, float, float]]]:
    """A scan thinned out in the plane, and one of them blurred too."""
    x, y, z = (max(1, round(PLANE_MM / s)) if s < 0.8 else 1 for s in scan.spacing)
    hu, label = (part[::x, ::y, ::z].clone() for part in (scan.hu, scan.label))
    a, b, c = scan.spacing
    spacing = a * x, b * y, c * z
    yield scan.name, hu, label, spacing
    if scan.name == SOFT:
        soft = torch.from_numpy(ndimage.gaussian_filter(hu.numpy(), (1.0, 1.0, 0.7)))
        yield f"{scan.name}, soft", soft, label, spacing


def tumors(
    name: str, hu: Tensor, label: Tensor, spacing: tuple[float, float, float], calls: int
) -> Iterator[dict[str, Any]]:
    """One row a tumour."""
    before, liver = hu.numpy(), (label == LIVER).numpy()
    seen = filtered(before, SEEN_MM, spacing)
    level = float(np.median(seen[liver]))
    sd = MAD_TO_SD * float(np.median(np.abs(seen[liver] - level)))
    vessel = seen > level + max(LEAST_HU, LEAST_SDS * sd)
    synth = ts.SynthesizeTumor(
        "liver-early", organ_labels=LIVER, tumor_label=SYNTHETIC, count=3, size_mm=(8, 30)
    )
    shown = filtered(before, SHOWN_MM, spacing)
    voxel_mm3 = float(np.prod(spacing))
    for seed in range(calls):
        image, new = synth(hu[None], label[None], spacing=spacing, seed=seed)
        after = filtered(image[0].numpy(), SHOWN_MM, spacing)
        numbers, count = ndimage.label(new[0].numpy() == SYNTHETIC, TOUCHING)
        for k in range(1, count + 1):
            mask = numbers == k
            deep = ndimage.distance_transform_edt(mask, sampling=spacing) > DEEP_MM
            on, beside = deep & vessel, deep & ~vessel
            row: dict[str, Any] = {"scan": name, "vessel_mm3": float(on.sum() * voxel_mm3)}
            row["diameter_mm"] = equivalent_diameter(float(mask.sum() * voxel_mm3))
            if min(on.sum(), beside.sum()) * voxel_mm3 > LEAST_MM3:
                row["was_brighter_hu"] = float(shown[on].mean() - level)
                row["is_brighter_hu"] = float(after[on].mean() - after[beside].mean())
            yield {key: round(v, 1) if isinstance(v, float) else v for key, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scans; default: all")
    parser.add_argument("--calls", type=int, default=6, help="of three tumours, in each scan")
    parser.add_argument("-o", "--output", default="vessels", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for scan in liver_scans(args.scans, only=args.only):
        for view in views(scan):
            rows += tumors(*view, args.calls)
            print(view[0], len(rows), flush=True)
    crossed = [row for row in rows if "is_brighter_hu" in row]
    spread = {
        key: [round(float(q), 1) for q in np.percentile([r[key] for r in crossed], [5, 50, 95])]
        for key in ("was_brighter_hu", "is_brighter_hu")
    }
    results = {
        "question": str(__doc__).splitlines()[0],
        "tumours": len(rows),
        "on_vessels": len(crossed),
        "percentiles_5_50_95": spread,
        "brighter_by_10_hu": sum(row["is_brighter_hu"] > 10 for row in crossed),
        "brighter_by_20_hu": sum(row["is_brighter_hu"] > 20 for row in crossed),
        "each": crossed,
    }
    write(args.output, results)
    print({key: value for key, value in results.items() if key != "each"})


if __name__ == "__main__":
    main()
