"""Outline livers and tumours of three CC BY scans: thresholds and regions corrected by eye.

    python -m benchmarks.realism.annotations.outline CT_DIR -o benchmarks/realism/annotations

CT_DIR holds NAME_ct.nii.gz of the scans named in regions.json, cropped as README.md says. Writes
NAME_label.nii.gz (uint8: 1 liver, 2 tumour) on the same grid. The regions, in voxels, were chosen
and corrected by the project's authors, who are not radiologists, on enlarged slices. A metastasis
is what is darker than the liver by 40 % of the lesion's own contrast, in an ellipse on each slice;
the heterogeneous hepatocellular carcinoma is a polygon on each slice. The liver is a HU range
without what the polygons cut off.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

REGIONS = Path(__file__).with_name("regions.json")
CONTRAST_SHARE = 0.4  # of a lesion's contrast, at which its edge lies
EDGE_MM = 1.2  # below the organ's surface, where partial volume looks like a lesion
FLUID_HU = 45.0  # darker than any of these metastases' rims; used for their core only
SMOOTH_MM = 0.8  # in the plane; slices are thick
LEAST_VOXELS = 12  # of a part of a lesion on one slice
LIVER_OPENING_MM, LIVER_CLOSING_MM = 5.0, 4.0
LARGEST_VESSEL_MM2 = 400.0  # a hole of the liver on one slice that is filled

Points = list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    for name, regions in json.loads(REGIONS.read_text()).items():
        image = nibabel.load(args.scans / f"{name}_ct.nii.gz")  # type: ignore[attr-defined]
        spacing = tuple(float(mm) for mm in image.header.get_zooms()[:3])
        hu = np.asarray(image.dataobj, dtype=np.float32)
        label = outline(hu, spacing, regions)
        path = args.out / f"{name}_label.nii.gz"
        nibabel.save(nibabel.Nifti1Image(label, image.affine), path)  # type: ignore[attr-defined]
        parts, count = ndimage.label(label == 2, np.ones((3, 3, 3)))
        volumes = ndimage.sum(label == 2, parts, range(1, count + 1)) * np.prod(spacing)
        sizes = ", ".join(f"{(6 * v / np.pi) ** (1 / 3):.1f}" for v in volumes)
        liver_ml = float((label > 0).sum() * np.prod(spacing) / 1000)
        print(f"{name}: liver {liver_ml:.0f} ml, tumours of {sizes or 'none'} mm")


def outline(hu: np.ndarray, spacing: tuple[float, ...], regions: dict[str, Any]) -> np.ndarray:
    """Return the label (X, Y, Z): 1 liver, 2 tumour."""
    tumor = np.zeros(hu.shape, bool)
    for lesion in regions.get("lesions", []):
        tumor |= darker_part(hu, spacing, lesion, regions["liver"]["range_hu"])
    for z, points in regions.get("polygons", {}).items():
        drawn = polygon(hu.shape[:2], points)
        tumor[:, :, int(z)] |= smooth_outline(drawn & in_plane(hu, spacing, int(z), 55.0, 260.0))
    organ = liver(hu, spacing, regions["liver"])
    for z in range(hu.shape[2]):
        near = ndimage.binary_dilation(tumor[:, :, z], iterations=4)
        organ[:, :, z] |= tumor[:, :, z]
        organ[:, :, z] |= fill_holes(organ[:, :, z], np.inf) & near
    for z, *circle in regions.get("not_liver", []):  # cysts
        organ[:, :, int(z)] &= ~ellipse(hu.shape[:2], circle)
    return (organ.astype(np.uint8) + tumor).astype(np.uint8)


def darker_part(
    hu: np.ndarray, spacing: tuple[float, ...], lesion: dict[str, Points], liver_hu: list[float]
) -> np.ndarray:
    """The part of a lesion's ellipses that is darker than the liver around it."""
    sigma = (SMOOTH_MM / spacing[0], SMOOTH_MM / spacing[1], 0)
    smooth = ndimage.gaussian_filter(hu, sigma)
    plane = hu.shape[:2]
    bounds = {int(z): ellipse(plane, part) for z, part in lesion.items()}
    solid = [smooth[:, :, z][inside & (smooth[:, :, z] > FLUID_HU)] for z, inside in bounds.items()]
    middle = min(float(np.percentile(values, 10)) for values in solid)
    mask = np.zeros(hu.shape, bool)
    for z, inside in bounds.items():
        values = smooth[:, :, z]
        x, y, *radii = lesion[str(z)]
        wide, near = (ellipse(plane, [x, y, *(r + more for r in radii)]) for more in (10, 3))
        around = values[wide & ~near & (values > liver_hu[0]) & (values < liver_hu[1])]
        level = float(np.median(around))
        edge = level + CONTRAST_SHARE * (middle - level)
        body = ndimage.binary_closing(fill_holes(values > 60, np.inf), disk(8))
        within = ndimage.distance_transform_edt(body) * spacing[0] > EDGE_MM
        mask[:, :, z] = smooth_outline(inside & within & (values < edge)) & inside & within
    return mask


def smooth_outline(mask: np.ndarray) -> np.ndarray:
    """A mask (X, Y) without threads, holes and specks."""
    mask = ndimage.binary_closing(np.pad(mask, 4), iterations=2)[4:-4, 4:-4]
    mask = ndimage.gaussian_filter(fill_holes(mask, np.inf).astype(float), 1.0) > 0.5
    parts, count = ndimage.label(mask)
    sizes = ndimage.sum(mask, parts, range(1, count + 1))
    return np.isin(parts, [k + 1 for k, n in enumerate(sizes) if n >= LEAST_VOXELS])


def in_plane(
    hu: np.ndarray, spacing: tuple[float, ...], z: int, low: float, high: float
) -> np.ndarray:
    """Where a slice, smoothed, lies in a HU range or is enclosed by such voxels."""
    values = ndimage.gaussian_filter(hu[:, :, z], 2.0 / spacing[0])
    return fill_holes((values > low) & (values < high), LARGEST_VESSEL_MM2 / spacing[0] ** 2)


def liver(hu: np.ndarray, spacing: tuple[float, ...], given: dict[str, Any]) -> np.ndarray:
    """The liver with its vessels."""
    mm = spacing[0]
    smooth = ndimage.gaussian_filter(hu, (1.0 / mm, 1.0 / mm, 0))
    low, high = given["range_hu"]
    organ = np.zeros(hu.shape, bool)
    first, last = given["slices"]
    for z in range(first, last + 1):
        allowed = np.ones(hu.shape[:2], bool)
        for start, stop, points in given["cut"]:
            if start <= z <= stop:
                allowed &= ~polygon(hu.shape[:2], points)
        kept = [points for start, stop, points in given.get("keep", []) if start <= z <= stop]
        if kept:
            allowed &= np.any([polygon(hu.shape[:2], points) for points in kept], 0)
        shells = fill_holes(smooth[:, :, z] > given["bone_hu"], np.inf)
        ribs = fill_holes(ndimage.binary_closing(shells, disk(LIVER_CLOSING_MM / mm)), np.inf)
        allowed &= ~ndimage.binary_dilation(ribs, disk(1))
        tissue = allowed & (smooth[:, :, z] > low) & (smooth[:, :, z] < high)
        tissue = ndimage.binary_closing(tissue, iterations=1)
        tissue = fill_holes(tissue, LARGEST_VESSEL_MM2 / mm**2)
        tissue = ndimage.binary_opening(tissue, disk(LIVER_OPENING_MM / mm))
        closed = ndimage.binary_closing(np.pad(tissue, 12), disk(LIVER_CLOSING_MM / mm))
        tissue = fill_holes(closed[12:-12, 12:-12], LARGEST_VESSEL_MM2 / mm**2) & allowed
        organ[:, :, z] = ndimage.binary_opening(tissue, disk(LIVER_OPENING_MM / mm))
    parts, _ = ndimage.label(organ)
    seed = parts[tuple(given["seed"])]
    if not seed:
        raise SystemExit(f"the seed {given['seed']} is not in the liver")
    return np.asarray(parts == seed)


def fill_holes(mask: np.ndarray, most: float) -> np.ndarray:
    """Fill the holes of a mask (X, Y) of at most so many voxels."""
    holes = ndimage.binary_fill_holes(mask) & ~mask
    parts, count = ndimage.label(holes)
    sizes = ndimage.sum(holes, parts, range(1, count + 1))
    return mask | np.isin(parts, [k + 1 for k, n in enumerate(sizes) if n <= most])


def polygon(plane: tuple[int, ...], points: Points) -> np.ndarray:
    """The voxels (X, Y) in a polygon."""
    drawing = Image.new("1", (plane[0], plane[1]), 0)
    ImageDraw.Draw(drawing).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.array(drawing).T


def ellipse(plane: tuple[int, ...], given: list[float]) -> np.ndarray:
    """The voxels (X, Y) in an ellipse of centre x, y and radii along x, y."""
    x, y = np.ogrid[: plane[0], : plane[1]]
    return ((x - given[0]) / given[2]) ** 2 + ((y - given[1]) / given[3]) ** 2 <= 1


def disk(radius: float) -> np.ndarray:
    reach = int(np.ceil(radius))
    x, y = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return x * x + y * y <= radius * radius + 1e-6


if __name__ == "__main__":
    main()
