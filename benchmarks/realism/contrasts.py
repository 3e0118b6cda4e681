"""Do the contrast priors agree with real tumours?

    python -m benchmarks.realism.contrasts CT_DIR

For each named prior with annotated scans of its organ and phase: the contrast of every tumour of at
least 5 mm (median of its core minus that of the organ 3 to 12 mm away), in HU and scaled to the
prior's reference, beside 4000 contrasts of the prior in the same tissue. "dark", "alike" and
"bright" split at -10 and 10 HU. "heterogeneity" is the spread of HU, filtered by 1.5 mm, more than
3 mm below the outline of each tumour of 22 mm and more: the distance from its 5th to its 95th
percentile over that of a normal distribution. A Kolmogorov-Smirnov distance of few tumours says
little: of 20 from the prior itself it is up to 0.29 in 95 of 100 cases.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.stats import ks_2samp

from benchmarks.common import write
from benchmarks.realism.paired import real_tumors
from benchmarks.realism.scans import Scan, liver_scans
from tumorsynth.appearance.contrast_priors import CONTRAST_PRIORS, ContrastPrior

SCANS = {
    "liver-portal": ("ircadb_p01", "lits000", "radcttace_2144_pp", "crlm_1100_lowres"),
    "liver-arterial": ("radcttace_0745_ap",),
}
ORGAN, TUMOR = 1, 2
SMALLEST_MM = 5.0
NEAR_MM, FAR_MM = 3.0, 12.0  # of the tissue around
CORE_MM = 2.0  # below the outline, or half the largest depth
ALIKE_HU = 10.0
DRAWS = 4000
LARGE_MM, DEEP_MM, SMOOTH_MM = 22.0, 3.0, 1.5
NORMAL_SPREAD = 3.29  # from the 5th to the 95th percentile, in standard deviations


def tumors(folder: Path, name: str) -> list[tuple[float, float, float]]:
    """Diameter in mm, contrast in HU and level around, of each tumour of a scan."""
    scan = nib.load(folder / f"{name}_ct.nii.gz")
    image = np.asarray(scan.dataobj)
    label = np.asarray(nib.load(folder / f"{name}_label.nii.gz").dataobj)
    spacing = np.array(scan.header.get_zooms()[:3], dtype=float)
    components, _ = ndimage.label(label == TUMOR, np.ones((3, 3, 3)))
    found = []
    for k, box in enumerate(ndimage.find_objects(components), 1):
        around = tuple(
            slice(max(0, part.start - margin), part.stop + margin)
            for part, margin in zip(box, (FAR_MM / spacing + 2).astype(int), strict=True)
        )
        mask = components[around] == k
        diameter = (6 * mask.sum() * spacing.prod() / math.pi) ** (1 / 3)
        beyond = ndimage.distance_transform_edt(~mask, sampling=spacing)
        depth = ndimage.distance_transform_edt(mask, sampling=spacing)
        tissue = (label[around] == ORGAN) & (beyond > NEAR_MM) & (beyond < FAR_MM)
        if diameter < SMALLEST_MM or tissue.sum() < 50:
            continue
        level = float(np.median(image[around][tissue]))
        core = mask & (depth >= min(CORE_MM, depth.max() / 2))
        found.append((float(diameter), float(np.median(image[around][core])) - level, level))
    return found


def heterogeneity(scan: Scan) -> list[list[float]]:
    """Diameter in mm, contrast of the inside in HU and its spread, of each large tumour."""
    smooth = ndimage.gaussian_filter(scan.hu.numpy(), [SMOOTH_MM / s for s in scan.spacing])
    found = []
    for tumor in real_tumors(scan):
        depth = ndimage.distance_transform_edt(tumor.mask, sampling=scan.spacing)
        deep = smooth[depth > DEEP_MM]
        if tumor.diameter_mm >= LARGE_MM and deep.size:
            low, high = np.percentile(deep, [5, 95])
            row = tumor.diameter_mm, tumor.contrast_hu, (high - low) / NORMAL_SPREAD
            found.append([round(float(v), 1) for v in row])
    return found


def kinds(contrasts: np.ndarray) -> dict[str, float]:
    return {
        "dark": round(float((contrasts < -ALIKE_HU).mean()), 2),
        "alike": round(float((np.abs(contrasts) <= ALIKE_HU).mean()), 2),
        "bright": round(float((contrasts > ALIKE_HU).mean()), 2),
    }


def compare(prior: ContrastPrior, folder: Path, scans: tuple[str, ...]) -> dict:
    """One prior against all its scans."""
    found = {name: tumors(folder, name) for name in scans}
    rows = np.array([row for part in found.values() for row in part])
    sampled = np.array(
        [
            prior.sample(seed, *rows[seed % len(rows)][[0, 2]].tolist()).contrast_hu
            for seed in range(DRAWS)
        ]
    )
    return {
        "patients": len(scans),
        "tumours": len(rows),
        "mm_hu_level": {
            name: [[round(v, 1) for v in row] for row in part] for name, part in found.items()
        },
        "hu_5_50_95": {
            "real": np.percentile(rows[:, 1], [5, 50, 95]).round(1).tolist(),
            "prior": np.percentile(sampled, [5, 50, 95]).round(1).tolist(),
        },
        "kinds": {"real": kinds(rows[:, 1]), "prior": kinds(sampled)},
        "ks": round(float(ks_2samp(rows[:, 1], sampled).statistic), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="CT_DIR")
    args = parser.parse_args()
    results: dict = {
        name: compare(CONTRAST_PRIORS[name], args.folder, scans) for name, scans in SCANS.items()
    }
    large = {scan.name: heterogeneity(scan) for scan in liver_scans(args.folder)}
    large = {name: rows for name, rows in large.items() if rows}
    results["heterogeneity"] = {"mm_hu_sd": large}
    print("heterogeneity", large)
    results["assumed"] = sorted(set(CONTRAST_PRIORS) - set(SCANS))
    for name in SCANS:
        print(name, {k: v for k, v in results[name].items() if k != "mm_hu_level"})
    write("contrasts", results)


if __name__ == "__main__":
    main()
