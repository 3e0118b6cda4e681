"""What TorchIO 1's history of a subject tells about an affine that was never known.

TorchIO gives the identity to tensors without an affine, and ITK writes files with one like it. The
history holds what was done since, so that its way can be followed: if it ends at the affine that
the image has now, that affine says nothing about the size of a voxel, unless the file had another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tumorsynth.default_affines import ROUNDING, is_axis_aligned, stands_for_none
from tumorsynth.pipeline.lost_affines import lies_by_default, stems_from_none

# positive direction of an axis: its row in RAS and its sign
_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}

_MOVES = ("Crop", "Pad", "ToCanonical", "ToOrientation", "Transpose")  # with Resample

Step = tuple[str, Mapping[str, Any]]  # the name of a transform and its arguments
Place = tuple[np.ndarray, Sequence[int]]  # a volume's affine and shape

_FLIPS = [np.diag(signs) for signs in itertools.product((1.0, -1.0), repeat=3)]


def stems_from_default(
    affine: np.ndarray,
    shape: Sequence[int],
    history: Sequence[Step],
    read: Callable[[], Place | None],
) -> bool:
    """Return whether an image's affine stems from one that stands for none.

    Args:
        affine: 4x4.
        shape: voxels along the three axes.
        history: of the subject, ``subject.applied_transforms``.
        read: returns affine and shape of the file that the image comes from, None if there is none.
    """
    linear = affine[:3, :3]
    resamplings = [step for step in history if _resamples(step)]
    borrowed = any(_borrows(step) for step in history)
    if borrowed or not (resamplings or any(name in _MOVES for name, _ in history)):
        lost = stems_from_none(affine, shape, resampled=borrowed)
        return lost and ((file := read()) is None or stands_for_none(*file))
    if not resamplings and lies_by_default(affine, shape):
        return (file := read()) is None or stands_for_none(*file)
    if not is_axis_aligned(linear):
        return False
    if (file := read()) is not None:
        return stands_for_none(*file) and _leads_to(linear, _follow(history, file[0][:3, :3]))
    ways = (_follow(history, first) for first in _possible_firsts(linear, history))
    return any(_leads_to(linear, way) and _fits(affine, shape, way) for way in ways)


class _Way(NamedTuple):
    """What a history makes of an affine that stands for none; vectors are the patient's axes."""

    side: np.ndarray  # of the origin on which the array lay at first
    linear: np.ndarray
    moved: np.ndarray  # the centre
    steps: list[tuple[np.ndarray, np.ndarray | None]]  # voxels added, or the new size of one


def _possible_firsts(linear: np.ndarray, history: Sequence[Step]) -> Sequence[np.ndarray]:
    """Return with which matrices of 1 mm an array in memory may have begun."""
    names = [name for name, _ in history]
    if "ToCanonical" in names or "ToOrientation" in names:
        return _FLIPS
    return [np.sign(linear)[:, :: -1 if names.count("Transpose") % 2 else 1]]


def _leads_to(linear: np.ndarray, way: _Way) -> bool:
    return bool(np.abs(way.linear - linear).max() < ROUNDING)


def _follow(history: Sequence[Step], first: np.ndarray) -> _Way:
    linear, moved = first, np.zeros(3)
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
    return _Way(first.sum(1), linear, moved, steps)


def _fits(affine: np.ndarray, shape: Sequence[int], way: _Way) -> bool:
    """Return whether a history takes an array at the origin to this place and shape.

    No step but a crop and a pad moves the centre, so that these tell how many voxels it had.
    """
    side, linear, moved, steps = way
    centre = affine[:3, 3] + affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    voxels = 2 * side * (centre - moved) + 1
    if np.abs(voxels - voxels.round()).max() > ROUNDING or voxels.min() < 1 - ROUNDING:
        return False
    voxels, sizes = voxels.round(), np.ones(3)
    for added, new_sizes in steps:
        voxels = voxels + added
        if new_sizes is not None:  # as TorchIO rounds
            voxels = np.where(voxels == 1, 1, np.floor(voxels * sizes / new_sizes))
            sizes = new_sizes
    return bool((voxels == (linear != 0) @ np.asarray(shape)).all())


def _borrows(step: Step) -> bool:
    """Return whether a step may give an image the affine of another one."""
    name, arguments = step
    return name == "CopyAffine" or (_resamples(step) and _spacing(arguments["target"]) is None)


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
