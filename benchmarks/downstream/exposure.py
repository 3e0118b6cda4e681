"""What a step sees: crops that depend on the seed, the step and the slot alone, never on the arm.

Every arm of an experiment gets the same annotated crops in the same order, and an interrupted job
resumes with the crops that it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from benchmarks.downstream.pack import Scan

WINDOW_HU = (-50.0, 250.0)
ON_TUMOR = 2 / 3  # share of crops centred near a tumour, where the scan has one
JITTER = 0.25  # of the crop's side, around the chosen voxel
NEAR_ORGAN_MM = 6.0  # loss counts up to here outside the organ
ANNOTATED, OTHERS = 0, 1  # random streams of a step


@dataclass(frozen=True)
class View:
    """One scan as a network is taught it.

    Attributes:
        hu: (X, Y, Z) int16.
        tumor: (X, Y, Z) bool, what is to be found.
        counted: (X, Y, Z) bool, where the loss counts.
        organ: flat indices of organ voxels.
        lesions: flat indices of each tumour's voxels; crops are centred near them.
    """

    hu: np.ndarray
    tumor: np.ndarray
    counted: np.ndarray
    organ: np.ndarray
    lesions: tuple[np.ndarray, ...]


def view(scan: Scan, taught: Sequence[int]) -> View:
    """Return a scan in which the tumours ``taught`` are annotated; no loss counts on the others."""
    tumor = np.isin(scan.lesions, list(taught))
    hidden = (scan.lesions > 0) & ~tumor
    reach = ndimage.distance_transform_edt(~scan.organ, scan.spacing) <= NEAR_ORGAN_MM
    if hidden.any():
        reach &= ndimage.distance_transform_edt(~hidden, scan.spacing) > 3.0
    lesions = tuple(np.flatnonzero(scan.lesions == k) for k in taught)
    return View(scan.hu, tumor, reach, np.flatnonzero(scan.organ), lesions)


def stream(seed: int, step: int, kind: int, slot: int) -> np.random.Generator:
    """The random numbers of one crop."""
    return np.random.default_rng([seed, step, kind, slot])


def pick(rng: np.random.Generator, views: Mapping[str, Sequence[View]]) -> View:
    """Choose a scan, then one of its versions."""
    which, version = rng.random(2)  # as many draws where there is one version
    versions = list(views.values())[int(which * len(views))]
    return versions[int(version * len(versions))]


def crop(
    rng: np.random.Generator,
    source: View,
    side: Sequence[int],
    on_tumor: float = ON_TUMOR,
    jitter: float = JITTER,
) -> Tensor:
    """Cut one crop, turned, scaled and mirrored at random.

    Args:
        rng: of the crop.
        source: the scan.
        side: of the crop, in voxels.
        on_tumor: chance that it is centred near a tumour, where the scan has one.
        jitter: largest distance from the voxel that it is centred on, as a share of the side.

    Returns:
        (3, X, Y, Z) float32: the image in [-1, 1], tumour, and where the loss counts.
    """
    chance, which, voxel = rng.random(3)
    places = source.organ
    if source.lesions and chance < on_tumor:
        places = source.lesions[int(which * len(source.lesions))]
    shape = np.array(source.hu.shape)
    centre = np.array(np.unravel_index(places[int(voxel * len(places))], source.hu.shape))
    size = np.array(side)
    centre = centre + rng.uniform(-jitter, jitter, 3) * size
    angle = rng.uniform(-np.pi / 6, np.pi / 6)
    zoom = np.exp(rng.uniform(np.log(0.7), np.log(1.4)))
    flips = np.where(rng.random(3) < 0.5, -1.0, 1.0)
    gain, shift, noise = rng.uniform(0.85, 1.15), rng.uniform(-0.1, 0.1), rng.uniform(0, 0.06)

    box = np.ceil(size * 1.6).astype(int)  # holds most turned and enlarged crops; the rest is edge
    low = np.clip((centre - box / 2).round().astype(int), 0, np.maximum(0, shape - box))
    where = tuple(slice(a, min(a + b, n)) for a, b, n in zip(low, box, shape, strict=True))
    parts = [source.hu[where], source.tumor[where], source.counted[where]]
    stack = torch.from_numpy(np.stack(parts).astype(np.float32))[None]
    held = np.array(stack.shape[2:])
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, zoom]]) * flips
    to_unit = 2 / held  # voxels to grid_sample's [-1, 1]
    matrix = to_unit[:, None] * turn * (size / 2)
    offset = to_unit * (centre - low + 0.5) - 1
    theta = np.concatenate([matrix, offset[:, None]], 1)[::-1]  # grid_sample counts z, y, x
    theta = np.concatenate([theta[:, 2::-1], theta[:, 3:]], 1)
    grid = F.affine_grid(
        torch.from_numpy(theta.astype(np.float32))[None], [1, 3, *side], align_corners=False
    )
    cut = F.grid_sample(stack, grid, padding_mode="border", align_corners=False)[0]
    low_hu, high_hu = WINDOW_HU
    image = scale(cut[0]) * gain + shift
    grain = torch.Generator().manual_seed(int(rng.integers(2**62)))
    image = image + noise * torch.randn(image.shape, generator=grain)
    return torch.stack([image, (cut[1] >= 0.5).float(), (cut[2] >= 0.5).float()])


def scale(hu: Tensor) -> Tensor:
    """Window HU to [-1, 1]."""
    low, high = WINDOW_HU
    return (hu.clamp(low, high) - low) * (2 / (high - low)) - 1


def crops_of(
    seed: int,
    step: int,
    kind: int,
    count: int,
    views: Mapping[str, Sequence[View]],
    side: Sequence[int],
) -> list[Tensor]:
    """Cut the crops of one step."""
    made = []
    for slot in range(count):
        rng = stream(seed, step, kind, slot)
        made.append(crop(rng, pick(rng, views), side))
    return made
