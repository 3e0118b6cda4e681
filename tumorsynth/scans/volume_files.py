"""Read and write the volumes of scans, in whichever format: NIfTI, NRRD, MetaImage, DICOM in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.affines import MAX_SHIFT_VOXELS, largest_shift, voxel_sizes
from tumorsynth.atomic_writes import copy_file
from tumorsynth.default_affines import stands_for_none
from tumorsynth.itk_formats.headers import voxels_are_elsewhere
from tumorsynth.itk_formats.images import ItkImage, read_grid, write_image
from tumorsynth.itk_formats.reading import read_itk
from tumorsynth.itk_formats.recognize import DICOM, format_of
from tumorsynth.nifti_header import is_default, require_nibabel
from tumorsynth.scans import nifti
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.volume import Volume

SIZE_ROUNDING, AXIS_ROUNDING = 1e-4, 1e-3  # relative; decide only which words a message uses
KEPT_SUFFIXES = re.compile(r"\.(nrrd|nhdr|mha|mhd)$", re.I)


def read_volume(path: Path, reading: Reading = Reading()) -> Volume:  # noqa: B008 (frozen)
    """Read a file, or a folder of DICOM slices; what counts is the content, not the name.

    Args:
        path: NIfTI, NRRD or MetaImage, or a folder of DICOM slices.
        reading: what to do where the header of a NIfTI contradicts itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the format needs SimpleITK, which is not installed.
        ValueError: if the file is damaged, or its header does not say where its voxels lie.
    """
    path = Path(path)
    image = read_itk(path)
    if image is None:
        return nifti.read_volume(path, reading)
    name = path.name or path.resolve().name
    return Volume(name, image.stored, 1.0, 0.0, image.affine, image.metadata)


def written_suffix(name: str) -> str:
    """Return the suffix of the file that a volume of this file name is written back to."""
    found = KEPT_SUFFIXES.search(name)
    return found.group().lower() if found else ".nii.gz"


def write_volume(path: Path, like: Volume, stored: np.ndarray) -> None:
    """Write stored numbers with the geometry and the header of another volume.

    The file appears complete or not at all.

    Args:
        path: its suffix, as from `written_suffix`, decides the format.
        like: the volume that was read.
        stored: (X, Y, Z), in the numbers of ``like.stored``.
    """
    is_nifti = _is_nifti(like)
    if KEPT_SUFFIXES.search(path.name):
        values = stored
        if like.is_scaled:
            values = (stored * like.slope + like.inter).astype(np.float32)
        write_image(path, ItkImage(values, like.affine, None if is_nifti else like.header))
    elif is_nifti:
        nifti.write_volume(path, like, stored)
    else:
        nifti.write_volume(path, nifti.new_volume(like.name, stored, like.affine), stored)


def copy_volume(source: Path, target: Path) -> None:
    """Copy a volume: byte by byte, where one file holds it and the target has its suffix."""
    suffix = ".nii" if target.suffix == ".nii" else written_suffix(target.name)
    format_ = format_of(source)
    if source.name.lower().endswith(suffix) and (
        format_ is None or not voxels_are_elsewhere(source, format_)
    ):
        copy_file(source, target)
    else:
        volume = read_volume(source)
        write_volume(target, volume, volume.stored)


def read_pair(
    ct: Path,
    label: Path,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> tuple[Volume, Volume]:
    """Read a CT and its label map; raise ValueError if they do not share one grid."""
    image, mask = read_volume(ct, reading), read_volume(label, reading)
    check_same_grid(image, mask, reading=reading)
    return image, mask


def lacks_geometry(volume: Volume) -> bool:
    """Whether a header says what libraries write that know neither voxel size nor position."""
    if _is_nifti(volume):
        return is_default(volume.header)
    is_dicom = volume.header is None
    return not is_dicom and stands_for_none(volume.affine, volume.stored.shape)


def file_lacks_geometry(path: Path) -> bool:
    """`lacks_geometry` of a file that can be read, without its voxels."""
    format_ = format_of(path)
    if format_ is None:
        return is_default(nifti.read_header(path))
    return format_ != DICOM and stands_for_none(*read_grid(path, format_))


def _is_nifti(volume: Volume) -> bool:
    return volume.header is not None and not isinstance(volume.header, dict)


def check_same_grid(
    image: Volume,
    label: Volume,
    what_they_are: str = "CT and label",
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> None:
    """Raise ValueError if two grids differ in shape, or put a voxel at different places.

    Args:
        image: the first volume.
        label: the second volume.
        what_they_are: "FIRST and SECOND", for the message.
        reading: whether voxel lies on voxel.
    """
    first, second = what_they_are.split(" and ")
    what = fix = ""
    if image.stored.shape != label.stored.shape:
        what = f"shape {_times(image.stored.shape)} against {_times(label.stored.shape)} voxels"
    elif not reading.same_grid:
        shift = largest_shift(image.affine, label.affine, image.stored.shape)
        if shift > MAX_SHIFT_VOXELS:
            what = f"{_affine_difference(image.affine, label.affine)}, by up to {shift:.2g} voxels"
            fix = ", or add --same-grid if voxel lies on voxel"
    if what:
        raise ValueError(
            f"{what_they_are} must share one grid, but {image.name} and {label.name} differ in "
            f"{what}; resample the {second} onto the {first}{fix}"
        )


def _affine_difference(first: np.ndarray, second: np.ndarray) -> str:
    sizes, others = voxel_sizes(first), voxel_sizes(second)
    if not np.allclose(sizes, others, rtol=SIZE_ROUNDING, atol=0):
        return f"affine: spacing {_times(sizes.round(4))} against {_times(others.round(4))} mm"
    if not np.allclose(first[:3, :3] / sizes, second[:3, :3] / others, atol=AXIS_ROUNDING):
        axcodes = require_nibabel().aff2axcodes
        codes = ["".join(axcodes(a)) for a in (first, second)]
        return f"affine: orientation ({codes[0]} against {codes[1]}, or a rotation between them)"
    origin = ["(" + ", ".join(f"{v:.6g}" for v in a[:3, 3]) + ")" for a in (first, second)]
    return f"affine: origin {origin[0]} against {origin[1]} mm"


def _times(numbers: Any) -> str:
    return "x".join(f"{n:g}" for n in numbers)
