"""Read and write NIfTI files so that unchanged voxels stay bit-identical.

nibabel returns scaled floats and chooses a new scale when it saves. This module keeps the stored
numbers and converts only the voxels that changed. The affine and the header stay as they were.
"""

from __future__ import annotations

import errno
import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.nifti_header import check_geometry, read_affine, require_nibabel
from tumorsynth.scans.file_kinds import check_is_file
from tumorsynth.scans.opening import open_nifti
from tumorsynth.scans.volume import Volume


@dataclass(frozen=True)
class Reading:
    """What to do where files contradict themselves or each other.

    Args:
        geometry: the source of a header to take: "sform", "qform" or "pixdim". None refuses a
            header whose sources contradict each other.
        same_grid: whether voxel lies on voxel, whatever the affines of CT and label say.
    """

    geometry: str | None = None
    same_grid: bool = False

    def __post_init__(self) -> None:
        check_geometry(self.geometry)


class _Truncated(Exception):
    """The header declares more voxels than the file can hold."""


def _check_declared_size(header: Any, max_bytes: int) -> None:
    """Raise _Truncated before allocating."""
    try:
        size = header.get_data_dtype().itemsize
    except KeyError:  # an unknown dtype, which nibabel reports
        return
    if math.prod(map(int, header.get_data_shape())) * size > max_bytes:
        raise _Truncated


def read_volume(path: Path, reading: Reading = Reading()) -> Volume:  # noqa: B008 (frozen)
    """Read a NIfTI file completely, including the checksum at the end of a gzip.

    What counts is the content, not the name: plain or gzipped, once or twice, one file or a pair of
    .hdr and .img, with any extension.

    Args:
        path: the file.
        reading: what to do where its header contradicts itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not NIfTI, is truncated or damaged, has more than three axes, no
            voxels, complex numbers, no usable affine, or several that contradict each other.
    """
    nibabel = require_nibabel()
    path = Path(path)
    check_is_file(path)
    name = path.name
    try:
        # nibabel repairs small faults of a header, and logs them on stderr
        with open_nifti(path) as opened, nibabel.imageglobals.LoggingOutputSuppressor():
            file = opened.file
            kind = nibabel.Nifti1Image if opened.version == 1 else nibabel.Nifti2Image
            try:
                scale = kind.header_class.from_fileobj(file, check=False)
                _check_declared_size(scale, opened.max_bytes)
                file.seek(0)
                image = kind.from_stream(file)
                stored = np.asarray(image.dataobj.get_unscaled())
            except (
                nibabel.filebasedimages.ImageFileError,
                nibabel.spatialimages.HeaderDataError,
                nibabel.wrapstruct.WrapStructError,
                ValueError,  # from numpy, for impossible sizes
                OverflowError,
                MemoryError,
            ) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{name} is not a readable NIfTI file: {reason}; export it again"
                ) from error
            while file.read(1 << 20):  # gzip checks its sum only at the end
                pass
    except _Truncated:
        raise ValueError(f"{name} is cut short or damaged; copy it again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the disk's own errors, not a bad offset
            raise
        raise ValueError(f"{name} is cut short or damaged; copy it again") from error
    # nibabel drops the stored scale; keep it, to write the same one
    for field in ("scl_slope", "scl_inter"):
        image.header[field] = scale[field]

    if stored.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must hold real numbers, got dtype {stored.dtype}; convert it first"
        )
    if stored.ndim > 3 and all(n == 1 for n in stored.shape[3:]):
        stored = stored.reshape(stored.shape[:3])
    if stored.ndim != 3 or stored.size == 0:
        raise ValueError(
            f"{name} must be one 3-D image, got shape {_times(stored.shape)}; "
            "split a series into one file per image"
        )
    lengths = [float(v) for v in scale["pixdim"][1:4]]
    if scale["sform_code"] <= 0 and not all(0 < abs(v) < math.inf for v in lengths):
        raise ValueError(  # nibabel would assume 1 mm
            f"{name} has no usable voxel size: its header must hold one in mm, got "
            f"{_times(lengths)}; repair its header"
        )
    raw = image.header.copy()
    raw["pixdim"][1:4] = np.abs(scale["pixdim"][1:4])  # where it is 0, nibabel puts 1
    affine = read_affine(name, raw, reading.geometry)
    proxy = image.dataobj
    return Volume(name, stored, float(proxy.slope), float(proxy.inter), affine, image.header)


def read_header(path: Path) -> Any:
    """Read the header of a NIfTI file alone, as nibabel's object."""
    nibabel = require_nibabel()
    with open_nifti(path) as opened:
        kind = nibabel.Nifti1Header if opened.version == 1 else nibabel.Nifti2Header
        return kind.from_fileobj(opened.file, check=False)


def _times(numbers: Any) -> str:
    return "x".join(f"{n:g}" for n in numbers)


def write_volume(path: Path, like: Volume, stored: np.ndarray) -> None:
    """Write stored numbers with the affine, dtype, scale and header of another volume.

    The file appears complete or not at all.

    Args:
        path: the file; compressed if its name ends in .gz.
        like: the volume that was read.
        stored: (X, Y, Z), in the numbers of ``like.stored``.
    """
    nibabel = require_nibabel()
    is_nifti2 = isinstance(like.header, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
    shape = like.header.get_data_shape()
    # not like.affine: of a header that contradicts itself, another source may have been chosen
    image = kind(stored.reshape(shape), like.header.get_best_affine(), like.header)
    image.set_data_dtype(stored.dtype)
    # given a scale, nibabel writes the numbers unchanged
    scale = like.header["scl_slope"], like.header["scl_inter"]
    slope, inter = like.header.get_slope_inter()
    if not np.isfinite(scale).all() or (slope or 1, inter or 0) != (like.slope, like.inter):
        scale = like.slope, like.inter
    image.header["scl_slope"], image.header["scl_inter"] = scale

    def write(file: BinaryIO) -> None:
        if path.suffix != ".gz":
            image.to_stream(file)
            return
        # without name and time, equal volumes give equal files
        with gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as zipped:
            image.to_stream(zipped)

    write_atomic(path, write)


def new_volume(name: str, values: np.ndarray, affine: np.ndarray) -> Volume:
    """Make a volume from an array (X, Y, Z) of any real dtype, as if read from a file."""
    image = require_nibabel().Nifti1Image(values, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm", "sec")
    return Volume(name, values, 1.0, 0.0, np.asarray(affine, np.float64), image.header)
