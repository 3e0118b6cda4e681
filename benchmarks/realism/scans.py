"""Annotated livers of a folder of scans: CT, label and patient, cut around the organ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from tumorsynth.geometry import Box, bounding_box

ANNOTATIONS = Path(__file__).parent / "annotations"
LIVER, REAL, SYNTHETIC = 1, 2, 99
OTHER_ORGANS = ("lung", "adrenal", "ibsi")  # whose label 1 is no liver
MARGIN_MM = 40.0  # of a scan around the liver
SAME_PATIENT = re.compile(r"_(ap|pv|pp|eqp|lowres)$")  # phase or resolution at the end of a name


@dataclass
class Scan:
    """A scan cut around its liver, on its own grid.

    hu: (X, Y, Z) float. label: 1 liver, 2 real tumours, int16. directions: towards which side of
    the patient each axis goes, such as ("L", "P", "S").
    """

    name: str
    hu: Tensor
    label: Tensor
    spacing: tuple[float, float, float]
    directions: tuple[str, str, str]

    @property
    def patient(self) -> str:
        """The name without phase: scans of one patient share it."""
        return SAME_PATIENT.sub("", self.name)

    @cached_property
    def steps_hu(self) -> Tensor:
        """The values that occur, in order."""
        return torch.unique(self.hu)

    @cached_property
    def from_real_mm(self) -> np.ndarray:
        """Distance of each voxel from the nearest annotated tumour."""
        real = (self.label == REAL).numpy()
        if not real.any():
            return np.full(real.shape, np.inf, np.float32)
        distance = ndimage.distance_transform_edt(~real, sampling=self.spacing)
        return np.asarray(distance, np.float32)


def liver_scans(
    folder: Path, annotations: Path | None = ANNOTATIONS, only: list[str] | None = None
) -> Iterator[Scan]:
    """Read NAME_ct.nii.gz with a NAME_label.nii.gz beside it or, first choice, in ``annotations``.

    Args:
        folder: holds the scans. Label 1 is the liver and 2 its tumours.
        annotations: holds more labels; None for those beside the scans alone.
        only: names of the scans to read; None for all that have a liver label.
    """
    labels = {path.name.split("_label.nii")[0]: path for path in folder.glob("*_label.nii*")}
    if annotations is not None:
        labels |= {p.name.split("_label.nii")[0]: p for p in annotations.glob("*_label.nii*")}
    cts = {path.name.split("_ct.nii")[0]: path for path in folder.glob("*_ct.nii*")}
    names = sorted(n for n in labels if n in cts and not n.startswith(OTHER_ORGANS))
    if missing := sorted(set(only or []) - set(names)):
        raise SystemExit(f"no scan with a liver label in {folder}: {', '.join(missing)}")
    for name in names:
        if only is None or name in only:
            yield _read(name, cts[name], labels[name])


def _read(name: str, ct: Path, labels: Path) -> Scan:
    scan: Any = nib.load(ct)
    label = torch.from_numpy(np.asarray(nib.load(labels).dataobj).astype(np.int16))
    if tuple(label.shape) != scan.shape:
        raise SystemExit(f"{labels} has the shape {tuple(label.shape)}, its scan {scan.shape}")
    directions = nib.aff2axcodes(scan.affine)
    if directions[2] not in "SI":
        raise SystemExit(f"the slices of {ct} must be axial, got axes {''.join(directions)}")
    if name.startswith("totalseg"):  # a map of organs, where 2 is the pancreas
        label[label != LIVER] = 0
    spacing: Any = tuple(float(s) for s in scan.header.get_zooms()[:3])
    box = bounding_box(label == LIVER, 0)
    if box is None:
        raise SystemExit(f"{labels} holds no liver (label {LIVER})")
    box = box.grown([math.ceil(MARGIN_MM / s) for s in spacing])
    part = box.within(Box.whole(label.shape)).slices
    hu = torch.from_numpy(np.asarray(scan.dataobj).astype(np.float32))[part].clone()
    return Scan(name, hu, label[part].clone(), spacing, directions)
