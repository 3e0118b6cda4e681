"""Pack the scans that `lung` 3 learns from, all free to use, and one that it is measured on.

    python -m benchmarks.realism.lung.data CT_DIR -o RUN

CT_DIR holds NAME_ct.nii.gz. Writes RUN/autoencoder.npz, RUN/tumours.npz and RUN/measure.npz.
README.md names sources and licences; what is measured is never trained on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from benchmarks.realism.recipes import smoothed, write_pack
from tumorsynth.training.data import Case, find_tumors
from tumorsynth.training.reading import Source, read_case

HERE = Path(__file__).parent
ANNOTATED = "lidc_enhanced_chest_base"  # six nodules of 6 to 11 mm
OTHERS = ("lidc0314_lower", "totalseg_aorta_crop", "totalseg_pulmonary_crop")
MEASURED = "lung1_003"
SMOOTHED_MM = {ANNOTATED: 0.8, "lidc0314_lower": 1.2}  # sigma; as smoother kernels show them
# Nodules of 12 to 25 mm: the annotated ones enlarged, with edges as sharp as before.
ENLARGED = (1.6, 2.3)
AROUND_MM = 34  # half a side of the cube around a nodule that is enlarged
HALFWAY_HU, STEEP_MM = -400.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="RUN")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ct = {name: args.scans / f"{name}_ct.nii.gz" for name in (ANNOTATED, *OTHERS, MEASURED)}
    annotated = read_case(Source(ANNOTATED, ct[ANNOTATED], HERE / f"{ANNOTATED}_label.nii.gz"))
    others = [read_case(Source(name, ct[name], None)) for name in OTHERS]
    plain = [replace(annotated, label=None), *others]
    copies = [smoothed(one, SMOOTHED_MM[one.name]) for one in plain if one.name in SMOOTHED_MM]
    write_pack(args.out / "autoencoder.npz", plain + copies)
    larger = [one for factor in ENLARGED for one in enlarged(annotated, factor)]
    write_pack(args.out / "tumours.npz", [annotated, *others, *copies, *larger])
    label = args.scans / f"{MEASURED}_label.nii.gz"
    write_pack(args.out / "measure.npz", [read_case(Source(MEASURED, ct[MEASURED], label))])


def enlarged(case: Case, factor: float) -> list[Case]:
    """Cubes around a case's nodules, enlarged, in which the nodules' edges stay as sharp."""
    assert case.label is not None
    made = []
    for number, tumor in enumerate(find_tumors([case], 2)):
        centre = [round((low + high) / 2) for low, high in zip(tumor.low, tumor.high, strict=True)]
        box = tuple(slice(max(0, c - AROUND_MM), c + AROUND_MM) for c in centre)
        hu = ndimage.zoom(case.hu[box].float().numpy(), factor, order=1)
        soft = ndimage.zoom((case.label[box] == 2).float().numpy(), factor, order=1)
        parts, _ = ndimage.label(soft > 0.5)
        middle = tuple(int((c - b.start) * factor) for c, b in zip(centre, box, strict=True))
        mask = parts == parts[middle]  # other nodules of the cube stay tissue
        outer = ndimage.distance_transform_edt(~mask)
        steep = HALFWAY_HU + (hu - HALFWAY_HU) * factor
        core = float(np.median(hu[ndimage.binary_erosion(mask, iterations=3)]))
        lung = float(np.median(hu[(outer > 4) & (outer < 12) & (hu < -600)]))
        near = ndimage.gaussian_filter((outer < STEEP_MM).astype(np.float32), 1.0)
        inside = np.where(hu > core, hu, steep.clip(lung, core))
        hu = hu + near * (inside - hu)
        made.append(
            replace(
                case,
                name=f"{case.name}, nodule {number + 1} times {factor:g}",
                hu=torch.from_numpy(hu).round().to(case.hu.dtype),
                label=torch.from_numpy(2 * mask.astype(np.uint8)),
            )
        )
    return made


if __name__ == "__main__":
    main()
