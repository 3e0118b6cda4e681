"""Blinded volumes: all that tells a synthetic from a real scan beside its picture is taken away.

Every case is written anew from its voxels: int16 HU within one range, axes to RAS, a header that
holds the shape and the spacing alone, no compression. So two cases on one grid are files of one
size and one header. What cannot be made alike is said by `differences`.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.scans import nifti
from tumorsynth.scans.pairing import find_pairs

HU_RANGE = (-1024, 3071)  # 12 bits, as scanners store them; what lies beyond is cut off in all
MIN_LESION_ML = 0.02  # a smaller part of a label is a stray voxel, not a lesion (about 3.4 mm)
LESIONS = ("largest", "each")


@dataclass(frozen=True)
class Scan:
    """A scan of the study, as found. truth: "real" or "synthetic"."""

    truth: str
    ct: Path
    label: Path | None


@dataclass(frozen=True)
class Traits:
    """What of a case might tell where it comes from; `differences` compares them."""

    truth: str
    dtype: str
    whole_hu: bool
    orientation: str
    spacing: tuple[float, float, float]  # mm, axes in RAS
    shape: tuple[int, int, int]  # voxels, of the blinded volume
    hu_range: tuple[float, float]  # of the scan
    diameter_mm: float | None  # of the lesion


@dataclass(frozen=True)
class Case:
    """One blinded case.

    hu: (X, Y, Z) int16, axes in RAS. spacing: mm. mark: voxel of the lesion's centre, or None.
    source: file name and lesion number; for the study's records, never for the page.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    mark: tuple[int, int, int] | None
    source: str
    traits: Traits

    def nifti(self) -> bytes:
        """A NIfTI file, uncompressed: its size follows from the shape alone."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = -(np.array(self.hu.shape) - 1) / 2 * self.spacing
        image = nifti.require_nibabel().Nifti1Image(self.hu, affine, dtype=np.int16)
        image.header.set_xyzt_units("mm")
        return image.to_bytes()


@dataclass(frozen=True)
class Lesion:
    """centre: the voxel of the lesion nearest to its centre of mass. diameter_mm: equivalent."""

    centre: np.ndarray
    diameter_mm: float


class Vault:
    """Volumes in one unnamed file: it is gone with the process, however that ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._lock = threading.Lock()

    def put(self, volume: bytes) -> Callable[[], bytes]:
        """Keeps a volume; returns what reads it again."""
        with self._lock:
            place = self._file.seek(0, 2)
            self._file.write(volume)
            self._file.flush()

        def get() -> bytes:
            with self._lock:
                self._file.seek(place)
                return self._file.read(len(volume))

        return get


def find_scans(folder: Path, truth: str, labels: Path | None = None) -> list[Scan]:
    """The scans of a folder, by name.

    With ``labels``, a folder: every .nii[.gz] with its namesake there. Without: every
    NAME_ct.nii[.gz], with NAME_label.nii[.gz] beside it or not; where there is none of these,
    every .nii[.gz]. ValueError where only some scans have a label, and where there is no scan.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--{truth} must be a folder of CTs, but there is no {folder}")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(f"--{truth}: the folder {folder} holds no .nii or .nii.gz; give the CTs")
    if labels is None and not any(
        path.name.endswith(("_ct.nii", "_ct.nii.gz", "_label.nii", "_label.nii.gz"))
        for path in files
    ):
        return [Scan(truth, path, None) for path in files]
    pairs = [
        pair
        for pair in find_pairs(folder, labels)
        if not pair.ct.name.endswith(("_label.nii", "_label.nii.gz"))
    ]
    without = [pair for pair in pairs if not pair.label.is_file()]
    if without and (labels is not None or len(without) < len(pairs)):
        raise ValueError(
            f"either every scan needs a label or none, but {without[0].ct.name} in {folder} has no "
            f"{without[0].label.name}; add it, or give a folder without labels"
        )
    return [Scan(truth, pair.ct, None if without else pair.label) for pair in pairs]


def blind(
    scan: Scan, *, tumor_label: int, lesions: str = "largest", field_mm: float | None = None
) -> list[Case]:
    """The cases of one scan: without a label one, unmarked; else one per lesion marked.

    lesions: "largest" of the scan alone, or "each" of at least 0.02 ml. field_mm: edge of the cube
    shown around the mark (around the scan's centre where there is none), moved into the scan where
    it sticks out; None shows the whole scan.
    """
    if lesions not in LESIONS:
        raise ValueError(f"--lesions must be {' or '.join(LESIONS)}, got {lesions!r}")
    if field_mm is not None and not 0 < field_mm < float("inf"):
        raise ValueError(f"--field-mm must be more than 0 mm and finite, got {field_mm:g}; try 120")
    orientations = nifti.require_nibabel().orientations
    if scan.label is None:
        volume, label = nifti.read_volume(scan.ct), None
    else:
        volume, label = nifti.read_pair(scan.ct, scan.label)
    turn = orientations.io_orientation(volume.affine)
    values = orientations.apply_orientation(volume.values(), turn)
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)[turn[:, 0].argsort()]
    x, y, z = (round(float(e), 3) for e in edges)  # files hold float32, rounded here or there
    values = np.nan_to_num(values, nan=HU_RANGE[0], posinf=HU_RANGE[1], neginf=HU_RANGE[0])
    hu = np.rint(np.clip(values, *HU_RANGE)).astype(np.int16)
    found: list[Lesion | None] = [None]
    if label is not None:
        mask = orientations.apply_orientation(label.integers(), turn) == tumor_label
        found = [*_lesions(mask, (x, y, z))]
        if not found:
            raise ValueError(
                f"every label needs a lesion to mark, but {label.name} holds none of at least "
                f"{MIN_LESION_ML} ml with the value {tumor_label}; see --tumor-label and "
                "--synthetic-tumor-label"
            )
    cases = []
    for number, lesion in enumerate(found[:1] if lesions == "largest" else found, start=1):
        centre = np.array(hu.shape) // 2 if lesion is None else lesion.centre
        start, size = _field(hu.shape, centre, (x, y, z), field_mm)
        part = hu[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        traits = Traits(
            truth=scan.truth,
            dtype=str(volume.stored.dtype),
            whole_hu=bool((values == np.rint(values)).all()),
            orientation="".join(orientations.aff2axcodes(volume.affine)),
            spacing=(x, y, z),
            shape=part.shape,
            hu_range=(float(values.min()), float(values.max())),
            diameter_mm=None if lesion is None else lesion.diameter_mm,
        )
        i, j, k = (int(v) for v in centre - start)
        mark = None if lesion is None else (i, j, k)
        cases.append(Case(part, (x, y, z), mark, f"{scan.ct.name} {number}", traits))
    return cases


def _lesions(mask: np.ndarray, spacing: Sequence[float]) -> list[Lesion]:
    """The connected parts of a mask, corners connect, largest first."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    found = []
    for k, box in enumerate(ndimage.find_objects(parts), start=1):
        voxels = np.argwhere(parts[box] == k) + [s.start for s in box]
        volume = len(voxels) * float(np.prod(spacing))
        if volume >= MIN_LESION_ML * 1000:
            far = (((voxels - voxels.mean(0)) * spacing) ** 2).sum(1)
            found.append(Lesion(voxels[far.argmin()], (6 * volume / np.pi) ** (1 / 3)))
    return sorted(found, key=lambda lesion: -lesion.diameter_mm)


def _field(
    shape: Sequence[int], centre: np.ndarray, spacing: Sequence[float], field_mm: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and shape of what is shown."""
    size = np.array(shape)
    if field_mm is not None:
        size = np.minimum(size, np.maximum(1, np.rint(field_mm / np.array(spacing)).astype(int)))
    return np.clip(centre - size // 2, 0, np.array(shape) - size), size


def differences(traits: Sequence[Traits]) -> list[str]:
    """What still tells real from synthetic after blinding, and what only did so before."""
    if len({t.diameter_mm is None for t in traits}) > 1:
        raise ValueError(
            "a mark must not tell real from synthetic: give labels for both folders, or for neither"
        )
    real = [t for t in traits if t.truth == "real"]
    synthetic = [t for t in traits if t.truth == "synthetic"]
    found = []

    def compare(what: str, pick: Any, unit: str, apart: Any) -> None:
        a, b = (np.median([pick(t) for t in side], axis=0) for side in (real, synthetic))
        if np.any(apart(a, b)):
            shown = " against ".join(
                " x ".join(f"{v:.3g}" for v in np.atleast_1d(m)) for m in (a, b)
            )
            found.append(f"{what} differs: median {shown} {unit} (real against synthetic)")

    def far(share: float) -> Any:
        return lambda a, b: np.maximum(a, b) > (1 + share) * np.maximum(np.minimum(a, b), 1e-6)

    compare("spacing", lambda t: t.spacing, "mm", far(0.1))
    compare("shape", lambda t: t.shape, "voxels; --field-mm cuts all to one field", far(0.1))
    compare("lowest value", lambda t: t.hu_range[0], "HU", lambda a, b: abs(a - b) > 50)
    compare("highest value", lambda t: t.hu_range[1], "HU", lambda a, b: abs(a - b) > 500)
    if all(t.diameter_mm is not None for t in traits):
        compare("lesion diameter", lambda t: t.diameter_mm, "mm", far(0.5))
    for what, pick in (
        ("dtype", lambda t: t.dtype),
        ("orientation", lambda t: t.orientation),
        ("rounding", lambda t: "whole HU" if t.whole_hu else "fractions of HU"),
    ):
        sides = [Counter(pick(t) for t in side) for side in (real, synthetic)]
        if set(sides[0]) != set(sides[1]):
            words = " against ".join(", ".join(sorted(side)) for side in sides)
            found.append(f"{what} differed and is made alike: {words} (real against synthetic)")
    return found
