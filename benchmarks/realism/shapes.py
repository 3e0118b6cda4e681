"""How far are drawn tumour shapes from real ones?

    python -m benchmarks.realism.shapes SHAPES_DIR ORGAN_MASK_DIR [--draws 2] [--picture FILE]

Kolmogorov-Smirnov distances of drawn tumours from real masks in diameter, elongation, flatness and
sphericity. Real masks carry steps from slice to slice, which are the annotator's and not the
tumour's; "smooth sphericity" is measured after a Gaussian of 1.5 mm and a threshold that keeps the
volume has taken them off, on real and drawn masks alike. "slice convexity" is of the largest axial
slice, in which annotators draw: stars and corners have less of it than ovals. The picture has drawn
outlines alone; outlines.py shows real ones beside them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.stats import ks_2samp

from benchmarks.common import write
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.organ_priors import PRIORS, SizePrior
from tumorsynth.placement.place import place, place_from_params
from tumorsynth.placement.rasterize import flatness
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask, Skip, TumorParams

FEATURES = ("elongation", "flatness", "sphericity", "smooth_sphericity", "slice_convexity")
FILES = {"liver": "msd_liver_tumor.npz", "kidney": "kits23.npz", "cyst": "kits23_cyst.npz"}
LARGEST = {"liver": 60.0, "kidney": 60.0, "cyst": 40.0}
SMALLEST = 8.0  # mm: a shape of fewer than 270 voxels of 1 mm is mostly its grid


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_mask(prior: SizePrior, diameter: float, seed: int) -> np.ndarray:
    """One drawn tumour on a 1 mm grid that is organ all over, turned at random."""
    gen = rng(seed)
    axes, roughness = prior.draw_shape(diameter, gen)
    turn = torch.nn.functional.normalize(torch.randn(4, generator=gen), dim=0).tolist()
    side = int(2.6 * diameter) + 9
    params = TumorParams(
        (side // 2,) * 3, diameter, axes, tuple(turn), roughness, seed, 0, 1.0, diameter
    )
    organ = torch.ones(side, side, side, dtype=torch.bool)
    tumor = place_from_params(params, OrganRegion.of_label(organ, 1), (1.0, 1.0, 1.0))
    assert isinstance(tumor, LocalMask), tumor
    return tumor.mask.numpy()


def sphericity(mask: np.ndarray) -> float:
    """Surface of a ball of the same volume / surface, by the coarea formula at 1 mm."""
    smooth = ndimage.gaussian_filter(np.pad(mask, 5).astype(np.float32), 1.0)
    area = np.sqrt(sum(g**2 for g in np.gradient(smooth))).sum()
    return float(math.pi ** (1 / 3) * (6 * mask.sum()) ** (2 / 3) / area)


def without_steps(mask: np.ndarray) -> np.ndarray:
    """The mask without steps between slices: filtered, and as many voxels as before."""
    smooth = ndimage.gaussian_filter(np.pad(mask, 3).astype(np.float32), 1.5)
    count = int(mask.sum())
    return smooth >= np.partition(smooth.ravel(), -count)[-count]


def convexity(plane: np.ndarray) -> float:
    """Area over that of the convex hull, of a bool plane, by its pixels' corners."""
    corners = np.argwhere(plane)
    corners = np.concatenate([corners + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return float(plane.sum() / ConvexHull(corners).volume)


def features(mask: np.ndarray) -> tuple[float, float, float, float, float]:
    """As named in FEATURES; elongation is axis 2 / axis 1, flatness axis 3 / axis 1."""
    where = np.argwhere(mask).astype(float)
    short, middle, long = np.sqrt(np.linalg.eigvalsh(np.cov(where.T, bias=True)) + 1 / 12)
    spheres = sphericity(mask), sphericity(without_steps(mask))
    return middle / long, short / long, *spheres, convexity(mask[:, :, mask.sum((0, 1)).argmax()])


def real_masks(file: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """All masks of a file and their equivalent diameters in mm."""
    data = np.load(file)
    bits, offset = data["bits"], data["offset"]
    found = []
    for k, shape in enumerate(data["shape"]):
        mask = np.unpackbits(bits[offset[k] : offset[k + 1]])[: np.prod(shape)]
        found.append(mask.reshape(shape).astype(bool))
    return found, np.array([(6 * m.sum() / math.pi) ** (1 / 3) for m in found])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(ks_2samp(a, b).statistic), 3)


def compare(name: str, folder: Path, draws: int, most: int) -> dict:
    """One prior against the masks it is fitted to."""
    prior = PRIORS[name]
    found, diameters = real_masks(folder / FILES[name])
    lo, hi = prior.range_mm
    sizes = np.array([prior.draw_diameter(lo, hi, rng(k)) for k in range(2000)])
    chosen = np.flatnonzero((diameters >= SMALLEST) & (diameters <= LARGEST[name]))
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(most, len(chosen))).astype(int)]
    real = np.array([features(found[k]) for k in chosen])
    drawn = np.array(
        [
            features(drawn_mask(prior, float(diameters[k]), 1000 * turn + i))
            for turn in range(draws)
            for i, k in enumerate(chosen)
        ]
    )
    known = diameters[(diameters >= lo) & (diameters <= hi)]
    return {
        "real": len(real),
        "drawn": len(drawn),
        "ks": {
            "diameter": distance(known, sizes),
            **{f: distance(real[:, i], drawn[:, i]) for i, f in enumerate(FEATURES)},
        },
        "percentiles_5_50_95": {
            f: {
                kind: np.percentile(values[:, i], [5, 50, 95]).round(3).tolist()
                for kind, values in (("real", real), ("drawn", drawn))
            }
            for i, f in enumerate(FEATURES)
        },
    }


def placed(name: str, folder: Path, draws: int) -> dict:
    """The same prior inside real organs, whose surface cuts tumours."""
    flat, ratio, reasons = [], [], 0
    files = sorted(folder.glob(f"{name}_*.nii.gz"))
    for file in files:
        scan = nib.load(file)
        label = torch.from_numpy(np.asarray(scan.dataobj).astype(np.uint8))
        spacing = [float(s) for s in scan.header.get_zooms()[:3]]
        region = OrganRegion.of_label(label, 1)
        settings = PlacementSettings(size_mm=(8, 30), prior=name)
        for seed in range(draws):
            (tumor,) = place(region, spacing, settings, rng(seed))
            if isinstance(tumor, Skip):
                reasons += 1
                continue
            flat.append(flatness(tumor.mask, spacing))
            ratio.append(tumor.diameter_mm / tumor.params.drawn_mm)
    return {
        "organs": len(files),
        "tumours": len(flat),
        "skipped": reasons,
        "flatness_5_50_95": np.percentile(flat, [5, 50, 95]).round(3).tolist(),
        "made_smaller_than_drawn": round(float(np.mean(np.array(ratio) < 0.98)), 3),
    }


def outlines(names: list[str], path: Path, sizes: tuple[float, ...]) -> None:
    """Drawn outlines in their largest slice, ten of each size, at one scale per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, size) for name in names for size in sizes]
    fig, axes = plt.subplots(len(rows), 10, figsize=(10, len(rows)))
    for row, (name, size) in zip(axes, rows, strict=True):
        for k, axis in enumerate(row):
            mask = drawn_mask(PRIORS[name], size, k)
            plane = np.pad(mask[:, :, mask.sum((0, 1)).argmax()], 2)
            axis.imshow(plane, cmap="gray", vmin=-0.3, vmax=1.4)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{name}\n{size:g} mm", fontsize=8)
    fig.tight_layout(pad=0.3)
    fig.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("organs", type=Path)
    parser.add_argument("--draws", type=int, default=2, help="drawn tumours for each real one")
    parser.add_argument("--most", type=int, default=220, help="real masks measured per prior")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {"smallest_mm": SMALLEST, "largest_mm": LARGEST, "free": {}, "in_organs": {}}
    for name in FILES:
        results["free"][name] = compare(name, args.shapes, args.draws, args.most)
        print(name, results["free"][name]["ks"], flush=True)
    for name in ("liver", "kidney", "pancreas"):
        results["in_organs"][name] = placed(name, args.organs, 50)
        print(name, results["in_organs"][name], flush=True)
    write("shapes", results)
    if args.picture:
        outlines(["liver", "kidney", "cyst", "pancreas"], args.picture, (9.0, 14.0, 28.0))


if __name__ == "__main__":
    main()
