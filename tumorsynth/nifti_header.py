"""Where the voxels of a NIfTI file lie; a header whose sources contradict each other is refused.

A header has up to three sources: sform, a whole affine; qform, a rotation and an origin that take
the voxel sizes of pixdim; and pixdim alone. nibabel and this package prefer them in this order, ITK
and MONAI do otherwise, so that a contradiction means another voxel size in each tool. This module
imports neither nibabel nor torch before it is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tumorsynth.affines import directions_agree, sizes_agree, voxel_sizes
from tumorsynth.default_affines import stands_for_none

GEOMETRIES = ("sform", "qform", "pixdim")
MAX_ORIGIN_VOXELS = 0.5  # between sform and qform, whose quaternion is rounded to float32
UNITS = {1: "metres", 3: "micrometres"}  # of xyzt_units that are not mm; 0 is unknown


def require_nibabel() -> Any:
    """Import nibabel; if it is missing, the error says how to install it."""
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "NIfTI files need nibabel; install it with: pip install 'tumorsynth[io]'"
        ) from error
    return nibabel


def check_geometry(geometry: str | None) -> None:
    """Raise ValueError unless this names a source of a header, or is None."""
    if geometry is not None and geometry not in GEOMETRIES:
        raise ValueError(
            f"--geometry must be {', '.join(GEOMETRIES[:-1])} or {GEOMETRIES[-1]}, got "
            f"{geometry!r}; give one of them"
        )


def read_affine(name: str, header: Any, geometry: str | None = None) -> np.ndarray:
    """Return the affine of a NIfTI header, voxel to RAS mm.

    Args:
        name: of the file, for messages.
        header: nibabel's, as read.
        geometry: the source to take where several contradict each other: "sform", "qform", or
            "pixdim", which gives the sizes while the sform gives directions and origin.

    Raises:
        ValueError: for a contradiction without ``geometry``, for a source that the header does not
            have, and for sizes or directions that cannot be.
    """
    with np.errstate(all="ignore"):  # of numbers that a check refuses
        sources = _sources(header)
        affine = np.asarray(header.get_best_affine(), np.float64)
        found = _contradiction(header, **sources) or _wrong_unit(header, affine)
        if found is not None and geometry is not None:
            affine = _chosen(name, geometry, sources[geometry], affine)
        elif found is not None:
            raise ValueError(
                f"{_rule(name, found)}; choose with --geometry sform, qform or pixdim, or repair "
                "its header"
            )
        check_affine(name, affine)
    return affine


def check_header(name: str, header: Any) -> None:
    """Raise ValueError if the sources of a NIfTI header contradict each other."""
    with np.errstate(all="ignore"):
        found = _contradiction(header, **_sources(header))
    if found is not None:
        raise ValueError(f"{_rule(name, found)}; repair its header")


def _rule(name: str, found: str) -> str:
    return f"{name} must say one voxel size, orientation and origin in mm, but {found}"


def is_default(header: Any) -> bool:
    """Return whether a header says what libraries write that know neither voxel size nor position.

    It says 1 mm, and a place where `default_affines` puts arrays.
    """
    shape = [*header.get_data_shape()[:3], 1, 1, 1][:3]
    return stands_for_none(np.asarray(header.get_best_affine(), np.float64), shape)


def _sources(header: Any) -> dict[str, np.ndarray | None]:
    return {"sform": _sform(header), "qform": _qform(header), "pixdim": _pixdim(header)}


def _pixdim(header: Any) -> np.ndarray | None:
    """Return the voxel sizes of pixdim, or None where they are no sizes."""
    sizes = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    return sizes if np.isfinite(sizes).all() and (sizes > 0).all() else None


def _sform(header: Any) -> np.ndarray | None:
    if header["sform_code"] <= 0:
        return None
    return np.asarray(header.get_sform(), np.float64)


def _qform(header: Any) -> np.ndarray | None:
    """Return the qform, or None without one that can be read."""
    if header["qform_code"] <= 0 or _pixdim(header) is None:
        return None
    try:
        qform = np.asarray(header.get_qform(), np.float64)
    except Exception:  # nibabel's own types: a quaternion that is no rotation, a wrong qfac
        return None
    return qform if np.isfinite(qform).all() else None


def _contradiction(
    header: Any,
    sform: np.ndarray | None,
    qform: np.ndarray | None,
    pixdim: np.ndarray | None,
) -> str | None:
    """Return what an sform and another source of the header say differently, beyond rounding."""
    if sform is None or not np.isfinite(sform).all() or np.linalg.matrix_rank(sform[:3, :3]) < 3:
        return None  # no affine at all is refused elsewhere
    lengths = voxel_sizes(sform)
    # the slices of a tilted gantry are closer to each other than their first voxels
    distances = 1 / np.linalg.norm(np.linalg.inv(sform[:3, :3]), axis=1)
    if pixdim is not None and not all(
        sizes_agree(length, size) or sizes_agree(distance, size)
        for length, distance, size in zip(lengths, distances, pixdim, strict=True)
    ):
        return f"its sform has voxels of {_mm(lengths)} and its pixdim of {_mm(pixdim)}"
    if qform is None:
        return None
    closest = header.copy()
    closest.set_qform(sform, code=1)  # a qform cannot be sheared
    expected = closest.get_qform()
    if not directions_agree(expected, qform):
        axes = (m[:3, :3] / voxel_sizes(m) for m in (sform, qform))
        first, second = (a.round(3).tolist() for a in axes)
        return f"its sform has the axes {first} and its qform {second}"
    apart = np.linalg.pinv(expected[:3, :3]) @ (qform[:3, 3] - sform[:3, 3])
    if np.abs(apart).max() > MAX_ORIGIN_VOXELS:
        first, second = (tuple(m[:3, 3].round(3).tolist()) for m in (sform, qform))
        return f"its sform has the origin {first} and its qform {second}"
    return None


def _wrong_unit(header: Any, affine: np.ndarray) -> str | None:
    """Return what a header says that declares another unit than mm."""
    unit = UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        return None
    numbers = "x".join(f"{v:.4g}" for v in voxel_sizes(affine))
    return f"its header has voxels of {numbers} {unit} (xyzt_units)"


def _chosen(name: str, geometry: str, source: np.ndarray | None, best: np.ndarray) -> np.ndarray:
    """Return the affine of the source that the user chose."""
    if source is None:
        raise ValueError(
            f"--geometry {geometry} must name a source that the header has, but {name} has no "
            f"{geometry}; choose another"
        )
    if geometry != "pixdim":
        return source
    affine = best.copy()
    affine[:3, :3] *= source / voxel_sizes(best)
    return affine


def check_affine(name: str, affine: np.ndarray) -> None:
    """Raise ValueError, with the file's name, unless an affine can be used."""
    from tumorsynth.geometry import SPACING_RANGE_MM, frame_from_affine  # imports torch

    low, high = SPACING_RANGE_MM
    sizes = voxel_sizes(affine)
    if (
        np.isfinite(sizes).all()
        and (sizes > 0).all()
        and not (low <= sizes.min() <= sizes.max() <= high)
    ):
        unit = "metres, multiply" if sizes.max() < 1 else "micrometres, divide"
        raise ValueError(
            f"{name} must have voxels of {low:g} to {high:g} mm, but its header has {_mm(sizes)}; "
            f"if its affine is in {unit} it by 1000 and save it again"
        )
    try:
        frame_from_affine(affine)
    except ValueError as error:
        raise ValueError(
            f"{name} has no usable affine: its axes must be finite and linearly independent, got "
            f"{affine[:3].round(4).tolist()}; repair its header"
        ) from error


def _mm(sizes: np.ndarray) -> str:
    return "x".join(f"{v:.4g}" for v in sizes) + " mm"
