"""How the voxels of a call lie in the patient: what the caller says, and what came with the data.

``spacing=`` and ``affine=`` are the caller's. Other affines come along with image, label and organ
map. Where they contradict each other the call is refused; where nobody knows the size of a voxel,
the transform warns once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.affines import (
    MAX_SHIFT_VOXELS,
    directions_agree,
    is_identity,
    largest_shift,
    sizes_agree,
    to_array,
    voxel_sizes,
)
from tumorsynth.arguments import any_bool
from tumorsynth.array_types import to_tensor
from tumorsynth.geometry import Frame, frame_from_affine, frame_from_spacing
from tumorsynth.pipeline.lost_affines import is_of_first_alone, lost_affines
from tumorsynth.pipeline.validation import plain

SHARE_A_GRID = "resample one onto the other, or, where voxel lies on voxel, give both one affine"


@dataclass(frozen=True)
class Carried:
    """What came along with an image, a label or an organ map.

    Args:
        name: what the user calls it.
        affine: 4x4, or (B, 4, 4) for a batch; None without one.
        judge: returns for each affine whether it stems from one that a library put where it knew
            none, so that the size of a voxel is unknown. It is called once, if at all.
        of_first_alone: whether the affine is known to be that of a batch's first sample alone.
    """

    name: Any
    affine: Any = None
    judge: Callable[[], Sequence[bool]] = tuple
    of_first_alone: bool = False

    @classmethod
    def of(cls, name: Any, x: Any) -> Carried:
        """Return what a tensor carries: nothing, unless it is a MetaTensor or has an affine."""
        affine = getattr(x, "affine", None)
        if affine is None:
            return cls(name)
        shape = tuple(getattr(x, "shape", ()))[-3:]
        return cls(name, affine, lambda: lost_affines(affine, shape, x), is_of_first_alone(x))

    @cached_property
    def lost(self) -> Sequence[bool]:
        """What ``judge`` returns."""
        return self.judge()

    def known(self, count: int) -> list[np.ndarray | None]:
        """Return the affine of each of ``count`` samples, None for one that is not known."""
        matrices = _per_frame(self.affine, count)
        if self.of_first_alone and not any(self.lost):
            return [*matrices[:1], *[None] * (count - 1)]
        lost = self.lost if len(self.lost) == len(matrices) else [any(self.lost)] * len(matrices)
        return [None if gone else one for one, gone in zip(matrices, lost, strict=True)]


def find_frames(
    shape: Sequence[int],
    batch: int,
    carried: Sequence[Carried],
    *,
    spacing: Any = None,
    affine: Any = None,
    override_affine: bool = False,
) -> tuple[list[Frame], str | None]:
    """Return how the axes of each sample lie in the patient.

    Args:
        shape: voxels of a sample.
        batch: number of samples.
        carried: what came with image, label and organ map.
        spacing: the caller's.
        affine: the caller's.
        override_affine: whether the caller's wins over other affines that came along.

    Returns:
        The frames, and a warning that the size of a voxel is unknown, or None if it is known.

    Raises:
        ValueError: for a spacing or an affine that cannot be, for two that contradict each other,
            and for parts that lie on different grids.
    """
    if spacing is not None and affine is not None:
        raise ValueError("spacing and affine must not both be given; the affine holds the spacing")
    with_affine = [part for part in carried if part.affine is not None]
    if spacing is None and affine is None:
        if override_affine:
            raise ValueError(
                "override_affine=True must come with what overrides the affine, got neither "
                "spacing= nor affine=; pass one of them, or leave override_affine out"
            )
        return _frames_carried(shape, batch, carried, with_affine)
    frames = _frames_given(batch, spacing, affine)
    if not override_affine:
        for part in with_affine:
            _check_agrees(frames, part, "spacing" if affine is None else "affine")
        if len(with_affine) > 1:
            known = [part for part in with_affine if not any(part.lost)]
            check_grid(known, shape, f"{SHARE_A_GRID}, or pass override_affine=True")
    return frames, None


def _frames_carried(
    shape: Sequence[int], batch: int, carried: Sequence[Carried], with_affine: Sequence[Carried]
) -> tuple[list[Frame], str | None]:
    """Return the frames of the first affine that came along, 1 mm without one."""
    if not with_affine:
        names = " and ".join(repr(part.name) for part in carried[:2])
        return [frame_from_spacing(1.0)] * batch, _unknown_size(f"{names} have no affine", "1")
    first = with_affine[0]
    frames = _frames_given(batch, None, first.affine)
    check_grid(with_affine, shape)
    if first.of_first_alone and not any(first.lost):
        return frames, (
            f"the size of a voxel must be known, but {first.name!r} has {batch} samples and one "
            "affine, as torch leaves it of MetaTensors that it stacks, and no spacing was given, "
            f"so that voxels are taken as {_times(voxel_sizes(to_array(first.affine)))} mm in all; "
            "collate with monai.data.list_data_collate, which keeps the affine of every sample, or "
            "pass spacing="
        )
    if not any(first.lost):
        return frames, None
    frame = next(f for f, one in zip(frames, first.known(batch), strict=True) if one is None)
    sizes = np.asarray(frame.spacing)
    if frame.affine is not None and is_identity(np.asarray(frame.affine)):
        reason = f"the affine of {first.name!r} is the identity"
    else:
        reason = (
            f"the affine of {first.name!r} stems from one of 1 mm and no position, as libraries "
            "write that know neither,"
        )
    return frames, _unknown_size(reason, _times(sizes))


def _times(sizes: np.ndarray) -> str:
    same = bool(np.allclose(sizes, sizes[0], rtol=1e-3))
    return " x ".join(f"{v:.4g}" for v in sizes[: 1 if same else 3])


def _unknown_size(reason: str, taken_mm: str) -> str:
    """Return the warning that the size of a voxel is unknown.

    Args:
        reason: why it is.
        taken_mm: the size that is taken instead.
    """
    return (
        f"the size of a voxel must be known, but {reason} and no spacing was given, so that voxels "
        f"are taken as {taken_mm} mm; pass spacing=(dx, dy, dz), spacing=(1, 1, 1) where they are "
        "1 mm. Plain arrays have no affine, and a cache may lose it; MONAI's "
        "PersistentDataset keeps it with track_meta=True, weights_only=False"
    )


def _frames_given(batch: int, spacing: Any, affine: Any) -> list[Frame]:
    """Return the frames of a spacing or of an affine, one for all samples or one for each."""
    if affine is not None:
        parts = _per_sample(affine, 2, batch, "affine must be 4x4 or (B, 4, 4)")
        return [frame_from_affine(part) for part in parts]
    parts = _per_sample(spacing, 1, batch, "spacing must be (dx, dy, dz) in mm or (B, 3)")
    return [frame_from_spacing(part) for part in parts]


def _check_agrees(frames: Sequence[Frame], part: Carried, name: str) -> None:
    """Raise ValueError if what the caller gave contradicts an affine that came along.

    Args:
        frames: of the caller's spacing or affine.
        part: what came along. What was lost, or is no affine at all, contradicts nothing.
        name: "spacing" or "affine".
    """
    for frame, matrix in zip(frames, part.known(len(frames)), strict=False):
        if matrix is None:
            continue
        sizes = voxel_sizes(matrix)
        if not (np.isfinite(sizes).all() and (sizes > 0).all()):
            continue
        given = None if frame.affine is None else np.asarray(frame.affine)
        given_sizes = np.asarray(frame.spacing) if given is None else voxel_sizes(given)
        if not sizes_agree(given_sizes, sizes):
            says, against = (" x ".join(f"{v:.4g}" for v in s) for s in (given_sizes, sizes))
            what = f"voxels of {says} mm and that affine of {against} mm"
        elif given is not None and not directions_agree(given, matrix):
            says, against = (m[:3, :3].round(3).tolist() for m in (given, matrix))
            what = f"axes {says} and that affine {against}"
        else:
            continue
        raise ValueError(
            f"{name} must agree with the affine of {part.name!r}, but {name}= says {what}; leave "
            f"{name} out to take that affine, or pass override_affine=True too where {name} is "
            "right"
        )


def check_grid(carried: Sequence[Carried], shape: Sequence[int], fix: str = SHARE_A_GRID) -> None:
    """Raise ValueError unless all affines that came along describe one grid.

    Args:
        carried: of image, label and organ map; those without an affine are left out.
        shape: voxels of a sample.
        fix: what the message advises.
    """
    given = [(part.name, to_array(part.affine)) for part in carried if part.affine is not None]
    for name, affine in given[1:]:
        first_name, first = given[0]
        if first.ndim == affine.ndim and len(first) != len(affine):
            continue  # batches of different sizes, which another check refuses
        count = max(len(x) if x.ndim == 3 else 1 for x in (first, affine))
        pairs = zip(_per_frame(first, count), _per_frame(affine, count), strict=True)
        shift = max(largest_shift(one, other, shape[-3:]) for one, other in pairs)
        if shift > MAX_SHIFT_VOXELS:
            raise ValueError(
                f"{first_name!r} and {name!r} must share one grid, but their affines put the "
                f"same voxel up to {shift:.3g} voxels apart; {fix}"
            )


def _per_frame(affine: Any, count: int) -> list[np.ndarray]:
    """Return one 4x4 affine for each sample; none for what is no affine."""
    matrices = to_array(affine)
    if matrices.shape == (4, 4):
        return [matrices] * count
    return list(matrices) if matrices.ndim == 3 and matrices.shape[1:] == (4, 4) else []


def check_spacing(spacing: Any) -> None:
    """Raise ValueError unless this is an adapter's ``spacing``: None, mm per voxel, or (B, 3)."""
    if spacing is not None:
        batch = len(spacing) if hasattr(spacing, "__len__") and np.ndim(spacing) else 1
        _frames_given(batch, spacing, None)


def _per_sample(value: Any, ndim: int, batch: int, rule: str) -> list[Any]:
    """Return one value per sample, given a value of ``ndim`` axes for all or one more for each."""
    if ndim == 1 and _reads_both_ways(value, batch):
        raise ValueError(
            "spacing must say which of its numbers belong to which sample, but three tensors of "
            f"three numbers for a batch of three can hold one sample or one axis each, got "
            f"{value!r}; pass one tensor (B, 3): torch.stack(spacing) where each is one sample's "
            "(dx, dy, dz), torch.stack(spacing, 1) where they are dx, dy and dz, as torch's "
            "default_collate makes of tuples; of arrays or tensors it makes (B, 3)"
        )
    try:
        if value.is_complex() if isinstance(value, Tensor) else np.iscomplexobj(value):
            raise TypeError("complex numbers")
        if any_bool(value):
            raise TypeError("True and False")
        if ndim == 1 and _are_vectors(value, batch, 3):
            value = _stack(value)
        elif ndim == 1 and _are_vectors(value, 3, batch):
            value = _stack(value).T
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        tensor = plain(tensor)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{rule}, got {value!r}") from error
    if tensor.ndim == 0 and ndim == 1:
        return [float(tensor)] * batch
    if tensor.ndim == ndim:
        return [tensor.numpy()] * batch
    if tensor.ndim == ndim + 1 and len(tensor) == batch:
        return list(tensor.numpy())
    raise ValueError(f"{rule} with B = {batch}, got shape {tuple(tensor.shape)}")


def _are_vectors(value: Any, count: int, length: int) -> bool:
    """Return whether this is a list of so many tensors or arrays of so many numbers.

    Collate functions leave a list of B of (3,), one for each sample; torch's default_collate makes
    three of (B,) of tuples (dx, dy, dz), one for each axis.
    """
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(one, Tensor | np.ndarray) and one.shape == (length,) for one in value)
    )


def _reads_both_ways(value: Any, batch: int) -> bool:
    """Return whether a list of vectors can be sorted by sample and by axis, with other sizes."""
    if batch != 3 or not _are_vectors(value, 3, 3):
        return False
    return any(bool(value[i][j] != value[j][i]) for i, j in ((0, 1), (0, 2), (1, 2)))


def _stack(vectors: Any) -> Tensor:
    """Return tensors or arrays of numbers as the rows of one tensor."""
    return torch.stack([plain(to_tensor(one)).detach().double().cpu() for one in vectors])
