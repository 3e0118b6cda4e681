"""Read real tumour masks and measure the shape of any mask, drawn or real.

Real masks were drawn on slices of 0.5 to 7.5 mm and interpolated to 1 mm afterwards, which leaves
its traces. `through_slices` takes a drawn tumour the same way. `step_share` tells one way from
another: of a mask's changes from plane to plane, the share that recurs with every slice.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull

from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place_from_params
from tumorsynth.placement.shape import MAX_LEVEL, Shape
from tumorsynth.placement.types import LocalMask, TumorParams

MESH_SIGMA = 0.7  # voxels of 1 mm
COAREA_SIGMA = 1.0
MOST_PER_CASE = 10  # tumours that count; as many as a prior draws at most. One case has 63
SMALLEST = 8.0  # mm: a shape of fewer than 270 voxels of 1 mm is mostly its grid
LARGEST = {"liver": 60.0, "kidney": 60.0, "cyst": 40.0, "pancreas": 60.0, "lung": 60.0}
FITTED = 4  # of FEATURES
FEATURES = ("elongation", "flatness", "sphericity", "sphericity_mesh", "slice_convexity")


Interpolation = Literal["distance", "linear"]


class MaskFile(NamedTuple):
    """A file of real masks, and the table with their voxel sizes where the file has none.

    The interpolation to 1 mm is not documented; `shapes.py` shows by `step_share` that it is that
    of the signed distance to the outline, or of the mask itself.
    """

    masks: str
    interpolation: Interpolation
    spacings: str = ""
    slice_axis_first: bool = False  # in the table


FILES = {
    "liver": MaskFile("msd_liver_tumor.npz", "distance", "msd_liver_components_clean.csv"),
    "kidney": MaskFile("kits23.npz", "distance", "kits23_components.csv", True),
    "cyst": MaskFile("kits23_cyst.npz", "distance", "kits23_components.csv", True),
    "pancreas": MaskFile("msd_pancreas_tumor.npz", "linear"),
    "lung": MaskFile("uls23_msd_lung.npz", "linear"),
}


class RealTumors(NamedTuple):
    """Real tumours on a 1 mm grid, axes x, y, z."""

    masks: list[np.ndarray]
    diameters: np.ndarray  # (N,) equivalent, mm, before the interpolation
    cases: list[str]
    spacings: np.ndarray  # (N, 3) mm, of the grid they were drawn on

    def where(self, chosen: np.ndarray) -> RealTumors:
        """Return the tumours where a bool array is True."""
        index = np.flatnonzero(chosen)
        return RealTumors(
            [self.masks[k] for k in index],
            self.diameters[index],
            [self.cases[k] for k in index],
            self.spacings[index],
        )


def read_real(organ: str, folder: Path) -> RealTumors:
    """Read an organ's tumours, at most MOST_PER_CASE of a case, spread over its list.

    Without cases that the table of voxel sizes leaves out: their tumours are below 0.05 ml.
    """
    file = FILES[organ]
    data = np.load(folder / file.masks)
    bits, offset = data["bits"], data["offset"]
    masks = []
    for k, shape in enumerate(data["shape"]):
        mask = np.unpackbits(bits[offset[k] : offset[k + 1]])[: np.prod(shape)]
        masks.append(mask.reshape(shape).astype(bool))
    diameters = (6000 * data["volume_ml"].astype(float) / math.pi) ** (1 / 3)
    # "lung_001_lesion_03_sample_0" is of the case "lung_001"
    cases = [str(case).split("_lesion")[0] for case in data["case"]]
    if file.spacings:
        with open(folder / file.spacings) as f:
            rows = {r["case"]: [float(r[f"sp{k}"]) for k in range(3)] for r in csv.DictReader(f)}
        order = (1, 2, 0) if file.slice_axis_first else (0, 1, 2)
        spacings = np.array([[rows.get(case, [0.0] * 3)[k] for k in order] for case in cases])
    else:
        spacings = np.array(data["spacing"], dtype=float)
    of_case = defaultdict(list)
    for k, case in enumerate(cases):
        of_case[case].append(k)
    counted = np.zeros(len(cases), dtype=bool)
    for found in of_case.values():
        spread = np.linspace(0, len(found) - 1, min(MOST_PER_CASE, len(found)))
        counted[[found[int(k)] for k in spread]] = True
    return RealTumors(masks, diameters, cases, spacings).where(counted & (spacings[:, 0] > 0))


def first_half(tumors: RealTumors) -> np.ndarray:
    """Whether each tumour is of the first half of the cases, bool (N,).

    The cases, in order of their number of tumours and then of their names, go to the halves in
    turn: fixed, and blind to sizes and shapes.
    """
    counts = Counter(tumors.cases)
    first = set(sorted(counts, key=lambda case: (counts[case], case))[::2])
    return np.array([case in first for case in tumors.cases])


def random_half(tumors: RealTumors, rng: np.random.Generator) -> np.ndarray:
    """The same with cases chosen at random."""
    cases = sorted(set(tumors.cases))
    first = set(rng.permutation(cases)[: len(cases) // 2])
    return np.array([case in first for case in tumors.cases])


def drawn_mask(
    shape: tuple[tuple[float, float, float], float],
    diameter: float,
    seed: int,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> np.ndarray | None:
    """Draw one tumour, turned at random, on a grid of this spacing that is organ all over.

    Args:
        shape: relative half-axes and roughness, as `SizePrior.draw_shape` returns them.
        diameter: mm.
        seed: of the turn and the surface; it must not be the one that drew the shape, or both
            follow from the same numbers.
        spacing: mm per voxel.

    Returns:
        The mask, or None for a shape that `place` would refuse.
    """
    gen = torch.Generator().manual_seed(seed)
    w, x, y, z = torch.nn.functional.normalize(torch.randn(4, generator=gen), dim=0).tolist()
    surface = int(torch.randint(1 << 48, (), generator=gen))  # a stream of its own
    axes, roughness = shape
    params = TumorParams(
        (0, 0, 0), diameter, axes, (w, x, y, z), roughness, surface, 0, 1.0, diameter
    )
    reach = 2.2 * MAX_LEVEL * np.abs(Shape(params).sphere).max(0)
    sides = [int(r / s) + 7 for r, s in zip(reach, spacing, strict=True)]
    params = replace(params, centre=(sides[0] // 2, sides[1] // 2, sides[2] // 2))
    organ = torch.ones(*sides, dtype=torch.bool)
    tumor = place_from_params(params, OrganRegion.of_label(organ, 1), spacing)
    return tumor.mask.numpy() if isinstance(tumor, LocalMask) else None


def through_slices(
    mask: np.ndarray, spacing: Sequence[float], interpolation: Interpolation
) -> np.ndarray:
    """Bring a mask from its own grid to voxels of 1 mm."""
    mask = np.pad(mask, 3)
    if interpolation == "distance":
        inside = ndimage.distance_transform_edt(mask, sampling=spacing)
        values = inside - ndimage.distance_transform_edt(~mask, sampling=spacing)
    else:
        values = mask - 0.5
    values = values.astype(np.float32)
    for axis, s in enumerate(spacing):
        last = values.shape[axis] - 1
        at = np.arange(0, last * s + 1e-6) / s
        low = np.minimum(at.astype(int), last - 1)
        share = (at - low).reshape([-1 if k == axis else 1 for k in range(3)]).astype(np.float32)
        below, above = values.take(low, axis), values.take(low + 1, axis)
        values = below + share * (above - below)
    return values >= 0


def step_share(mask: np.ndarray, slice_mm: float) -> float:
    """The share of the changes along z that recurs with every slice: 1 for steps, 0 for none."""
    changes = np.abs(np.diff(mask.astype(int), axis=2)).sum((0, 1))
    phase = np.exp(2j * np.pi * np.arange(len(changes)) / slice_mm)
    return float(abs((changes * phase).sum()) / changes.sum())


def tight(mask: np.ndarray, margin: int) -> np.ndarray:
    """The part of a mask that holds it, with a margin of empty voxels."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    return np.pad(mask[box], margin)


def _ratio_to_ball(volume: float, surface: float) -> float:
    return float(math.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface)


def sphericity(mask: np.ndarray) -> float:
    """Surface of a ball of the same volume / surface, by the coarea formula at 1 mm."""
    smooth = ndimage.gaussian_filter(tight(mask, 5).astype(np.float32), COAREA_SIGMA)
    x, y, z = np.gradient(smooth)
    return _ratio_to_ball(float(mask.sum()), float(np.sqrt(x * x + y * y + z * z).sum()))


def sphericity_mesh(mask: np.ndarray) -> float:
    """The same by a marching-cubes mesh of the mask, smoothed by 0.7 voxel: volume and surface."""
    from skimage.measure import marching_cubes, mesh_surface_area

    smooth = ndimage.gaussian_filter(tight(mask, 4).astype(np.float32), MESH_SIGMA)
    points, faces, _, _ = marching_cubes(smooth, 0.5)
    a, b, c = (points[faces[:, k]].astype(float) for k in range(3))
    volume = abs(float(np.einsum("ij,ij->", a, np.cross(b, c)))) / 6
    return _ratio_to_ball(volume, float(mesh_surface_area(points, faces)))


def axis_ratios(mask: np.ndarray) -> tuple[float, float]:
    """Elongation, axis 2 / axis 1, and flatness, axis 3 / axis 1, of a mask's voxels."""
    where = np.argwhere(mask).astype(float)
    short, middle, long = np.sqrt(np.linalg.eigvalsh(np.cov(where.T, bias=True)) + 1 / 12)
    return middle / long, short / long


def convexity(plane: np.ndarray) -> float:
    """Area over that of the convex hull, of a bool plane, by its pixels' corners."""
    corners = np.argwhere(plane)
    corners = np.concatenate([corners + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return float(plane.sum() / ConvexHull(corners).volume)


def features(mask: np.ndarray) -> tuple[float, ...]:
    """As named in FEATURES, of a mask on a 1 mm grid."""
    plane = mask[:, :, mask.sum((0, 1)).argmax()]
    return (*axis_ratios(mask), sphericity(mask), sphericity_mesh(mask), convexity(plane))
