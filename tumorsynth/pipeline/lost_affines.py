"""Whether an affine stems from the identity that libraries use where they know none.

MONAI and TorchIO give the identity to plain arrays, and their flips, crops and resampling then
change it like a real affine. So the size of its voxels is unknown, whatever it says now. Three
sources tell: the affine of the file that a MetaTensor was read from, the first affine by what
MONAI's transforms noted about themselves, and, of the first affine, where the volume lies: an array
with the identity lies on whole voxels, a scan lies around the scanner's centre. What is unknown at
first stays unknown, and what is known stays known. It does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tumorsynth.affines import is_identity, to_array

ROUNDING = 1e-4  # of a matrix that several transforms multiplied; voxels, mm


def lost_affines(affine: Any, shape: Sequence[int], x: Any = None) -> list[bool]:
    """Return for each affine of a volume or batch whether it stems from the identity.

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
        return [stems_from_identity(matrix, shape) for matrix in matrices]
    file = to_array((getattr(x, "meta", None) or {}).get("original_affine"))
    files = [file] * len(matrices) if file.ndim < 3 else list(file)
    notes = list(x.applied_operations)
    if not any(isinstance(one, Sequence) for one in notes):  # of one sample, not of a batch
        notes = [notes] * len(matrices)
    if not len(files) == len(notes) == len(matrices):  # cut from a batch
        return [any(stems_from_identity(matrix, shape) for matrix in matrices)]
    return [
        (not _is_affine(file) or may_stand_for_none(file))
        and _noted(matrix, shape, [one for one in note if isinstance(one, Mapping)])
        for matrix, file, note in zip(matrices, files, notes, strict=True)
    ]


def may_stand_for_none(affine: np.ndarray) -> bool:
    """Return whether an affine is the identity but for whole voxels, as where none is known."""
    return is_identity(affine) and _whole(affine[:3, 3])


def stems_from_identity(affine: np.ndarray, shape: Sequence[int], resampled: bool = True) -> bool:
    """Return whether a volume lies where an array lies that got the identity.

    Args:
        affine: 4x4.
        shape: voxels along the three axes.
        resampled: whether voxels may have got another size since, which keeps the centre.
    """
    if is_identity(affine):
        return may_stand_for_none(affine)  # who knew a position in parts of a voxel knew the voxel
    return lies_in_array(affine, shape) or (resampled and _shares_centre(affine, shape))


def lies_in_array(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether the voxels are some of those of an array with the identity.

    Args:
        affine: 4x4. One that flips or permutes axes is possible, others are not.
        shape: voxels along the three axes.
    """
    if not _turns_only(affine[:3, :3]) or not _whole(affine[:3, 3]):
        return False
    return bool((np.minimum(affine[:3, 3], _last_voxel(affine, shape)) > -ROUNDING).all())


def _shares_centre(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether an array with the identity has this centre and, within a voxel, this size."""
    linear = affine[:3, :3]
    if not _is_axis_aligned(linear):
        return False
    first, last, sizes = affine[:3, 3], _last_voxel(affine, shape), np.abs(linear).sum(1)
    voxels = first + last + 1
    rest = voxels - (np.abs(last - first) + sizes)
    return _whole(voxels) and bool((rest > -ROUNDING).all() and (rest < sizes - ROUNDING).all())


def _last_voxel(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return affine[:3, 3] + affine[:3, :3] @ (np.asarray(shape) - 1)


def _noted(
    affine: np.ndarray, shape: Sequence[int], operations: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether the affine before the operations that MONAI noted says no size of a voxel."""
    aligned = any(_info(_innermost(one)).get("align_corners") is True for one in operations)
    return any(_first_is_lost(affine, shape, operations, ends) for ends in range(aligned + 1))


def _first_is_lost(
    affine: np.ndarray, shape: Sequence[int], operations: Sequence[Mapping[str, Any]], ends: int
) -> bool:
    """Return it, given whether align_corners aligns the ends of affines too, as of MONAI 1.6."""
    sizes = [one.get("orig_size") for one in operations] + [tuple(shape)]
    linear, shift, last = np.eye(3), np.zeros(3), affine
    for operation, before, after in zip(operations, sizes[:-1], sizes[1:], strict=True):
        info = _info(_innermost(operation))
        known = to_array(info.get("src_affine", info.get("original_affine")))
        if _is_affine(known):
            last = known
            break
        step, offset = _step(operation, before, after, ends)
        if not _turns_only(linear) or np.isfinite(offset).all():
            shift = shift + linear @ offset  # an unknown crop by whole voxels changes no answer
        linear = linear @ step
    first = np.eye(4)
    first[:3, :3] = last[:3, :3] @ np.linalg.pinv(linear)
    first[:3, 3] = last[:3, 3] - first[:3, :3] @ shift
    if not np.array_equal(linear, np.eye(3)):
        first = first.round(3)  # as exact as MONAI's matrices
    size: Any = sizes[0] if to_array(sizes[0]).shape == (3,) else shape
    if np.isnan(first[:3, 3]).any():
        return is_identity(first)
    return stems_from_identity(first, size, resampled=False)


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


def _is_axis_aligned(linear: np.ndarray) -> bool:
    """Return whether a 3x3 matrix permutes, flips and scales axes, and no more."""
    used = np.abs(linear) > ROUNDING
    return bool((used.sum(0) == 1).all() and (used.sum(1) == 1).all())


def _turns_only(linear: np.ndarray) -> bool:
    """Return whether a 3x3 matrix permutes and flips axes, and no more."""
    return _is_axis_aligned(linear) and bool(np.abs(np.abs(linear).sum(1) - 1).max() < ROUNDING)


def _whole(values: np.ndarray) -> bool:
    return bool((np.abs(values - np.round(values)) < ROUNDING).all())
