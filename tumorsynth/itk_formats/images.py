"""Read and write NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) files.

ITK counts mm to the left and to the back (LPS), this package to the right and to the front (RAS).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.affines import voxel_sizes
from tumorsynth.itk_formats.headers import check_header
from tumorsynth.itk_formats.recognize import quiet_simpleitk
from tumorsynth.nifti_header import check_affine

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SEPARATE_VOXELS = (".mhd", ".nhdr")  # the voxels are in a file of their own
SHEAR_ROUNDING = 1e-4  # cosine between two axes that counts as a right angle
# Keys that ITK makes itself, and the names of the segments of a .seg.nrrd, which lack the tumour.
DROPPED_KEYS = ("ITK_", "NRRD_", "Segment", "Modality")


@dataclass(frozen=True)
class ItkImage:
    """A volume as SimpleITK read it.

    Attributes:
        stored: (X, Y, Z), any real dtype.
        affine: (4, 4) float64, voxel to mm (RAS).
        metadata: further entries of the header, which are written back; None of DICOM.
    """

    stored: np.ndarray
    affine: np.ndarray
    metadata: dict[str, str] | None = None


def read_image(path: Path, format_: str) -> ItkImage:
    """Read an NRRD or MetaImage file.

    Args:
        path: the file; of a pair, its header.
        format_: "NRRD" or "MetaImage".

    Raises:
        ValueError: if it is damaged, has several channels or more than three axes, or a header
            that does not say where its voxels lie.
    """
    name = path.name
    with quiet_simpleitk() as sitk:
        check_header(path, format_)
        try:
            image = _reader(sitk, path, format_).Execute()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rpartition("_read: ")[2]
            raise ValueError(
                f"{name} is cut short or damaged ({' '.join(reason.split())[:200]}); copy it again"
            ) from error
        channels = image.GetNumberOfComponentsPerPixel()
        size = image.GetSize()
        if channels > 1 or len(size) < 3 or any(n != 1 for n in size[3:]):
            words = f"shape {'x'.join(map(str, size))}"
            words += f" with {channels} channels" if channels > 1 else ""
            raise ValueError(
                f"{name} must be one 3-D image, got {words}; write one channel into a file of its "
                "own"
            )
        affine = _affine_of(image)
        check_affine(name, affine)
        stored = sitk.GetArrayFromImage(image).reshape(size[2::-1]).transpose(2, 1, 0)
        metadata = {
            key: image.GetMetaData(key)
            for key in image.GetMetaDataKeys()
            if not key.startswith(DROPPED_KEYS)
        }
    return ItkImage(stored, affine, metadata)


def read_grid(path: Path, format_: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return affine and shape of a file that can be read, without reading its voxels."""
    with quiet_simpleitk() as sitk:
        reader = _reader(sitk, path, format_)
        reader.ReadImageInformation()
        return _affine_of(reader), reader.GetSize()[:3]


def _reader(sitk: Any, path: Path, format_: str) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[format_])
    return reader


def _affine_of(image: Any) -> np.ndarray:
    """Return the RAS affine of an image or a reader; of axes after the third nothing."""
    dimension = len(image.GetSize())
    direction = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    return lps_affine(direction, image.GetSpacing()[:3], image.GetOrigin()[:3])


def lps_affine(direction: Any, spacing: Any, origin: Any) -> np.ndarray:
    """Return the RAS affine (4, 4) of ITK's direction, spacing and origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, float) * np.asarray(spacing, float)
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine


def write_image(path: Path, image: ItkImage) -> None:
    """Write a volume; the format is that of the path's suffix.

    The file appears complete or not at all. Voxels in a file of their own (.mhd, .nhdr) come first.

    Args:
        path: ends in .nrrd, .nhdr, .mha or .mhd.
        image: the volume.

    Raises:
        ValueError: for a sheared affine, which these formats cannot express for all readers.
    """
    sizes = voxel_sizes(image.affine)
    direction = (LPS_TO_RAS @ image.affine)[:3, :3] / sizes
    if np.abs(direction.T @ direction - np.eye(3)).max() > SHEAR_ROUNDING:
        raise ValueError(
            f"{path.name} needs axes at right angles, but the scan is sheared (a tilted gantry); "
            "give the scan as NIfTI, or resample it"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a dead process of the same id
    temporary.mkdir()
    try:
        with quiet_simpleitk() as sitk:
            made = sitk.GetImageFromArray(image.stored.transpose(2, 1, 0))
            made.SetDirection(direction.ravel().tolist())
            made.SetSpacing(sizes.tolist())
            made.SetOrigin((LPS_TO_RAS @ image.affine)[:3, 3].tolist())
            for key, value in (image.metadata or {}).items():
                made.SetMetaData(key, value)
            compressed = path.suffix.lower() not in SEPARATE_VOXELS
            try:
                sitk.WriteImage(made, os.fspath(temporary / path.name), compressed)
            except RuntimeError as error:
                raise OSError(f"{path} could not be written: {error}") from error
        written = sorted(temporary.iterdir(), key=lambda file: file.name == path.name)
        for file in written:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
