"""Scans of several patients on disk: noisy livers with dark balls in them, for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SPACING = (1.5, 1.5, 3.0)
SHAPE = (64, 64, 28)
CENTRES_MM = ((24, 24, 27), (24, 72, 60))  # of the tumours


def write_livers(
    folder: Path,
    names: tuple[str, ...] = ("anna_pv", "bert_pv", "carl_pv"),
    directions: str = "LPS",
    contrast_hu: float = -40.0,
    diameter_mm: float = 14.0,
) -> Path:
    """NAME_ct.nii.gz and NAME_label.nii.gz (liver 1, two tumours 2) of every name."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.meshgrid(
        *[(np.arange(n) + 0.5) * mm for n, mm in zip(SHAPE, SPACING, strict=True)], indexing="ij"
    )
    grid = np.stack(axes, -1)
    signs = [1.0 if way in "RAS" else -1.0 for way in directions]
    affine = np.diag([*(s * mm for s, mm in zip(signs, SPACING, strict=True)), 1.0])
    for k, name in enumerate(names):
        label = np.zeros(SHAPE, np.uint8)
        label[3:-3, 3:-3, 1:-1] = 1
        for centre in CENTRES_MM:
            label[np.linalg.norm(grid - centre, axis=-1) < diameter_mm / 2] = 2
        rng = np.random.default_rng(k)
        hu = np.select([label == 2, label == 1], [110 + contrast_hu, 110], -80)
        hu = (hu + rng.normal(0, 10, SHAPE)).round().astype(np.int16)
        nib.save(nib.Nifti1Image(hu, affine), folder / f"{name}_ct.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"{name}_label.nii.gz")
    return folder
