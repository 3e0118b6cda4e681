"""Do large tumours push the liver's surface out? Real ones beside synthetic ones.

    python -m benchmarks.realism.capsule CT_DIR

Of each tumour of 30 mm and more, the share that lies beyond the surface that its liver would have
without it: the rest of the liver, closed by a ball of 20 mm. Synthetic tumours of the same
diameters in the same livers, by several shares of their volume that push tissue aside instead of
replacing it (`mass_effect`). All on 2 mm voxels. Only tumours that come within 3 mm of the surface
count. A scan's outlines end where somebody drew them: so may the share.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import tumorsynth as ts
from benchmarks.common import write
from benchmarks.realism.paired import real_tumors
from benchmarks.realism.scans import LIVER, SYNTHETIC, Scan, liver_scans

LEAST_MM, BALL_MM, VOXEL_MM, NEAR_MM = 30.0, 20.0, 2.0, 3.0
SHARES = (0.0, 0.3, 0.6)
EACH = 4


def coarse(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """A mask on 2 mm voxels, with the ball's radius of nothing around."""
    zoom = [s / VOXEL_MM for s in spacing]
    share = ndimage.zoom(mask.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
    return np.pad(share >= 0.5, int(BALL_MM / VOXEL_MM) + 1)


def beyond(liver: np.ndarray, tumor: np.ndarray, spacing: tuple[float, ...]) -> float | None:
    """Share of a tumour beyond the closed rest of its liver; None if it is not at the surface."""
    rest, mask = coarse(liver & ~tumor, spacing), coarse(tumor, spacing)
    depth = ndimage.distance_transform_edt(rest | mask) * VOXEL_MM
    if not mask.any() or depth[mask].min() > NEAR_MM:
        return None
    reached = ndimage.distance_transform_edt(~rest) * VOXEL_MM <= BALL_MM
    closed = ndimage.distance_transform_edt(reached) * VOXEL_MM > BALL_MM
    return float((mask & ~closed).sum() / mask.sum())


def real(scan: Scan) -> Iterator[tuple[float, float | None]]:
    """Diameter and share of each large annotated tumour."""
    liver = (scan.label == LIVER).numpy()
    for tumor in real_tumors(scan):
        if tumor.diameter_mm >= LEAST_MM:
            yield tumor.diameter_mm, beyond(liver | tumor.mask, tumor.mask, scan.spacing)


def synthetic(scan: Scan, diameter: float, share: float) -> Iterator[float | None]:
    """Shares of synthetic tumours of a diameter."""
    synth = ts.SynthesizeTumor(
        "hu2023",
        organ_labels=LIVER,
        tumor_label=SYNTHETIC,
        count=1,
        size_mm=diameter,
        mass_effect=share,
    )
    for seed in range(EACH):
        _, label = synth(scan.hu[None], scan.label[None], spacing=scan.spacing, seed=seed)
        tumor = label[0].numpy() == SYNTHETIC
        if tumor.any():
            yield beyond((label[0].numpy() == LIVER) | tumor, tumor, scan.spacing)


def summary(shares: list[float | None]) -> dict[str, Any]:
    at_surface = [s for s in shares if s is not None]
    figures = {"tumours": len(shares), "at_the_surface": len(at_surface)}
    if not at_surface:
        return figures
    quartiles = [round(float(q), 3) for q in np.percentile(at_surface, [25, 50, 75])]
    return {**figures, "quartiles": quartiles, "largest": round(max(at_surface), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--output", default="capsule", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    made: dict[float, list[float | None]] = {share: [] for share in SHARES}
    for scan in liver_scans(args.scans):
        for diameter, own in real(scan):
            row = {"patient": scan.patient, "scan": scan.name, "diameter_mm": round(diameter, 1)}
            rows.append({**row, "beyond": own})
            for share, shares in made.items():
                shares += synthetic(scan, diameter, share)
            print(rows[-1], {share: summary(shares) for share, shares in made.items()}, flush=True)
    results = {
        "question": str(__doc__).splitlines()[0],
        "patients": len({row["patient"] for row in rows}),
        "real": {"each": rows, **summary([row["beyond"] for row in rows])},
        "synthetic_by_mass_effect": {str(share): summary(made[share]) for share in SHARES},
    }
    write(args.output, results)


if __name__ == "__main__":
    main()
