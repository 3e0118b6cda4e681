"""Whether an affine stems from the identity that libraries use where they know none.

MONAI and TorchIO give the identity to plain arrays, and their flips, crops and resampling then
change it like a real affine. So the size of its voxels is unknown, whatever it says now. Three
sources tell: the affine of the file that a MetaTensor was read from, what MONAI's transforms noted
about themselves, and where the volume lies: an array with the identity starts at voxel 0 and lies
on whole voxels, a scan lies around the scanner's centre. It does not import torch.
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
        (not _is_affine(file) or is_identity(file))
        and _noted(matrix, shape, [one for one in note if isinstance(one, Mapping)])
        for matrix, file, note in zip(matrices, files, notes, strict=True)
    ]


def stems_from_identity(affine: np.ndarray, shape: Sequence[int], resampled: bool = True) -> bool:
    """Return whether a volume lies where an array lies that got the identity.

    Args:
        affine: 4x4.
        shape: voxels along the three axes.
        resampled: whether voxels may have got another size since, which keeps the centre.
    """
    if is_identity(affine):
        return _whole(affine[:3, 3])
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
    """Return whether the affine was the identity before the operations that MONAI noted."""
    if not operations:
        return stems_from_identity(affine, shape, resampled=False)
    sizes = [one.get("orig_size") for one in operations[1:]] + [tuple(shape)]
    first, product, resampled = None, np.eye(3), False
    for operation, after in zip(operations, sizes, strict=True):
        info = _info(_innermost(operation))
        before = to_array(info.get("src_affine", info.get("original_affine")))
        if _is_affine(before) and first is None:
            first = _undo(before, product)
        step = _step(operation, after)
        product = product @ step
        resampled |= "src_affine" in info or not _turns_only(step)
    first = _undo(affine, product) if first is None else first
    if np.abs(first - np.eye(3)).max() > ROUNDING:
        return False
    if not resampled:
        return _whole(affine[:3, 3])  # who knew a position in parts of a voxel knew the voxel
    centre = affine[:3, :3] @ (np.asarray(shape) - 1) / 2 + affine[:3, 3]
    array = to_array(operations[0].get("orig_size"))
    return array.shape != (3,) or bool((centre > -1).all() and (centre < array).all())


def _undo(affine: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Return the linear part of an affine before operations with this product."""
    return affine[:3, :3] @ np.linalg.pinv(product)


def _step(operation: Mapping[str, Any], after: Any) -> np.ndarray:
    """Return the 3x3 matrix from voxels after an operation of MONAI to voxels before it.

    Args:
        operation: MONAI's note. Crops, and operations that we do not know, count as the identity.
        after: the voxels that it left along the three axes.
    """
    try:
        matrix = _matrix(operation, after)
    except (IndexError, KeyError, TypeError, ValueError):  # another version's note
        return np.eye(3)
    return matrix if matrix.shape == (3, 3) and np.isfinite(matrix).all() else np.eye(3)


def _matrix(operation: Mapping[str, Any], after: Any) -> np.ndarray:
    if operation.get("lazy_affine") is not None:
        return to_array(operation["lazy_affine"])[:3, :3]
    inner = _innermost(operation)
    info = _info(inner)
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
            after = _info(info, "padcrop").get("orig_size", after)
            matrix = np.diag(to_array(inner["orig_size"]) / np.maximum(to_array(after), 1))
        case "Rotate":
            matrix = to_array(info["rot_mat"])[:3, :3]
        case "Affine" | "RandAffine":
            matrix = to_array(info["affine"])[:3, :3]
    return matrix


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
