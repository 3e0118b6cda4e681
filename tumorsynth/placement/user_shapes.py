"""Shapes of real tumours: read masks once and keep each as a compact outline.

An outline holds the distance from the tumour's centre to its surface in a grid of directions,
OUTLINE_RINGS from pole to pole and twice as many around, in 256 steps of the largest, as base64
text. It is small enough for params, so that these replay a tumour without its mask.

A mask need not be star-shaped: each direction's distance is chosen so that its cone holds as much
volume as the mask has in it.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.affines import voxel_sizes
from tumorsynth.geometry import Rows3, shear_of
from tumorsynth.itk_formats.reading import read_itk
from tumorsynth.nifti_header import check_header, require_nibabel
from tumorsynth.placement.components import flood
from tumorsynth.placement.shape import OUTLINE_RINGS

MASK_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
MAX_SHAPES = 10_000
MIN_MASK_VOXELS = 30  # fewer do not define an outline
MIN_LARGEST_SHARE = 0.9  # of a mask's voxels that its main component must have
RAYS_PER_CELL = 3  # along each side of a direction's cell
STEPS_PER_VOXEL = 4  # along a ray, of the smallest voxel side
MIN_RADIUS = 0.2  # of a direction, relative to the mean one
RADIUS_LEVELS = 255  # an outline's radii are whole numbers from 1 to this


def read_shapes(shapes: Any) -> tuple[str, ...]:
    """Return the outlines of a ``shapes=`` argument.

    Args:
        shapes: a folder of masks, or a sequence of files (NIfTI, NRRD, MetaImage) and of (mask,
            spacing) pairs, one tumour per mask. A mask is an array or tensor (X, Y, Z), tumour
            where it is not 0; spacing is mm per voxel. None gives no outlines.

    Returns:
        One outline per mask, in order; the files of a folder in order of their names.

    Raises:
        ValueError: for an unusable mask, which the message names.
        FileNotFoundError: for a missing folder or file.
    """
    if shapes is None:
        return ()
    if isinstance(shapes, str | os.PathLike):
        masks = _masks_in_folder(Path(shapes))
    else:
        try:
            masks = list(islice(shapes, MAX_SHAPES + 1))
        except TypeError:
            raise ValueError(
                "shapes must be a folder, or a list of files and (mask, spacing), got "
                f"{type(shapes).__name__}; pass a single one as [mask]"
            ) from None
        if not masks:
            raise ValueError(
                "shapes must hold at least one mask, got an empty list; pass None for none"
            )
    if len(masks) > MAX_SHAPES:
        raise ValueError(f"shapes must be at most {MAX_SHAPES} masks, got more; pass some of them")
    return tuple(
        _outline_of_file(Path(mask))
        if isinstance(mask, str | os.PathLike)
        else _outline_of_pair(mask, f"shape {number}")
        for number, mask in enumerate(masks)
    )


def outline_of(
    mask: Tensor, spacing: Sequence[float], name: str = "the mask", shear: Rows3 | None = None
) -> str:
    """Return the outline of one tumour; arguments and errors are those of `measure_outline`."""
    return measure_outline(mask, spacing, name, shear).text


class Outline(NamedTuple):
    """An outline, and the point that its radii start from, in voxels of the mask (3,)."""

    text: str
    centre: Tensor


def measure_outline(
    mask: Tensor, spacing: Sequence[float], name: str = "the mask", shear: Rows3 | None = None
) -> Outline:
    """Return the outline of one tumour.

    Args:
        mask: (X, Y, Z), tumour where it is not 0.
        spacing: mm per voxel.
        name: what errors call the mask.
        shear: of the mask's axes; see `tumorsynth.geometry.Frame`.

    Raises:
        ValueError: if the mask holds no tumour, more than one, or one of too few voxels.
    """
    if mask.ndim != 3:
        raise ValueError(
            f"{name} must be (X, Y, Z), got shape {tuple(mask.shape)}; remove its other axes, "
            "for example mask[0]"
        )
    voxel = torch.tensor([float(s) for s in spacing], dtype=torch.float64)
    if len(voxel) != 3 or not bool((voxel.isfinite() & (voxel > 0)).all()):
        raise ValueError(
            f"spacing of {name} must be three numbers above 0 in mm, got {spacing}; pass for "
            "example (0.8, 0.8, 2.5)"
        )
    tumor = _main_component(mask != 0, voxel, name)
    centre = tumor.mask.nonzero().double().mean(0)
    if not bool(tumor.mask[tuple(centre.round().long().tolist())]):  # a sickle
        centre = tumor.middle.double()
    radius = _radii(tumor.mask, centre, voxel, shear)
    levels = (radius / radius.max() * RADIUS_LEVELS).round().clamp(1, RADIUS_LEVELS)
    text = base64.b64encode(bytes(levels.to(torch.uint8).flatten().tolist())).decode()
    return Outline(text, centre + tumor.start)


class _Component(NamedTuple):
    mask: Tensor  # bool (X, Y, Z)
    middle: Tensor  # a voxel (3,) of it
    start: Tensor  # the voxel (3,) at which ``mask`` starts


def _main_component(mask: Tensor, voxel: Tensor, name: str) -> _Component:
    """Return the component in the middle of a mask; raise if more than a little lies apart."""
    index = mask.nonzero()
    if len(index) < MIN_MASK_VOXELS:
        raise ValueError(
            f"{name} must hold a tumour of {MIN_MASK_VOXELS} voxels or more, got {len(index)}; "
            "leave it out"
        )
    low, high = index.amin(0).tolist(), index.amax(0).tolist()
    mask = mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    index = mask.nonzero()
    middle = index[(index - index.double().mean(0)).mul(voxel).norm(dim=1).argmin()]
    seed = np.ravel_multi_index(middle.tolist(), mask.shape)
    component = torch.from_numpy(flood(mask.numpy(), int(seed)))
    share = int(component.sum()) / len(index)
    if share < MIN_LARGEST_SHARE:
        raise ValueError(
            f"{name} must hold one tumour, but {1 - share:.0%} of its voxels lie apart from the "
            "rest; write one mask per tumour"
        )
    return _Component(component, middle, torch.tensor(low))


def _radii(mask: Tensor, centre: Tensor, voxel: Tensor, shear: Rows3 | None) -> Tensor:
    """Return the radius in mm (OUTLINE_RINGS, 2 OUTLINE_RINGS) of each direction's cone.

    Averages the volume along several rays per cell; a radius r stands for a cone of volume ~ r^3.
    """
    rows, columns = OUTLINE_RINGS * RAYS_PER_CELL, 2 * OUTLINE_RINGS * RAYS_PER_CELL
    theta = math.pi * (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    phi = 2 * math.pi * (torch.arange(columns) + 0.5) / columns - math.pi
    ring = theta.sin()[:, None]
    unit = torch.stack(
        [ring * phi.cos(), ring * phi.sin(), theta.cos()[:, None].expand(-1, len(phi))], -1
    )
    if shear is not None:  # from now on along the mask's axes
        unit = unit @ torch.linalg.inv(unit.new_tensor(shear))
    step = float(voxel.min()) / STEPS_PER_VOXEL
    extent = torch.tensor(mask.shape) * voxel
    longest = float(extent.norm() if shear is None else extent.sum())
    distances = torch.arange(0, longest + step, step, dtype=torch.float64) + step / 2
    cubes = torch.zeros(unit.shape[:2], dtype=torch.float64)
    padded = F.pad(mask, (1, 1) * 3)
    last = torch.tensor(padded.shape) - 1
    for distance in distances.tolist():
        at = (unit * (distance / voxel) + centre).round().long() + 1
        x, y, z = at.clamp_min(0).minimum(last).unbind(-1)
        cubes += padded[x, y, z] * (3 * distance**2 * step)
    cubes = F.avg_pool2d(cubes[None], RAYS_PER_CELL)[0]
    radius = cubes ** (1 / 3)
    return radius.clamp_min(MIN_RADIUS * float(cubes.mean()) ** (1 / 3))


def _masks_in_folder(folder: Path) -> list[Any]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"shapes must be a folder of masks or a list, but there is no folder {folder}; for "
            "single files pass a list of them"
        )
    files = sorted(
        p for p in folder.iterdir() if p.name.lower().endswith(MASK_SUFFIXES) and p.name[0] != "."
    )
    if not files:
        raise ValueError(
            f"shapes must hold masks, but {folder} has no {', '.join(MASK_SUFFIXES)} file; pass "
            "the folder that has them, or None for none"
        )
    return files


def _outline_of_file(path: Path) -> str:
    if (read := read_itk(path)) is not None:
        mask = torch.from_numpy(read.stored != 0)
        return outline_of(mask, voxel_sizes(read.affine).tolist(), path.name, shear_of(read.affine))
    nibabel = require_nibabel()
    if not path.is_file():
        raise FileNotFoundError(
            f"shapes must be existing masks, but there is no file {path}; leave it out, or correct "
            "its path"
        )
    try:
        image = nibabel.load(path)
        mask = torch.from_numpy(np.asarray(image.dataobj) != 0)
        spacing = [float(s) for s in image.header.get_zooms()[:3]]
        shear = shear_of(image.affine)
    except Exception as error:
        raise ValueError(
            f"{path.name} must be a NIfTI mask, but cannot be read: {error}; export it again, "
            "or leave it out"
        ) from error
    if isinstance(image.header, nibabel.Nifti1Header):
        check_header(path.name, image.header)
    return outline_of(mask, spacing, path.name, shear)


def _outline_of_pair(pair: Any, name: str) -> str:
    try:
        mask, spacing = pair
        mask = torch.as_tensor(mask) != 0
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be a file or (mask, spacing), got {type(pair).__name__}; pass for "
            "example (mask, (0.8, 0.8, 2.5))"
        ) from None
    return outline_of(mask.detach().cpu(), list(spacing), name)
