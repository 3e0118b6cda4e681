"""Outline the nodules of a CC BY scan of the chest: a threshold inside balls chosen by eye.

    python -m benchmarks.realism.lung.outline CT_DIR -o benchmarks/realism/lung

CT_DIR holds NAME_ct.nii.gz of the scans named in nodules.json. Writes NAME_label.nii.gz (uint8: 2
nodule) on the same grid. A nodule is what is denser than half way between lung and nodule
inside its ball [x, y, z in voxels, radius in mm], without vessels. Nodules at the chest wall are
left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

NODULES = Path(__file__).with_name("nodules.json")
HALFWAY_HU = -400.0  # between lung (-850) and nodule (50)
SMOOTH_MM = 0.5
VESSEL_MM = 1.6  # radius; what is no wider is cut off

Bools = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    for name, balls in json.loads(NODULES.read_text()).items():
        image = nibabel.load(args.scans / f"{name}_ct.nii.gz")  # type: ignore[attr-defined]
        spacing = [float(mm) for mm in image.header.get_zooms()[:3]]
        hu = np.asarray(image.dataobj, dtype=np.float32)
        found = [nodule(hu, spacing, ball) for ball in balls]
        label = 2 * np.any(found, axis=0).astype(np.uint8)
        nibabel.save(  # type: ignore[attr-defined]
            nibabel.Nifti1Image(label, image.affine),  # type: ignore[attr-defined]
            args.out / f"{name}_label.nii.gz",
        )
        volumes = [mask.sum() * np.prod(spacing) for mask in found]
        sizes = ", ".join(f"{(6 * v / np.pi) ** (1 / 3):.1f}" for v in volumes)
        print(f"{name}: nodules of {sizes} mm")


def nodule(hu: np.ndarray, spacing: Sequence[float], ball: Sequence[float]) -> Bools:
    """The densest part of a ball, opened so that vessels stay outside."""
    at = np.indices(hu.shape, sparse=True)
    squares = sum(((a - c) * s) ** 2 for a, c, s in zip(at, ball[:3], spacing, strict=True))
    inside = squares <= ball[3] ** 2
    where = tuple(
        slice(max(0, int(c - 20 / s)), int(c + 20 / s) + 1)
        for c, s in zip(ball[:3], spacing, strict=True)
    )
    local = ndimage.gaussian_filter(hu[where], [SMOOTH_MM / s for s in spacing])
    dense = (local > HALFWAY_HU) & inside[where]
    depth = ndimage.distance_transform_edt(dense, spacing)
    parts, count = ndimage.label(depth > VESSEL_MM)
    middle = tuple(int(c) - w.start for c, w in zip(ball[:3], where, strict=True))
    sizes = np.bincount(parts.ravel())[1:]
    wanted = parts[middle] or int(sizes.argmax()) + 1
    body = parts == wanted
    mask = np.zeros(hu.shape, bool)
    mask[where] = dense & (ndimage.distance_transform_edt(~body, spacing) <= VESSEL_MM + 0.3)
    return mask


if __name__ == "__main__":
    main()
