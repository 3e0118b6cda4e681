"""Blind the cases of a reader study: remove all hints but the picture itself.

Every case is written again from its voxels: int16 HU within one range, axes in RAS, a header with
nothing but shape and spacing, no compression. Two cases on one grid have the same size and the same
header. `differences` reports what cannot be made equal.
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

from tumorsynth.affines import voxel_sizes
from tumorsynth.geometry import Frame, shear_of
from tumorsynth.nifti_header import require_nibabel
from tumorsynth.scans import nifti
from tumorsynth.scans.file_kinds import describe_folder
from tumorsynth.scans.pairing import find_files, find_pairs, has_ending
from tumorsynth.scans.volume_files import read_pair, read_volume

HU_RANGE = (-1024, 3071)  # 12 bits, as scanners store them; all cases are clipped to it
MIN_LESION_ML = 0.02  # about 3.4 mm; smaller components of a label are stray voxels
LESIONS = ("largest", "each")
# differences between the two folders that `differences` reports
MAX_GRID_RATIO = 1.1  # of medians of spacing and shape
MAX_DIAMETER_RATIO = 1.5  # of medians of lesion diameters
MAX_LOWEST_HU_DIFFERENCE, MAX_HIGHEST_HU_DIFFERENCE = 50, 500  # of medians of extreme values


@dataclass(frozen=True)
class Scan:
    """The files of a scan. truth: "real" or "synthetic"."""

    truth: str
    ct: Path
    label: Path | None


@dataclass(frozen=True)
class Traits:
    """Properties of a case that might reveal its origin; `differences` compares them."""

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
    source: file name and lesion number, for the study's records; the page never gets it.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    mark: tuple[int, int, int] | None
    source: str
    traits: Traits

    def nifti(self) -> bytes:
        """Return an uncompressed NIfTI file, whose size depends on the shape alone."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = -(np.array(self.hu.shape) - 1) / 2 * self.spacing
        image = require_nibabel().Nifti1Image(self.hu, affine, dtype=np.int16)
        image.header.set_xyzt_units("mm")
        return image.to_bytes()


@dataclass(frozen=True)
class Lesion:
    """A lesion: its voxel nearest to the centre of mass, and its equivalent diameter."""

    centre: np.ndarray
    diameter_mm: float


class Vault:
    """Volumes in one unnamed file, which disappears with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._lock = threading.Lock()

    def put(self, volume: bytes) -> Callable[[], bytes]:
        """Store a volume and return a function that reads it."""
        with self._lock:
            offset = self._file.seek(0, 2)
            self._file.write(volume)
            self._file.flush()

        def get() -> bytes:
            with self._lock:
                self._file.seek(offset)
                return self._file.read(len(volume))

        return get


def find_scans(folder: Path, truth: str, labels: Path | None = None) -> list[Scan]:
    """Find the scans of a folder, sorted by name.

    Args:
        folder: CTs: NAME_ct.nii[.gz], with or without NAME_label.nii[.gz] beside them; if there are
            no such names, every .nii[.gz].
        truth: "real" or "synthetic".
        labels: a folder of label maps with the names of the CTs.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: for a folder without scans, or if only some scans have a label.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--{truth} must be a folder of CTs, but there is no {folder}")
    cts = find_files(folder, "")
    if not cts:
        if what := describe_folder(folder):
            raise ValueError(f"--{truth} must be a folder of CTs, but {folder} is a folder{what}")
        raise ValueError(f"--{truth}: the folder {folder} holds no .nii or .nii.gz; give the CTs")
    files = list(cts.values())
    if labels is None and not any(has_ending(p, end) for p in files for end in ("_ct", "_label")):
        return [Scan(truth, path, None) for path in files]
    pairs = [pair for pair in find_pairs(folder, labels) if not has_ending(pair.ct, "_label")]
    without = [pair for pair in pairs if not pair.label.is_file()]
    if without and (labels is not None or len(without) < len(pairs)):
        raise ValueError(
            f"either every scan needs a label or none, but {without[0].ct.name} in {folder} has no "
            f"{without[0].label.name}; add it, or give a folder without labels"
        )
    return [Scan(truth, pair.ct, None if without else pair.label) for pair in pairs]


def blind(
    scan: Scan,
    *,
    tumor_label: int,
    lesions: str = "largest",
    field_mm: float | None = None,
    reading: nifti.Reading = nifti.Reading(),  # noqa: B008 (frozen)
) -> list[Case]:
    """Make the blinded cases of a scan.

    Args:
        scan: its files. A scan without a label becomes one case without a mark.
        tumor_label: label value of lesions.
        lesions: "largest" for one case, or "each" for a case of every lesion of at least 0.02 ml.
        field_mm: edge of the cube shown around the mark (or the scan's centre), moved to lie inside
            the scan; None for the whole scan.
        reading: what to do where the files contradict themselves or each other.

    Raises:
        ValueError: for bad settings, or a label without a lesion.

    Examples:
        >>> (case,) = blind(Scan("real", ct, label), tumor_label=2, field_mm=120)
        >>> case.nifti(), case.mark
    """
    if lesions not in LESIONS:
        raise ValueError(f"--lesions must be {' or '.join(LESIONS)}, got {lesions!r}")
    if field_mm is not None and not 0 < field_mm < float("inf"):
        raise ValueError(f"--field-mm must be more than 0 mm and finite, got {field_mm:g}; try 120")
    orientations = require_nibabel().orientations
    if scan.label is None:
        volume, label = read_volume(scan.ct, reading), None
    else:
        volume, label = read_pair(scan.ct, scan.label, reading)
    to_ras = orientations.io_orientation(volume.affine)
    values = orientations.apply_orientation(volume.values(), to_ras)
    edges = voxel_sizes(volume.affine)[to_ras[:, 0].argsort()]
    x, y, z = (round(float(e), 3) for e in edges)  # headers differ in the last digits of float32
    values = np.nan_to_num(values, nan=HU_RANGE[0], posinf=HU_RANGE[1], neginf=HU_RANGE[0])
    hu = np.rint(np.clip(values, *HU_RANGE)).astype(np.int16)
    marked: list[Lesion | None] = [None]
    if label is not None:
        mask = orientations.apply_orientation(label.integers(), to_ras) == tumor_label
        shear = shear_of(volume.affine @ orientations.inv_ornt_aff(to_ras, volume.stored.shape))
        marked = [*_find_lesions(mask, Frame((x, y, z), shear=shear))]
        if not marked:
            raise ValueError(
                f"every label needs a lesion to mark, but {label.name} holds none of at least "
                f"{MIN_LESION_ML} ml with the value {tumor_label}; see --tumor-label and "
                "--synthetic-tumor-label"
            )
    cases = []
    for number, lesion in enumerate(marked[:1] if lesions == "largest" else marked, start=1):
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


def _find_lesions(mask: np.ndarray, frame: Frame) -> list[Lesion]:
    """The 26-connected components of a mask, largest first."""
    from scipy import ndimage

    components, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    lesions = []
    for k, box in enumerate(ndimage.find_objects(components), start=1):
        voxels = np.argwhere(components[box] == k) + [s.start for s in box]
        volume_mm3 = len(voxels) * frame.voxel_mm3
        if volume_mm3 >= MIN_LESION_ML * 1000:
            offsets_mm = (voxels - voxels.mean(0)) * frame.spacing
            if frame.shear is not None:
                offsets_mm = offsets_mm @ np.array(frame.shear)
            squared_mm = (offsets_mm**2).sum(1)
            diameter_mm = (6 * volume_mm3 / np.pi) ** (1 / 3)
            lesions.append(Lesion(voxels[squared_mm.argmin()], diameter_mm))
    return sorted(lesions, key=lambda lesion: -lesion.diameter_mm)


def _field(
    shape: Sequence[int], centre: np.ndarray, spacing: Sequence[float], field_mm: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and shape of the field shown."""
    size = np.array(shape)
    if field_mm is not None:
        size = np.minimum(size, np.maximum(1, np.rint(field_mm / np.array(spacing)).astype(int)))
    return np.clip(centre - size // 2, 0, np.array(shape) - size), size


def differences(traits: Sequence[Traits]) -> list[str]:
    """Report what still distinguishes real from synthetic cases, and what only did before blinding.

    Args:
        traits: of all cases.

    Returns:
        A sentence for each difference.

    Raises:
        ValueError: if only one side is marked.
    """
    if len({t.diameter_mm is None for t in traits}) > 1:
        raise ValueError(
            "marks must not distinguish real from synthetic: give labels for both folders, or for "
            "neither"
        )
    real = [t for t in traits if t.truth == "real"]
    synthetic = [t for t in traits if t.truth == "synthetic"]
    reports = []

    def compare(name: str, pick: Any, unit: str, differs: Any) -> None:
        a, b = (np.median([pick(t) for t in side], axis=0) for side in (real, synthetic))
        if np.any(differs(a, b)):
            medians = " against ".join(
                " x ".join(f"{v:.3g}" for v in np.atleast_1d(m)) for m in (a, b)
            )
            reports.append(f"{name} differs: median {medians} {unit} (real against synthetic)")

    def ratio_above(limit: float) -> Any:
        return lambda a, b: np.maximum(a, b) > limit * np.maximum(np.minimum(a, b), 1e-6)

    def difference_above(limit: float) -> Any:
        return lambda a, b: abs(a - b) > limit

    grid = ratio_above(MAX_GRID_RATIO)
    compare("spacing", lambda t: t.spacing, "mm", grid)
    compare("shape", lambda t: t.shape, "voxels; --field-mm cuts all to one field", grid)
    lowest, highest = MAX_LOWEST_HU_DIFFERENCE, MAX_HIGHEST_HU_DIFFERENCE
    compare("lowest value", lambda t: t.hu_range[0], "HU", difference_above(lowest))
    compare("highest value", lambda t: t.hu_range[1], "HU", difference_above(highest))
    if all(t.diameter_mm is not None for t in traits):
        diameter = ratio_above(MAX_DIAMETER_RATIO)
        compare("lesion diameter", lambda t: t.diameter_mm, "mm", diameter)
    for name, pick in (
        ("dtype", lambda t: t.dtype),
        ("orientation", lambda t: t.orientation),
        ("rounding", lambda t: "whole HU" if t.whole_hu else "fractions of HU"),
    ):
        sides = [Counter(pick(t) for t in side) for side in (real, synthetic)]
        if set(sides[0]) != set(sides[1]):
            values = " against ".join(", ".join(sorted(side)) for side in sides)
            reports.append(f"{name} differed and is now equal: {values} (real against synthetic)")
    return reports
