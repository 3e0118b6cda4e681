"""Pack annotated and healthy scans into one array file, on one grid, around the organ.

    python -m benchmarks.downstream.pack SCANS.json CT_DIR [LABEL_DIR ...] -o pack.npz

SCANS.json lists the scans (liver.json is the one that the benchmark uses); CT_DIR holds
NAME_ct.nii.gz, and CT_DIR or a LABEL_DIR holds NAME_label.nii.gz. Training needs the pack alone:
neither nibabel nor the files. The pack holds parts of the scans: mind their terms.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.downstream.files import write_whole

MARGIN_MM = 30.0  # around the organ
AIR_HU = -1024
TOUCHING = np.ones((3, 3, 3))
BLUR = 0.35  # standard deviation before resampling, in voxels of the coarser grid


@dataclass(frozen=True)
class Scan:
    """One scan on the working grid, axes x, y, z from left to right, back to front, foot to head.

    Attributes:
        name: of the file.
        patient: whose scan it is.
        phase: of contrast.
        spacing: mm.
        hu: (X, Y, Z) int16.
        organ: (X, Y, Z) bool, the organ with its tumours.
        lesions: (X, Y, Z) uint8, the number of each tumour from 1 on, 0 elsewhere.
        diameters_mm: equivalent diameters on the file's own grid, of tumour 1, 2, ...
    """

    name: str
    patient: str
    phase: str
    spacing: tuple[float, float, float]
    hu: np.ndarray = field(repr=False)
    organ: np.ndarray = field(repr=False)
    lesions: np.ndarray = field(repr=False)
    diameters_mm: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("list", type=Path, metavar="SCANS.json")
    parser.add_argument("folders", type=Path, nargs="+", metavar="CT_DIR")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 2.5), help="mm")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    listed = json.loads(args.list.read_text())
    organs, tumors = listed["organ_labels"], listed["tumor_labels"]
    scans = [
        read_scan(entry, args.folders, organs, tumors, args.spacing) for entry in listed["scans"]
    ]
    save_pack(scans, args.out)
    for scan in scans:
        sizes = ", ".join(f"{d:.1f}" for d in scan.diameters_mm)
        print(f"{scan.name}: {scan.hu.shape} voxels, tumours of {sizes or 'no'} mm", flush=True)


def read_scan(
    entry: dict[str, Any],
    folders: Sequence[Path],
    organ_labels: Sequence[int],
    tumor_labels: Sequence[int],
    spacing: Sequence[float],
) -> Scan:
    """Read CT and label, number the tumours, and resample what lies around the organ."""
    from tumorsynth.scans import nifti, volume_files

    name = entry["name"]
    ct = volume_files.read_volume(folders[0] / f"{name}_ct.nii.gz")
    candidates = [folder / f"{name}_label.nii.gz" for folder in folders]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {candidates[0].name} in {', '.join(map(str, folders))}")
    annotation = volume_files.read_volume(found)
    volume_files.check_same_grid(ct, annotation, "CT and label", nifti.Reading())
    values = annotation.integers()
    tumor = np.isin(values, list(tumor_labels))
    organ = np.isin(values, list(organ_labels)) | tumor
    lesions, count = ndimage.label(tumor, TOUCHING)
    mm = np.linalg.norm(ct.affine[:3, :3], axis=0)
    volumes = np.bincount(lesions.ravel(), minlength=count + 1)[1:] * mm.prod()
    hu, organ, lesions = (to_ras(array, ct.affine) for array in (ct.values(), organ, lesions))
    mm = mm[ras_axes(ct.affine)]
    hu, organ, lesions = cut_around(organ, mm, hu, organ, lesions)
    sampled = Scan(
        name=name,
        patient=entry.get("patient", name),
        phase=entry.get("phase", ""),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        hu=resample(hu, mm, spacing, order=1).round().astype(np.int16),
        organ=resample(organ.astype(np.float32), mm, spacing, order=1) >= 0.5,
        lesions=resample(lesions, mm, spacing, order=0).astype(np.uint8),
        diameters_mm=tuple(float(d) for d in (6 * volumes / np.pi) ** (1 / 3)),
    )
    lost = set(range(1, count + 1)) - set(np.unique(sampled.lesions).tolist())
    if lost:
        raise ValueError(f"{name}: {spacing} mm is too coarse for tumours {sorted(lost)}")
    organ = sampled.organ | (sampled.lesions > 0)
    return Scan(**{**vars(sampled), "organ": organ})


def ras_axes(affine: np.ndarray) -> np.ndarray:
    """Which array axis lies along x, y and z."""
    axes = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).argmax(1)
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"axes must lie near those of the patient, got {affine.tolist()}")
    return np.asarray(axes)


def to_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn an array so that its axes point to the right, to the front and to the head."""
    axes = ras_axes(affine)
    flipped = [k for k, axis in enumerate(axes) if affine[k, axis] < 0]
    return np.flip(array.transpose(axes), flipped)


def cut_around(organ: np.ndarray, mm: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """Cut arrays to the organ's box with a margin."""
    (box,) = ndimage.find_objects(organ.astype(np.uint8))
    margin = np.ceil(MARGIN_MM / mm).astype(int)
    where = tuple(
        slice(max(0, part.start - m), part.stop + m) for part, m in zip(box, margin, strict=True)
    )
    return [array[where] for array in arrays]


def resample(
    array: np.ndarray, mm: Sequence[float] | np.ndarray, to_mm: Sequence[float], order: int
) -> np.ndarray:
    """Resample to voxels of another size; the outer faces stay where they are.

    Args:
        array: (X, Y, Z).
        mm: its voxels.
        to_mm: the new voxels.
        order: 0 takes the nearest voxel, 1 is linear and blurs before it makes voxels larger.
    """
    step = np.asarray(to_mm, float) / np.asarray(mm, float)
    shape = np.maximum(1, np.floor(np.array(array.shape) / step)).astype(int)
    if order:
        array = ndimage.gaussian_filter(array.astype(np.float32), BLUR * step * (step > 1))
    return np.asarray(
        ndimage.affine_transform(
            array, step, (step - 1) / 2, tuple(shape), order=order, mode="nearest"
        )
    )


def save_pack(scans: Sequence[Scan], path: Path) -> None:
    """Write all scans into one compressed .npz."""
    arrays: dict[str, np.ndarray] = {}
    about = []
    for scan in scans:
        parts = vars(scan)
        for key in ("hu", "organ", "lesions"):
            arrays[f"{scan.name}/{key}"] = parts[key]
        about.append({k: v for k, v in parts.items() if k not in ("hu", "organ", "lesions")})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def load_pack(path: Path) -> dict[str, Scan]:
    """Read a pack: its scans by name."""
    with np.load(path) as file:
        return {
            about["name"]: Scan(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in about.items()},
                **{key: file[f"{about['name']}/{key}"] for key in ("hu", "organ", "lesions")},
            )
            for about in json.loads(str(file["about"]))
        }


if __name__ == "__main__":
    main()
