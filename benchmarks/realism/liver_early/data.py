"""Pack the scans that `liver-early` 6 learns from, all CC BY, and those it is measured on.

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

from benchmarks.realism.recipes import smoothed, write_pack
from tumorsynth.training.data import Case
from tumorsynth.training.reading import Source, read_case

ANNOTATIONS = Path(__file__).parents[1] / "annotations"

# Half of the autoencoder's cubes come from these: enhanced livers, and slices of 1 mm.
EMPHASISED = ("crlm_1004", "crlm_1006", "hcc_015_pv", "lidc_enhanced_chest_base", "lidc0314_lower")
OTHERS = (
    "crlm_1100_lowres",
    "adrenal_052_lowres",
    "acrin_flt_001_abdomen",
)
ANNOTATED = ("crlm_1006", "crlm_1100_lowres", "hcc_015_pv")
SURROUNDINGS = (
    "crlm_1004",
    "lidc0314_lower",
    "lidc_enhanced_chest_base",
    "acrin_flt_001_abdomen",
)
# What version 5 had not seen and did badly in: tissue as bright as an arterial kidney, and the
# even, faint noise of smooth kernels. Copies of the scans, of the same terms, stand in for it.
BRIGHTER_GAIN = 1.7  # about 0 HU: a portal liver of 120 HU becomes 205
SMOOTHED_MM = {"crlm_1004": 0.8, "lidc_enhanced_chest_base": 1.0, "lidc0314_lower": 1.3}  # sigma
BRIGHTENED = ("crlm_1004", "acrin_flt_001_abdomen")
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
    copies = [smoothed(read[name], mm) for name, mm in SMOOTHED_MM.items()]
    copies += [brightened(read[name]) for name in BRIGHTENED]
    copies.append(smoothed(brightened(read["crlm_1004"]), SMOOTHED_MM["crlm_1004"]))
    copies = [replace(case, label=None) for case in copies]
    write_pack(args.out / "autoencoder.npz", weighted + plain + copies)
    write_pack(
        args.out / "tumours.npz", [read[name] for name in (*ANNOTATED, *SURROUNDINGS)] + copies
    )
    for name, scans in MEASURED.items():
        cases = [read_scan(args.scans, scan, smooth=False) for scan in scans]
        write_pack(args.out / f"measure_{name}.npz", cases)


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


def brightened(case: Case) -> Case:
    """A scan whose tissue is as bright as that of an arterial kidney."""
    hu = torch.where(case.hu > 0, case.hu.float() * BRIGHTER_GAIN, case.hu.float())
    name = f"{case.name}, brightened"
    return replace(case, name=name, hu=hu.round().to(case.hu.dtype))


if __name__ == "__main__":
    main()
