"""Shapes of real tumours as a prior: masks are read once and kept as outlines.

An outline is the distance from the tumour's middle to its surface in RINGS x 2 RINGS directions, in
256 steps of the longest, as text: small enough to go into params, so that these replay a tumour
where its mask is not at hand. What a ray misses of a mask that is not star-shaped, its length makes
up for: the ray's cone holds as much volume as it does in the mask.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.placement.components import flood
from tumorsynth.placement.shape import OUTLINE_RINGS as RINGS

MAX_SHAPES = 10_000
FEWEST = 30  # voxels that an outline can be told from
ONE_TUMOR = 0.9  # of a mask's voxels at least in its largest connected part
RAYS = 3  # on each side of a direction's cell
FLOOR = 0.2  # of the mean radius, that a ray has at least


def read_shapes(shapes: Any) -> tuple[str, ...]:
    """Outlines of a ``shapes=`` argument; () for None.

    shapes: a folder of NIfTI masks, or a sequence of NIfTI files and of (mask, spacing): an array
        or tensor (X, Y, Z), tumour where it is not 0, and mm per voxel. One tumour per mask.

    Raises ValueError or FileNotFoundError naming the mask that will not do. Files need nibabel.
    """
    if shapes is None:
        return ()
    if isinstance(shapes, str | os.PathLike):
        folder = Path(shapes)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"shapes must be a folder of masks or a list, but there is no folder {folder}; for "
                "single files pass a list of them"
            )
        found: list[Any] = sorted(
            p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != "."
        )
        empty = (
            f"shapes must hold masks, but {folder} has no .nii or .nii.gz file; pass the folder "
            "that has them, or None for none"
        )
    else:
        try:
            found = list(islice(shapes, MAX_SHAPES + 1))
        except TypeError:
            raise ValueError(
                "shapes must be a folder, or a list of files and (mask, spacing), got "
                f"{type(shapes).__name__}; pass a single one as [mask]"
            ) from None
        empty = "shapes must hold at least one mask, got an empty list; pass None for none"
    if len(found) > MAX_SHAPES:
        raise ValueError(f"shapes must be at most {MAX_SHAPES} masks, got more; pass some of them")
    outlines = tuple(_read(one, k) for k, one in enumerate(found))
    if not outlines:
        raise ValueError(empty)
    return outlines


def outline_of(mask: Tensor, spacing: Sequence[float], name: str = "the mask") -> str:
    """The outline of one tumour (X, Y, Z), not 0 where it is; ValueError where it has none."""
    if mask.ndim != 3:
        raise ValueError(
            f"{name} must be (X, Y, Z), got shape {tuple(mask.shape)}; take its other axes away, "
            "for example mask[0]"
        )
    voxel = torch.tensor([float(s) for s in spacing], dtype=torch.float64)
    if len(voxel) != 3 or not bool((voxel.isfinite() & (voxel > 0)).all()):
        raise ValueError(
            f"spacing of {name} must be three numbers above 0 in mm, got {spacing}; pass for "
            "example (0.8, 0.8, 2.5)"
        )
    index = (mask != 0).nonzero()
    if len(index) < FEWEST:
        raise ValueError(
            f"{name} must hold a tumour of {FEWEST} voxels or more, got {len(index)}; leave it out"
        )
    low, high = index.amin(0).tolist(), index.amax(0).tolist()
    tumor = mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] != 0
    index = tumor.nonzero()
    middle = index[(index - index.double().mean(0)).mul(voxel).norm(dim=1).argmin()]
    seed = np.ravel_multi_index(middle.tolist(), tumor.shape)
    part = torch.from_numpy(flood(tumor.numpy(), int(seed)))
    share = int(part.sum()) / len(index)
    if share < ONE_TUMOR:
        raise ValueError(
            f"{name} must hold one tumour, but {1 - share:.0%} of its voxels lie apart from the "
            "rest; write one mask per tumour"
        )
    index = part.nonzero()
    centre = index.double().mean(0)
    if not bool(part[tuple(centre.round().long().tolist())]):  # a sickle
        centre = middle.double()
    radius = _radius(part, centre, voxel)
    text = (radius / radius.max() * 255).round().clamp(1, 255).to(torch.uint8)
    return base64.b64encode(bytes(text.flatten().tolist())).decode()


def _radius(part: Tensor, centre: Tensor, voxel: Tensor) -> Tensor:
    """(RINGS, 2 RINGS): radius in mm, with the volume of each direction's cone."""
    theta = math.pi * (torch.arange(RINGS * RAYS, dtype=torch.float64) + 0.5) / (RINGS * RAYS)
    phi = 2 * math.pi * (torch.arange(2 * RINGS * RAYS) + 0.5) / (2 * RINGS * RAYS) - math.pi
    ring = theta.sin()[:, None]
    unit = torch.stack(
        [ring * phi.cos(), ring * phi.sin(), theta.cos()[:, None].expand(-1, len(phi))], -1
    )
    step = float(voxel.min()) / 4
    longest = float((torch.tensor(part.shape) * voxel).norm())
    r = torch.arange(0, longest + step, step, dtype=torch.float64) + step / 2
    cube = torch.zeros(unit.shape[:2], dtype=torch.float64)
    padded = F.pad(part, (1, 1) * 3)
    last = torch.tensor(padded.shape) - 1
    for distance in r.tolist():
        at = (unit * (distance / voxel) + centre).round().long() + 1
        x, y, z = at.clamp_min(0).minimum(last).unbind(-1)
        cube += padded[x, y, z] * (3 * distance**2 * step)
    cube = F.avg_pool2d(cube[None], RAYS)[0]
    radius = cube ** (1 / 3)
    return radius.clamp_min(FLOOR * float(cube.mean()) ** (1 / 3))


def _read(one: Any, k: int) -> str:
    if isinstance(one, str | os.PathLike):
        from tumorsynth.scans.nifti import require_nibabel

        require_nibabel()
        import nibabel as nib
        import numpy as np

        path = Path(one)
        if not path.is_file():
            raise FileNotFoundError(
                f"shapes must be masks that are there, but there is no file {path}; leave it out, "
                "or mend its path"
            )
        try:
            image = nib.load(path)
            mask = torch.from_numpy(np.asarray(image.dataobj) != 0)
            spacing = [float(s) for s in image.header.get_zooms()[:3]]
        except Exception as error:
            raise ValueError(
                f"{path.name} must be a NIfTI mask, but cannot be read: {error}; export it again, "
                "or leave it out"
            ) from error
        return outline_of(mask, spacing, path.name)
    try:
        mask, spacing = one
        mask = torch.as_tensor(mask) != 0
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"shape {k} must be a file or (mask, spacing), got {type(one).__name__}; pass for "
            "example (mask, (0.8, 0.8, 2.5))"
        ) from None
    return outline_of(mask.detach().cpu(), list(spacing), f"shape {k}")
