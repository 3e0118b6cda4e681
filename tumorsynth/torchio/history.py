"""What TorchIO 1's history of a subject tells about an affine that was never known.

TorchIO gives the identity to tensors without an affine. The history holds what was done since, so
that the identity's own way can be followed: if it ends at the affine that the image has now, that
affine says nothing about the size of a voxel, unless the image's file had another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tumorsynth.pipeline.lost_affines import (
    ROUNDING,
    lies_in_array,
    may_stand_for_none,
    stems_from_identity,
)

# positive direction of an axis: its row in RAS and its sign
_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}

_MOVES = ("Crop", "Pad", "ToCanonical", "ToOrientation", "Transpose")  # with Resample

Step = tuple[str, Mapping[str, Any]]  # the name of a transform and its arguments


def stems_from_default(
    affine: np.ndarray,
    shape: Sequence[int],
    history: Sequence[Step],
    read: Callable[[], np.ndarray | None],
) -> bool:
    """Return whether an image's affine stems from the identity of a tensor without one.

    Args:
        affine: 4x4.
        shape: voxels along the three axes.
        history: of the subject, ``subject.applied_transforms``.
        read: returns the affine of the file that the image comes from, None if there is none.
    """
    resamplings = [step for step in history if _resamples(step)]
    onto_image = any(_spacing(arguments["target"]) is None for _, arguments in resamplings)
    if onto_image or not (resamplings or any(name in _MOVES for name, _ in history)):
        lost = stems_from_identity(affine, shape, resampled=onto_image)
    elif np.abs((way := _follow(history)).linear - affine[:3, :3]).max() < ROUNDING:
        if (file := read()) is not None:
            return may_stand_for_none(file)
        lost = (not resamplings and lies_in_array(affine, shape)) or _fits(affine, shape, way)
    else:
        lost = not resamplings and lies_in_array(affine, shape)
    return lost and ((file := read()) is None or may_stand_for_none(file))


class _Way(NamedTuple):
    """What a history makes of an identity; vectors are along the patient's axes."""

    linear: np.ndarray
    moved: np.ndarray  # the centre
    steps: list[tuple[np.ndarray, np.ndarray | None]]  # voxels added, or the new size of one


def _follow(history: Sequence[Step]) -> _Way:
    linear, moved = np.eye(3), np.zeros(3)
    steps: list[tuple[np.ndarray, np.ndarray | None]] = []
    for name, arguments in history:
        if name in ("Crop", "Pad"):
            bounds = _bounds(arguments["cropping" if name == "Crop" else "padding"])
            bounds = -bounds if name == "Crop" else bounds
            low, high = bounds[::2], bounds[1::2]
            moved += linear @ (high - low) / 2
            steps.append(((linear != 0) @ (low + high), None))
        elif name in ("ToCanonical", "ToOrientation"):
            linear = _oriented(linear, arguments.get("orientation", "RAS"))
        elif name == "Transpose":
            linear = linear[:, ::-1]
        elif _resamples((name, arguments)):
            target = _spacing(arguments["target"])
            linear = np.sign(linear) * target
            steps.append((np.zeros(3), np.abs(linear).sum(1)))
    return _Way(linear, moved, steps)


def _fits(affine: np.ndarray, shape: Sequence[int], way: _Way) -> bool:
    """Return whether a history takes an array at voxel 0 to this place and shape.

    No step but a crop and a pad moves the centre, so that these tell how many voxels it had.
    """
    linear, moved, steps = way
    centre = affine[:3, 3] + affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    voxels = 2 * (centre - moved) + 1
    if np.abs(voxels - voxels.round()).max() > ROUNDING or voxels.min() < 1 - ROUNDING:
        return False
    voxels, sizes = voxels.round(), np.ones(3)
    for added, new_sizes in steps:
        voxels = voxels + added
        if new_sizes is not None:  # as TorchIO rounds
            voxels = np.where(voxels == 1, 1, np.floor(voxels * sizes / new_sizes))
            sizes = new_sizes
    return bool((voxels == (linear != 0) @ np.asarray(shape)).all())


def _resamples(step: Step) -> bool:
    """Return whether a step changes the affine by resampling, for images and labels alike."""
    name, arguments = step
    return name == "Resample" and not arguments.get("scalars_only")


def _spacing(target: Any) -> np.ndarray | None:
    """Return the target of a Resample as three sizes in mm, None if it is another image."""
    try:
        sizes = np.asarray(target, dtype=float)
    except (TypeError, ValueError):
        return None
    return np.broadcast_to(sizes, 3) if sizes.shape in ((), (3,)) else None


def _bounds(given: Any) -> np.ndarray:
    """Return the voxels of a Crop or Pad: before and after along each axis."""
    bounds = np.atleast_1d(np.asarray(given, dtype=float))
    return np.repeat(bounds, 2) if len(bounds) == 3 else np.broadcast_to(bounds, 6)


def _oriented(linear: np.ndarray, orientation: str) -> np.ndarray:
    """Return the matrix with its columns reordered and flipped to an orientation like "LPS"."""
    sizes = np.abs(linear).sum(1)
    out = np.zeros((3, 3))
    for column, letter in enumerate(orientation.upper()):
        row, sign = _LETTERS[letter]
        out[row, column] = sign * sizes[row]
    return out
