"""What a lesion looks like in numbers.

Everything is on the 1 mm grid of a pack, in HU. Simple on purpose: what a radiomics study would
compute first, in numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import ndimage, optimize, special

from tumorsynth.training.measures import tumor_statistics

NOISE_SIGMA_MM = 1.5  # as in tumor_statistics: what a Gaussian of this width leaves is noise
BIN_HU, BIN_RANGE = 10.0, (-100.0, 100.0)  # grey levels of the co-occurrence matrix
LEAST_CONTRAST_HU = 8.0  # fainter than this there is no edge to fit
CORE_VOXELS = 100  # the deepest ones: texture depends on how much of a lesion is looked at
PROBE_MM = 3.0  # radius of a ball of a tumour's inside, for comparing texture at equal volume

# What the classifier may look at. Shape is apart: synthetic masks come from a sampler of shapes.
# In no group: edge_offset_mm and contrast_hu (to one voxel from the outline), which say how
# generously an outline was drawn rather than what the picture shows.
FEATURES = {
    "intensity": ("deep_contrast_hu", "std_ratio", "skewness", "kurtosis", "p10_hu", "p90_hu"),
    "texture": (
        "glcm_contrast",
        "glcm_homogeneity",
        "glcm_correlation",
        "noise_ratio",
        "noise_length_ratio",
        "lumps_ratio",
    ),
    "edge": ("edge_width_mm", "edge_gradient"),
    "shape": ("diameter_mm", "sphericity", "elongation"),
}
# of a ball of a tumour's inside alone
PROBE_FEATURES = (*FEATURES["intensity"][1:], *FEATURES["texture"])


@dataclass
class Lesion:
    """A lesion cut out of its scan: HU, mask, the organ without any lesion, where it was."""

    hu: np.ndarray
    tumor: np.ndarray
    organ: np.ndarray
    about: dict[str, Any]


def measure(hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray) -> dict[str, float]:
    """All features of one lesion.

    hu: (X, Y, Z) at 1 mm, with 16 mm of surroundings. tumor: bool, one connected lesion. organ:
    bool, organ without any lesion. NaN where a feature cannot be had (no organ around, no edge).
    """
    whole = (torch.from_numpy(np.ascontiguousarray(a)) for a in (hu, tumor, organ))
    contrast, noise_in, noise_out = tumor_statistics(*whole)
    outside = ndimage.distance_transform_edt(~tumor)
    shell = organ & (outside > 2) & (outside < 8)
    core = deepest(tumor)
    row = {
        "diameter_mm": float((6 * tumor.sum() / np.pi) ** (1 / 3)),
        "contrast_hu": contrast,
        "noise_in_hu": noise_in,
        "noise_out_hu": noise_out,
    }
    if not shell.any():
        return row
    row["core_contrast_hu"] = core_contrast(hu, tumor, organ)
    row |= inside(hu, core, shell)
    row |= edge(hu, tumor, organ, row["deep_contrast_hu"])
    row |= shape(tumor)
    return row


def inside(hu: np.ndarray, core: np.ndarray, shell: np.ndarray) -> dict[str, float]:
    """First-order and texture features of a lesion's core against the organ around it."""
    values, around = hu[core], hu[shell]
    noise, smooth = _noise(hu), ndimage.gaussian_filter(hu, NOISE_SIGMA_MM)
    within, beyond = noise_length(noise, core), noise_length(noise, shell)
    centred = (values - values.mean()) / max(values.std(), 1e-6)
    p10, p50, p90 = np.percentile(values, [10, 50, 90])
    return {
        "deep_contrast_hu": float(p50 - np.median(around)),
        "std_ratio": float(values.std() / around.std()),
        "skewness": float((centred**3).mean()),
        "kurtosis": float((centred**4).mean() - 3),
        "p10_hu": float(p10 - p50),
        "p90_hu": float(p90 - p50),
        "noise_ratio": float(noise[core].std() / noise[shell].std()),
        "noise_length_mm": within,
        "noise_length_out_mm": beyond,
        "noise_length_ratio": within / beyond,
        # what varies more slowly than the noise: the lesion's own structure
        "lumps_ratio": float(smooth[core].std() / smooth[shell].std()),
        **co_occurrence(hu - p50, core),
    }


def co_occurrence(hu: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """Contrast, homogeneity and correlation of the grey-level co-occurrence matrix.

    Of neighbours (13 directions, 1 voxel) both in ``region``; ``hu`` relative to the region's
    median, so that how dark a lesion is counts once, as its contrast.
    """
    low, high = BIN_RANGE
    levels = int((high - low) / BIN_HU)
    grey = np.clip((hu - low) / BIN_HU, 0, levels - 1).astype(int)
    matrix = np.zeros((levels, levels))
    for step in product((-1, 0, 1), repeat=3):
        if step <= (0, 0, 0):
            continue
        here, there = _shifted(step)
        both = region[here] & region[there]
        np.add.at(matrix, (grey[here][both], grey[there][both]), 1)
    if not matrix.any():
        return dict.fromkeys(FEATURES["texture"][:3], float("nan"))
    matrix = (matrix + matrix.T) / (2 * matrix.sum())
    i, j = np.indices(matrix.shape)
    mean = (i * matrix).sum()
    variance = ((i - mean) ** 2 * matrix).sum()
    covariance = ((i - mean) * (j - mean) * matrix).sum()
    return {
        "glcm_contrast": float(((i - j) ** 2 * matrix).sum()),
        "glcm_homogeneity": float((matrix / (1 + (i - j) ** 2)).sum()),
        "glcm_correlation": float(covariance / variance) if variance > 0 else float("nan"),
    }


def noise_length(
    noise: np.ndarray, region: np.ndarray, longest: int = 4, axes: tuple[int, ...] = (0, 1)
) -> float:
    """Lag in mm, by default along x and y, at which the noise's autocorrelation falls to a half."""
    variance = noise[region].var()
    if variance == 0:
        return float("nan")
    mean, last = noise[region].mean(), 1.0
    for lag in range(1, longest + 1):
        products = []
        for axis in axes:
            step = tuple(lag if a == axis else 0 for a in range(3))
            here, there = _shifted(step)
            both = region[here] & region[there]
            products.append((noise[here][both] - mean) * (noise[there][both] - mean))
        together = np.concatenate(products)
        now = together.mean() / variance if len(together) else float("nan")
        if not now > 0.5:
            return float(lag - 1 + (last - 0.5) / (last - now))
        last = now
    return float(longest)


def edge(hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray, contrast: float) -> dict[str, float]:
    """How the mean HU goes from inside to outside along the distance from the outline.

    edge_width_mm: 10 to 90 % of an error function fitted to the profile in steps of 1 mm;
    edge_offset_mm: its middle, positive outside the outline; edge_gradient: the steepest mean
    gradient magnitude (Gaussian, 1 mm) of the profile, less the organ's own (noise has gradients).
    """
    nothing = dict.fromkeys(("edge_width_mm", "edge_offset_mm", "edge_gradient"), float("nan"))
    gradient = ndimage.gaussian_gradient_magnitude(hu, 1.0)
    where, profile, slopes, counts = [], [], [], []
    for ring, signed in rings(tumor, organ):
        where.append(signed)
        profile.append(hu[ring].mean())
        slopes.append(gradient[ring].mean())
        counts.append(ring.sum())
    at, steep = np.array(where), np.array(slopes)
    if (at < 0).sum() < 2 or (at > 3).sum() < 2 or not abs(contrast) >= LEAST_CONTRAST_HU:
        return nothing

    def model(d: np.ndarray, inner: float, outer: float, offset: float, sigma: float) -> Any:
        return outer + (inner - outer) * special.erfc((d - offset) / (np.sqrt(2) * sigma)) / 2

    outer = profile[-1]
    try:
        (_, _, offset, sigma), _ = optimize.curve_fit(
            model,
            at,
            profile,
            p0=(outer + contrast, outer, 0.0, 1.0),
            sigma=1 / np.sqrt(counts),
            bounds=((-1100, -1100, -4, 0.1), (1100, 1100, 4, 5)),
        )
    except RuntimeError:  # no fit within the default number of steps
        return nothing
    ninety = 2 * np.sqrt(2) * special.erfinv(0.8)
    return {
        "edge_width_mm": float(ninety * sigma),
        "edge_offset_mm": float(offset),
        "edge_gradient": float(steep[abs(at) < 4].max() - steep[at > 3].mean()),
    }


def rings(tumor: np.ndarray, organ: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Voxels of lesion or organ 1 mm further out each, from 8 mm inside the outline to 8 outside.

    With their mean distance from the outline, negative inside; where there are at least 10.
    """
    signed = np.where(
        tumor,
        0.5 - ndimage.distance_transform_edt(tumor),
        ndimage.distance_transform_edt(~tumor) - 0.5,
    )
    for low in np.arange(-8.0, 8.0):
        ring = (tumor | organ) & (signed >= low) & (signed < low + 1)
        if ring.sum() >= 10:
            yield ring, float(signed[ring].mean())


def radial_profile(hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray) -> dict[int, float]:
    """Mean HU less the organ's 2 to 8 mm outside, by mm from the outline (-1: 0 to 1 mm inside)."""
    outside = ndimage.distance_transform_edt(~tumor)
    shell = organ & (outside > 2) & (outside < 8)
    level = np.median(hu[shell]) if shell.any() else np.nan
    found = rings(tumor, organ)
    return {int(np.floor(far)): float(hu[ring].mean() - level) for ring, far in found}


def shape(tumor: np.ndarray) -> dict[str, float]:
    """Sphericity (surface from the blurred mask's gradient) and the ratio of the two long axes."""
    soft = np.pad(tumor, 4).astype(float)
    surface = ndimage.gaussian_gradient_magnitude(soft, 1.0).sum()
    volume = tumor.sum()
    spread = np.cov(np.argwhere(tumor).T) if volume > 3 else np.eye(3)
    axes = np.sqrt(np.maximum(np.linalg.eigvalsh(spread), 1e-6))
    return {
        "sphericity": float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface),
        "elongation": float(axes[1] / axes[2]),
    }


def probes(
    hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray, most: int = 12
) -> list[dict[str, float]]:
    """Features of disjoint balls of 3 mm radius, 2 mm or more inside the outline, deepest first."""
    depth = ndimage.distance_transform_edt(tumor)
    outside = ndimage.distance_transform_edt(~tumor)
    shell = organ & (outside > 2) & (outside < 8)
    grid = np.stack(np.indices(tumor.shape), -1)
    rows: list[dict[str, float]] = []
    while len(rows) < most and depth.max() >= PROBE_MM + 2 and shell.any():
        centre = np.unravel_index(depth.argmax(), depth.shape)
        away = np.linalg.norm(grid - np.array(centre), axis=-1)
        rows.append(inside(hu, away <= PROBE_MM, shell))
        depth = np.where(away <= 2 * PROBE_MM, 0, depth)
    return rows


def table(rows: list[dict[str, float]], names: tuple[str, ...]) -> np.ndarray:
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], float)


def deepest(tumor: np.ndarray) -> np.ndarray:
    """The 100 voxels farthest from the outline, or all of a smaller lesion.

    The same number in small and large lesions, and clear of real outlines, which are generous.
    """
    where = np.argwhere(tumor)
    depth = ndimage.distance_transform_edt(tumor)[tumor]
    far = np.linalg.norm(where - where[depth.argmax()], axis=1)
    core = np.zeros_like(tumor)
    core[tuple(where[np.lexsort((far, -depth))[:CORE_VOXELS]].T)] = True
    return core


def core_contrast(hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray) -> float:
    """Median of a lesion's inner half less that of the organ 2 to 8 mm around; NaN without organ.

    The inner half is at least half as deep as the deepest voxel; never fewer than the 100 deepest,
    so that a speck in the middle of a large heterogeneous lesion does not stand for all of it.
    """
    outside = ndimage.distance_transform_edt(~tumor)
    shell = organ & (outside > 2) & (outside < 8)
    if not shell.any():
        return float("nan")
    depth = ndimage.distance_transform_edt(tumor)
    core = deepest(tumor) | (depth >= depth.max() / 2)
    return float(np.median(hu[core]) - np.median(hu[shell]))


def _noise(hu: np.ndarray) -> np.ndarray:
    return hu - ndimage.gaussian_filter(hu, NOISE_SIGMA_MM)


def _shifted(step: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of an array and of the same array moved by a step."""
    here = tuple(slice(max(0, -s), -s if s > 0 else None) for s in step)
    there = tuple(slice(max(0, s), s if s < 0 else None) for s in step)
    return here, there
