"""Whether an affine stems from one that stands for none, as libraries write by default.

MONAI and TorchIO give the identity to plain arrays, files that know no size have affines like it
(`default_affines`), and flips, crops and resampling then change them like a real affine. So the
size of voxels is unknown, whatever it says now. Three sources tell: the affine of the file that a
MetaTensor was read from, the first affine by what MONAI's transforms noted about themselves, and,
of the first affine, where the volume lies. What is unknown at first stays unknown, and what is
known stays known. It does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tumorsynth.affines import is_identity, to_array
from tumorsynth.default_affines import (
    ROUNDING,
    is_axis_aligned,
    is_whole,
    last_voxel,
    stands_for_none,
    turns_only,
)

AS_EXACT = 2e-3  # mm, between a file's affine and where MONAI's notes lead to
MAX_RESIZING = 1e-2  # of a voxel's size: an operation that changes it by less keeps it


def lost_affines(affine: Any, shape: Sequence[int], x: Any = None) -> list[bool]:
    """Return for each affine of a volume or batch whether it stems from one that stands for none.

    Args:
        affine: 4x4, or (B, 4, 4).
        shape: voxels along the three axes.
        x: the MetaTensor that it belongs to, if it does.
    """
    matrices = to_array(affine)
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    if len(shape) != 3 or matrices.shape[1:] != (4, 4) or not np.isfinite(matrices).all():
        return [False]  # no volume or no affine, which other checks refuse
    if not hasattr(x, "applied_operations"):
        return [stems_from_none(matrix, shape) for matrix in matrices]
    meta = getattr(x, "meta", None) or {}
    files = _of_each(to_array(meta.get("original_affine")), 2, len(matrices))
    sizes = _of_each(to_array(meta.get("spatial_shape")), 1, len(matrices))
    notes = list(x.applied_operations)
    if not any(isinstance(one, Sequence) for one in notes):  # of one sample, not of a batch
        notes = [notes] * len(matrices)
    if not len(files) == len(sizes) == len(notes) == len(matrices):  # cut from a batch
        return [any(stems_from_none(matrix, shape) for matrix in matrices)]
    return [
        _noted(matrix, shape, [one for one in note if isinstance(one, Mapping)], file, size)
        for matrix, note, file, size in zip(matrices, notes, files, sizes, strict=True)
    ]


def is_of_first_alone(x: Any) -> bool:
    """Return whether a batch holds one affine, which need not be that of all of its samples.

    MetaTensors that torch stacks keep the affine and the notes of the first. Only where these say
    that MONAI resampled it to a size of voxels, and changed that no more, will it have done so with
    the others.

    Args:
        x: a MetaTensor, or anything else.
    """
    notes = getattr(x, "applied_operations", None)
    if notes is None or x.ndim != 5 or len(x) < 2 or x.affine.ndim != 2:
        return False
    operations = [one for one in notes if isinstance(one, Mapping)]
    sizes = [one.get("orig_size") for one in operations] + [tuple(x.shape[-3:])]
    steps = list(zip(operations, sizes[:-1], sizes[1:], strict=True))
    for operation, before, after in reversed(steps):
        if _innermost(operation).get("class") == "SpatialResample":
            return False
        if _resizes_voxels(operation, before, after):
            return True
    return True


def _resizes_voxels(operation: Mapping[str, Any], before: Any, after: Any) -> bool:
    """Return whether an operation of MONAI, such as a zoom, made voxels of another size."""
    matrix, _ = _step(operation, before, after, ends=0)
    return bool((np.abs(np.linalg.norm(matrix, axis=0) - 1) > MAX_RESIZING).any())


def _of_each(values: np.ndarray, ndim: int, count: int) -> list[np.ndarray]:
    return list(values) if values.ndim > ndim else [values] * count


def stems_from_none(affine: np.ndarray, shape: Sequence[int], resampled: bool = True) -> bool:
    """Return whether a volume in memory lies where an array lies whose affine stood for none.

    Args:
        affine: 4x4.
        shape: voxels along the three axes.
        resampled: whether voxels may have got another size since, which keeps the centre.
    """
    if is_identity(affine):  # who knew a position in parts of a voxel knew the voxel
        return is_whole(affine[:3, 3]) or stands_for_none(affine, shape)
    return lies_by_default(affine, shape) or (resampled and _shares_centre(affine, shape))


def lies_by_default(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether a volume in memory is an array whose affine stood for none, or a part of it.

    Args:
        affine: 4x4. One that flips or permutes axes is possible, others are not.
        shape: voxels along the three axes.
    """
    return stands_for_none(affine, shape) or _lies_in_array(affine, shape)


def _lies_in_array(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether the voxels are some of those of an array that had the identity."""
    if not turns_only(affine[:3, :3]) or not is_whole(affine[:3, 3]):
        return False
    return bool((np.minimum(affine[:3, 3], last_voxel(affine, shape)) > -ROUNDING).all())


def _shares_centre(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether an array of 1 mm at the origin has this centre and, within a voxel, size."""
    linear = affine[:3, :3]
    if not is_axis_aligned(linear):
        return False
    first, last, sizes = affine[:3, 3], last_voxel(affine, shape), np.abs(linear).sum(1)
    voxels = np.abs(first + last) + 1
    rest = voxels - (np.abs(last - first) + sizes)
    return is_whole(voxels) and bool((rest > -ROUNDING).all() and (rest < sizes - ROUNDING).all())


def _noted(
    affine: np.ndarray,
    shape: Sequence[int],
    operations: Sequence[Mapping[str, Any]],
    file: np.ndarray,
    file_shape: np.ndarray,
) -> bool:
    """Return whether the affine before the operations that MONAI noted says no size of a voxel.

    Args:
        affine: 4x4, the present one.
        shape: voxels along the three axes.
        operations: MONAI's notes, the first operation first.
        file: the affine of the file that the volume was read from; no 4x4 without one.
        file_shape: voxels of that file along the three axes; no three numbers if unknown.
    """
    if _is_affine(file):
        known = file_shape.shape == (3,)
        if not stands_for_none(file, list(file_shape) if known else shape):
            return False
    aligned = any(_info(_innermost(one)).get("align_corners") is True for one in operations)
    for ends in range(aligned + 1):
        first, size = _first(affine, shape, operations, ends)
        if np.isnan(first[:3, 3]).any():
            lost = is_identity(first)
        else:
            lost = stems_from_none(first, size, resampled=False)
        if lost or (_is_affine(file) and _agree(first, file)):
            return True
    return False


def _agree(first: np.ndarray, file: np.ndarray) -> bool:
    """Return whether two affines are one, but for rounding and whole voxels of unknown crops."""
    apart = np.nan_to_num(first - file)
    apart[:3, 3] -= apart[:3, 3].round()
    return bool((np.abs(apart) < AS_EXACT).all())


def _first(
    affine: np.ndarray, shape: Sequence[int], operations: Sequence[Mapping[str, Any]], ends: int
) -> tuple[np.ndarray, Sequence[int]]:
    """Return affine and shape before the operations; an origin of NaN is unknown.

    Args:
        affine: after them.
        shape: after them.
        operations: MONAI's notes.
        ends: 1 if align_corners aligns the ends of affines too, as of MONAI 1.6.
    """
    sizes = [one.get("orig_size") for one in operations] + [tuple(shape)]
    linear, shift, last = np.eye(3), np.zeros(3), affine
    for operation, before, after in zip(operations, sizes[:-1], sizes[1:], strict=True):
        info = _info(_innermost(operation))
        known = to_array(info.get("src_affine", info.get("original_affine")))
        if _is_affine(known):
            last = known
            break
        step, offset = _step(operation, before, after, ends)
        if not turns_only(linear) or np.isfinite(offset).all():
            shift = shift + linear @ offset  # an unknown crop by whole voxels changes no answer
        linear = linear @ step
    first = np.eye(4)
    first[:3, :3] = last[:3, :3] @ np.linalg.pinv(linear)
    first[:3, 3] = last[:3, 3] - first[:3, :3] @ shift
    if not np.array_equal(linear, np.eye(3)):
        first = first.round(3)  # as exact as MONAI's matrices
    size: Any = sizes[0] if to_array(sizes[0]).shape == (3,) else shape
    return first, size


def _step(
    operation: Mapping[str, Any], before: Any, after: Any, ends: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and offset from voxels after an operation of MONAI to voxels before it.

    Args:
        operation: MONAI's note.
        before: the voxels along the three axes that it got.
        after: the voxels that it left.
        ends: voxels less to count where the operation aligned the ends.
    """
    try:
        matrix, offset = _matrix(operation, to_array(before), to_array(after), ends)
    except (IndexError, KeyError, TypeError, ValueError):  # another version's note
        return np.eye(3), np.full(3, np.nan)
    good = matrix.shape == (3, 3) and np.isfinite(matrix).all() and offset.shape == (3,)
    return (matrix, offset) if good else (np.eye(3), np.full(3, np.nan))


def _matrix(
    operation: Mapping[str, Any], before: np.ndarray, after: np.ndarray, ends: int
) -> tuple[np.ndarray, np.ndarray]:
    if operation.get("lazy_affine") is not None:
        lazy = to_array(operation["lazy_affine"])
        return lazy[:3, :3], lazy[:3, 3]
    inner = _innermost(operation)
    info = _info(inner)
    crop = _cropped(inner)
    offset: np.ndarray = np.zeros(3)
    matrix = np.eye(3)
    match inner.get("class"):
        case "Flip" if "axes" in info:
            axes = range(3) if info["axes"] is None else np.atleast_1d(info["axes"])
            for axis in axes:
                matrix[int(axis), int(axis)] = -1
        case "Rotate90" if "axes" in info:
            first, second = (int(axis) for axis in info["axes"])
            matrix[[first, second]] = matrix[[second, first]]
            matrix[second] *= -1
            matrix = np.linalg.matrix_power(matrix, int(info["k"]) % 4)
        case "Zoom" | "Resize" if info:
            after = to_array(_info(info, "padcrop").get("orig_size", after))
            less = ends if info.get("align_corners") is True else 0
            matrix = np.diag((before - less) / np.maximum(after - less, 1))
        case "Rotate":
            matrix = to_array(info["rot_mat"])[:3, :3]
        case "Affine" | "RandAffine":
            matrix, offset = to_array(info["affine"])[:3, :3], to_array(info["affine"])[:3, 3]
        case _:
            noted = {"cropped", "padded", "crop_info"} & info.keys() or np.array_equal(
                before, after
            )
            return matrix, crop if noted else np.full(3, np.nan)
    # all of these turn around the centre
    return matrix, (before - 1) / 2 + offset + matrix @ (crop - (after - 1) / 2)


def _cropped(operation: Mapping[str, Any]) -> np.ndarray:
    """Return how many voxels a note says were cut, less those that were put, at the low ends."""
    info = _info(operation)
    cropped, padded = info.get("cropped"), info.get("padded")
    voxels = np.zeros(3) if cropped is None else to_array(cropped)[:6:2]
    if padded is not None:
        voxels = voxels - to_array(padded)[1:4, 0]
    for key in ("crop_info", "pad_info", "padcrop"):
        if isinstance(info.get(key), Mapping):
            voxels = voxels + _cropped(info[key])
    return voxels


def _info(note: Mapping[str, Any], key: str = "extra_info") -> Mapping[str, Any]:
    info = note.get(key)
    return info if isinstance(info, Mapping) else {}


def _innermost(operation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the operation that a random transform of MONAI called."""
    inner = _info(operation)
    return _innermost(inner) if "class" in inner else operation


def _is_affine(matrix: np.ndarray) -> bool:
    return matrix.shape == (4, 4) and bool(np.isfinite(matrix).all())
