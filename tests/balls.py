"""Scans to train on in tests: a noisy organ with dark balls in it, tumours of 12 and 10 mm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tumorsynth.training.data import Case

BALLS = (((15, 15, 15), 6), ((34, 30, 30), 5))
SIDE = 48


def make_cases(noise: float = 10.0, seed: int = 0) -> list[Case]:
    """An annotated scan (organ 1, tumours 2) of 48^3 mm, and one without a label."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).astype(float)
    label = np.ones((SIDE,) * 3, np.uint8)
    for centre, radius in BALLS:
        label[np.linalg.norm(grid - np.array(centre), axis=-1) < radius] = 2
    hu = np.where(label == 2, 60, 100) + rng.normal(0, noise, label.shape)
    scan = torch.from_numpy(hu).round().short()
    return [
        Case("annotated", scan, torch.from_numpy(label)),
        Case("plain", (scan.flip(0) - 20).contiguous(), None),
    ]


def write_dataset(folder: Path, cases: list[Case]) -> Path:
    """The cases as NIfTI at 1 mm, LPS, and their dataset.json; returns its path."""
    import nibabel as nib

    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for case in cases:
        entry = {"image": f"images/{case.name}.nii.gz"}
        (folder / "images").mkdir(exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(case.hu.numpy(), affine), folder / entry["image"])
        if case.label is not None:
            entry["label"] = f"labels/{case.name}.nii.gz"
            nib.save(nib.Nifti1Image(case.label.numpy(), affine), folder / entry["label"])
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return folder / "dataset.json"
