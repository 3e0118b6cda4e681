"""Read any of these formats by what the file is, whatever its name."""

from __future__ import annotations

from pathlib import Path

from tumorsynth.itk_formats.dicom import read_series, refuse_single_slice
from tumorsynth.itk_formats.images import ItkImage, read_image
from tumorsynth.itk_formats.recognize import DICOM, format_of


def read_itk(path: Path) -> ItkImage | None:
    """Read an NRRD or MetaImage file, or a folder of DICOM slices.

    Returns:
        The volume, or None if the path is none of these.

    Raises:
        ModuleNotFoundError: without SimpleITK.
        ValueError: if it is damaged, or does not say where its voxels lie.
    """
    if not (path.is_file() or path.is_dir()):
        return None
    format_ = format_of(path)
    if format_ is None:
        return None
    if format_ != DICOM:
        return read_image(path, format_)
    if not path.is_dir():
        refuse_single_slice(path)
    return read_series(path)
