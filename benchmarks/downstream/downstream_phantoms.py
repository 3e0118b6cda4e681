"""A cohort of phantom patients with lesions that none of our generators made.

    python -m benchmarks.downstream.downstream_phantoms OUT --annotated 24 --healthy 12 \\
        [--shapes msd_liver_tumor.npz]

writes scans, labels (1 liver, 2 tumour) and a dataset.json for downstream.py. The phantom's anatomy
is the library's; its lesions are not: their masks are real ones (--shapes) or lumps of balls, never
the library's star shapes, and their appearance is a process of its own: darker, brighter, with a
rim, with a core, mottled, sharp or blurred. One patient in three also has cysts, which are no
tumours and are not labelled, and every patient enhances differently.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

import tumorsynth as ts

LIVER, TUMOR = 1, 2
FIRST_SEED = 7000  # of the patients; far from any that a generator was trained on
NOISE_HU = 13.0  # about the phantom's own in the liver
DIAMETERS_MM = (6.0, 36.0)


class Shapes:
    """Masks on a 1 mm grid: real ones from a file of packed masks, else lumps of balls."""

    def __init__(self, path: Path | None = None):
        self.masks: list[np.ndarray] = []
        if path is None:
            return
        with np.load(path) as file:
            bits, offset, shape, volume = (
                file[k] for k in ("bits", "offset", "shape", "volume_ml")
            )
        diameter = 2 * (750 * volume / np.pi) ** (1 / 3)
        for k in np.flatnonzero((diameter >= DIAMETERS_MM[0]) & (diameter <= DIAMETERS_MM[1])):
            voxels = np.unpackbits(bits[offset[k] : offset[k + 1]])[: np.prod(shape[k])]
            self.masks.append(voxels.reshape(shape[k]).astype(bool))
        if not self.masks:
            raise ValueError(f"{path} holds no mask of {DIAMETERS_MM} mm; leave --shapes out")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One mask with a margin of 6 voxels, turned and mirrored at random."""
        mask = self.masks[rng.integers(len(self.masks))] if self.masks else _lump(rng)
        mask = mask.transpose(rng.permutation(3))
        for axis in range(3):
            if rng.random() < 0.5:
                mask = np.flip(mask, axis)
        return np.pad(mask, 6)


def _lump(rng: np.random.Generator) -> np.ndarray:
    """Several overlapping balls, smoothed, cut out of their box."""
    radius = np.exp(rng.uniform(np.log(DIAMETERS_MM[0] / 2), np.log(DIAMETERS_MM[1] / 2)))
    side = int(4 * radius) + 8
    grid = np.indices((side,) * 3) - side / 2
    inside = np.zeros((side,) * 3)
    for _ in range(rng.integers(3, 8)):
        centre = rng.normal(0, 0.35 * radius, (3, 1, 1, 1))
        inside += ((grid - centre) ** 2).sum(0) < (radius * rng.uniform(0.4, 0.8)) ** 2
    inside = ndimage.gaussian_filter(np.minimum(inside, 1), 1.2) > 0.5
    largest = _largest(inside)
    box = ndimage.find_objects(largest.astype(int))
    return largest[box[0]] if box else np.ones((6, 6, 6), bool)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part."""
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count > 1 else mask


def _appearance(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU relative to the liver on the mask's 1 mm grid: kind, core, rim and texture by chance."""
    depth = ndimage.distance_transform_edt(mask)
    kind = rng.choice(["dark", "faint", "bright", "necrotic"], p=[0.45, 0.25, 0.15, 0.15])
    contrast = {
        "dark": rng.uniform(-75, -30),
        "faint": rng.uniform(-30, -12),
        "bright": rng.uniform(20, 60),
        "necrotic": rng.uniform(-50, -20),
    }[kind]
    hu = np.full(mask.shape, contrast)
    if kind == "necrotic":
        hu[depth > 0.45 * depth.max()] -= rng.uniform(20, 45)
    if rng.random() < 0.25:  # a rim, brighter or darker than the rest
        hu[(depth > 0) & (depth <= rng.uniform(1, 2.5))] += rng.choice([-1, 1]) * rng.uniform(
            10, 35
        )
    mottle = ndimage.gaussian_filter(rng.standard_normal(mask.shape), rng.uniform(1, 3.5))
    return hu + mottle * (rng.uniform(3, 14) / mottle.std())


def _paint(
    image: np.ndarray,
    label: np.ndarray,
    mask: np.ndarray,
    hu: np.ndarray,
    spacing: float,
    rng: np.random.Generator,
    value: int | None,
) -> bool:
    """Put one lesion (mask and HU on a 1 mm grid) into the liver, in place; False: no room.

    value: what its voxels become in the label; None leaves the label.
    """
    liver = label == LIVER
    edge = rng.uniform(0.5, 2.0)
    soft = ndimage.gaussian_filter(mask.astype(float), edge)
    filled = np.where(mask, hu, 0.0)
    weight = ndimage.gaussian_filter(mask.astype(float), 2.0) + 1e-6
    hu = np.where(mask, hu, ndimage.gaussian_filter(filled, 2.0) / weight)  # beyond the outline too
    size = [int(np.ceil(n / spacing)) for n in mask.shape]
    places = np.argwhere(liver)
    for _ in range(40):
        low = places[rng.integers(len(places))] - np.array(size) // 2
        if (low < 0).any() or (low + size > image.shape).any():
            continue
        where = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        at = np.indices(size) * spacing
        inside = ndimage.map_coordinates(mask.astype(float), at, order=1) > 0.5
        if not inside.any() or liver[where][inside].mean() < 0.7:
            continue
        inside = _largest(inside & liver[where])
        if (label[where][ndimage.binary_dilation(inside, iterations=2)] == TUMOR).any():
            continue
        share = ndimage.map_coordinates(soft, at, order=1) * liver[where]
        change = ndimage.map_coordinates(hu, at, order=1)
        parenchyma = float(np.median(image[liver]))
        noise = ndimage.gaussian_filter(rng.standard_normal(size), 0.4)
        own = parenchyma + change + noise * (NOISE_HU / noise.std())
        image[where] += share * (own - image[where])
        if value is not None:
            label[where][inside] = value
        return True
    return False


def make_patient(
    seed: int, shapes: Shapes, lesions: bool, spacing: float = 2.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(HU float32, label uint8, affine) of one patient: 200 x 180 x 144 mm around the liver."""
    rng = np.random.default_rng([FIRST_SEED, seed])
    shape = [round(mm / spacing) for mm in (200, 180, 144)]
    ct = ts.make_phantom((spacing,) * 3, shape, seed=FIRST_SEED + seed)
    liver = ct.label[0].numpy() == ts.phantom.LABELS["liver"]
    enhanced = rng.uniform(-18, 18)  # at the liver's level, more in the vessels
    image = np.interp(
        ct.image[0].numpy(), (-1024, 20, 110, 180, 3000), (-1024, 20, 110 + enhanced,
                                                           180 + 1.6 * enhanced, 3000)
    ).astype(np.float32)  # fmt: skip
    label = liver.astype(np.uint8)
    if rng.random() < 1 / 3:
        for _ in range(rng.integers(1, 4)):  # cysts: round, sharp, as water
            radius = rng.uniform(3, 8)
            side = int(2 * radius) + 13
            ball = ((np.indices((side,) * 3) - side // 2) ** 2).sum(0) < radius**2
            water = np.full(ball.shape, rng.uniform(0, 15) - float(np.median(image[liver])))
            _paint(image, label, ball, water, spacing, rng, None)
    if lesions:
        wanted, made = int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])), 0
        for _ in range(20):
            mask = shapes.draw(rng)
            made += _paint(image, label, mask, _appearance(mask, rng), spacing, rng, TUMOR)
            if made == wanted:
                break
    return image, label, ct.affine


def write_cohort(
    folder: Path, annotated: int, healthy: int, shapes: Path | None = None, spacing: float = 2.0
) -> Path:
    """The cohort as NIfTI, and its dataset.json; returns that. What is there already stays."""
    import nibabel as nib

    drawn = Shapes(shapes)
    listed: dict[str, Any] = {"training": [], "healthy": []}
    for seed in range(annotated + healthy):
        name = f"phantom_{seed:03d}"
        kind = "training" if seed < annotated else "healthy"
        entry = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        listed[kind].append({**entry, "patient": name})
        if all((folder / path).is_file() for path in entry.values()):
            continue
        image, label, affine = make_patient(seed, drawn, kind == "training", spacing)
        for path, values in zip(
            entry.values(), (image.round().astype(np.int16), label), strict=True
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, affine), folder / path)
    path = folder / "dataset.json"
    path.write_text(
        json.dumps({"organ_labels": [LIVER], "tumor_labels": [TUMOR], **listed}, indent=1)
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--annotated", type=int, default=24, help="patients with lesions")
    parser.add_argument("--healthy", type=int, default=12)
    parser.add_argument("--spacing", type=float, default=2.0, help="mm")
    parser.add_argument("--shapes", type=Path, help="real masks (.npz); else lumps of balls")
    args = parser.parse_args()
    print(write_cohort(args.out, args.annotated, args.healthy, args.shapes, args.spacing))


if __name__ == "__main__":
    main()
