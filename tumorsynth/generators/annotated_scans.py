"""Read annotated scans, given as files or arrays, for a bank of lesions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tumorsynth.affines import MAX_SHIFT_VOXELS, is_identity, largest_shift, to_array
from tumorsynth.geometry import Frame, frame_from_affine, frame_from_spacing
from tumorsynth.intensity import Intensity
from tumorsynth.intensity_check import check_intensity
from tumorsynth.itk_formats.reading import read_itk
from tumorsynth.label_values import round_labels
from tumorsynth.nifti_header import read_affine, require_nibabel

EXAMPLE = 'for example [("case_ct.nii.gz", "case_label.nii.gz")], or (image, label, spacing)'


class AnnotatedScan(NamedTuple):
    """A scan in HU (X, Y, Z) with its label map, on the CPU."""

    name: str
    hu: Tensor
    label: Tensor
    frame: Frame


def read_scans(scans: Any, intensity: Intensity) -> Iterator[AnnotatedScan]:
    """Yield annotated scans, one at a time in memory.

    Args:
        scans: pairs of files (ct, label), NIfTI, NRRD, MetaImage or a folder of DICOM slices; or
            triples of arrays (image, label, spacing or affine), which MetaTensors may leave out.
            Arrays are (X, Y, Z) or (1, X, Y, Z). An `AnnotatedScan` passes through.
        intensity: what the values of images mean.

    Raises:
        TypeError: for anything else.
        ValueError: for files and arrays that do not go together, an image that is not in the scale
            of ``intensity``, or voxels of unknown size.
    """
    if isinstance(scans, str | os.PathLike | Tensor | np.ndarray) or not hasattr(scans, "__iter__"):
        raise TypeError(f"scans must be a list, got {type(scans).__name__}; pass {EXAMPLE}")
    for number, scan in enumerate(scans):
        if isinstance(scan, str | os.PathLike) or not isinstance(scan, Sequence):
            raise TypeError(f"scan {number} must be a tuple, got {scan!r:.60}; pass {EXAMPLE}")
        if isinstance(scan, AnnotatedScan):
            yield scan
        elif len(scan) == 2 and all(isinstance(part, str | os.PathLike) for part in scan):
            yield _of_files(Path(scan[0]), Path(scan[1]), intensity)
        elif len(scan) in (2, 3):
            yield _of_arrays(f"scan {number}", *scan, intensity=intensity)
        else:
            raise TypeError(f"scan {number} must be a pair or a triple, got {len(scan)} parts; "
                            f"pass {EXAMPLE}")  # fmt: skip


def _of_files(ct: Path, label: Path, intensity: Intensity) -> AnnotatedScan:
    values, affine = _read(ct)
    map_, label_affine = _read(label)
    if values.shape == map_.shape:
        shift = largest_shift(affine, label_affine, values.shape)
        if shift > MAX_SHIFT_VOXELS:
            raise ValueError(
                f"{ct.name} and {label.name} must share one grid, but their affines differ by up "
                f"to {shift:.2g} voxels; resample the label onto the CT"
            )
    return make_scan(ct.name, values, map_, frame_from_affine(affine), intensity)


def _of_arrays(
    name: str, image: Any, label: Any, grid: Any = None, *, intensity: Intensity
) -> AnnotatedScan:
    if grid is None:
        grid = getattr(image, "affine", None)
        if grid is None or is_identity(to_array(grid)):
            raise ValueError(
                f"{name} must say how large its voxels are, got an image without an affine; pass "
                "(image, label, spacing) with spacing=(0.8, 0.8, 2.5), or its affine"
            )
    shape = tuple(np.shape(grid))
    frame = frame_from_affine(grid) if shape == (4, 4) else frame_from_spacing(grid)
    values, map_ = (np.asarray(torch.as_tensor(x).detach().cpu()) for x in (image, label))
    return make_scan(name, _volume(values), _volume(map_), frame, intensity)


def make_scan(
    name: str, values: np.ndarray, label: np.ndarray, frame: Frame, intensity: Intensity
) -> AnnotatedScan:
    """Check an image and its label map, and convert the image to HU.

    Args:
        name: of the scan, for messages and cards.
        values: (X, Y, Z).
        label: the same shape.
        frame: how the axes lie in the patient.
        intensity: what the values mean.

    Raises:
        ValueError: for two shapes, values that cannot mean that, or labels that are not whole.
    """
    if values.ndim != 3 or values.shape != label.shape:
        raise ValueError(
            f"image and label of {name} must have one shape (X, Y, Z), got {values.shape} and "
            f"{label.shape}; pass one scan without further channels, and its label"
        )
    if values.size and values.min() == values.max():
        raise ValueError(
            f"the image of {name} must show tissue, but every voxel is {values.flat[0]:g}; export "
            "it again"
        )
    image = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    try:
        check_intensity(image, intensity)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        whole = torch.from_numpy(round_labels(label).astype(np.int32))
    except ValueError as error:
        raise ValueError(
            f"the label of {name} must hold whole numbers, got {error}; resample labels with "
            "nearest neighbours, and do not scale them"
        ) from error
    return AnnotatedScan(name, intensity.to_hu(image), whole, frame)


def _volume(values: np.ndarray) -> np.ndarray:
    while values.ndim > 3 and values.shape[0] == 1:
        values = values[0]
    return values


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the values and the affine of a file, or of a folder of DICOM slices."""
    if (read := read_itk(path)) is not None:
        return read.stored, read.affine
    nibabel = require_nibabel()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; correct its path")
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
    except Exception as error:
        raise ValueError(
            f"{path.name} must be a NIfTI file, but cannot be read: {error}; export it again"
        ) from error
    if isinstance(image.header, nibabel.Nifti1Header):
        affine = read_affine(path.name, image.header)
    else:
        affine = np.asarray(image.affine, np.float64)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return values, affine
