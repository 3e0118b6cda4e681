"""Pack the scans that `liver-early` 5 learns from, all CC BY, and those it is measured on.

    python -m benchmarks.realism.liver_early.data CT_DIR -o RUN

CT_DIR holds NAME_ct.nii.gz and, for scans annotated by others, NAME_label.nii.gz; the labels in
benchmarks/realism/annotations come first. Writes RUN/autoencoder.npz and RUN/tumours.npz, and for
every set of MEASURED RUN/measure_SET.npz. Nothing of MEASURED is ever trained on, and their terms
forbid passing on the last two packs. README.md names sources and licences.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from tumorsynth.training.data import Case, Tumor, find_tumors, save_pack
from tumorsynth.training.reading import Source, read_case

ANNOTATIONS = Path(__file__).parents[1] / "annotations"

# Half of the autoencoder's cubes come from these: enhanced livers, and slices of 1 mm.
EMPHASISED = ("crlm_1004", "crlm_1006", "hcc_015_pv", "lidc_enhanced_chest_base", "lidc0314_lower")
OTHERS = (
    "crlm_1100_lowres",
    "adrenal_052_lowres",
    "acrin_flt_001_abdomen",
    "ibsi_lung_p1",
    "ibsi_lung_p2",
    "ibsi_lung_p4",
)
ANNOTATED = ("crlm_1006", "crlm_1100_lowres", "hcc_015_pv")
SURROUNDINGS = (
    "crlm_1004",
    "lidc0314_lower",
    "lidc_enhanced_chest_base",
    "acrin_flt_001_abdomen",
)
MEASURED = {
    "lits": ("lits000",),
    "portal": (
        "radcttace_0697_eqp",
        "radcttace_0745_eqp",
        "radcttace_1720_eqp",
        "radcttace_2144_eqp",
        "radcttace_2144_pp",
    ),
    "arterial": ("radcttace_0745_ap",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="RUN")
    args = parser.parse_args()
    read = {name: read_scan(args.scans, name) for name in (*EMPHASISED, *OTHERS)}
    emphasised = [read[name] for name in EMPHASISED]
    weighted = [replace(case, label=torch.zeros_like(case.hu).byte()) for case in emphasised]
    plain = [replace(read[name], label=None) for name in OTHERS]
    write(args.out / "autoencoder.npz", weighted + plain)
    write(args.out / "tumours.npz", [read[name] for name in (*ANNOTATED, *SURROUNDINGS)])
    for name, scans in MEASURED.items():
        cases = [read_scan(args.scans, scan, smooth=False) for scan in scans]
        write(args.out / f"measure_{name}.npz", cases)


def read_scan(folder: Path, name: str, smooth: bool = True) -> Case:
    """A scan at 1 mm; the staircase of labels on thick slices is smoothed."""
    candidates = [ANNOTATIONS / f"{name}_label.nii.gz", folder / f"{name}_label.nii.gz"]
    found = next((path for path in candidates if path.is_file()), None)
    case = read_case(Source(name, folder / f"{name}_ct.nii.gz", found))
    if case.label is None or not smooth:
        return case
    values = case.label.numpy()
    organ, tumor = (ndimage.gaussian_filter((values >= v).astype(np.float32), 1.5) for v in (1, 2))
    label = np.where(values <= 2, (organ > 0.5).astype(np.uint8) + (tumor > 0.5), values)
    return replace(case, label=torch.from_numpy(label.astype(np.uint8)))


def write(path: Path, cases: list[Case]) -> None:
    save_pack(cases, path)
    tumors: list[Tumor] = []
    annotated = [case for case in cases if case.label is not None and bool((case.label == 2).any())]
    if annotated:
        tumors = find_tumors(annotated, 2)
    sizes = ", ".join(f"{annotated[t.case].name} {t.diameter_mm:.1f} mm" for t in tumors)
    print(f"{path}: {len(cases)} scans; tumours: {sizes or 'none'}", flush=True)


if __name__ == "__main__":
    main()
