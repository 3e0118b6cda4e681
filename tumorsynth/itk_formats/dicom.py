"""Read a folder of DICOM slices as one volume; refuse what would be put together wrongly.

SimpleITK reads each slice. How the slices lie to each other is decided here, by their positions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.itk_formats.images import ItkImage, lps_affine
from tumorsynth.itk_formats.recognize import head_of, is_dicom, quiet_simpleitk
from tumorsynth.nifti_header import check_affine

MAX_JITTER = 0.01  # of the slice distance, between a slice and its place on an even grid
MAX_ROUNDING = 0.08  # the same, where the positions are rounded to few digits
MAX_DRIFT_PIXELS = 0.5  # sideways from the first slice to the last
ROUNDED_COSINE = 1e-3  # between the directions of two slices of one series
LISTED = 4  # distances and series named in a message
CONVERT = "convert the series to NIfTI, for example with: dcm2niix -z y FOLDER"


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str
    description: str
    modality: str
    size: tuple[int, ...]
    position: np.ndarray  # mm, LPS, of the first pixel
    decimals: tuple[int, ...]  # of the position as it is written
    directions: np.ndarray  # (2, 3) of a row, of a column
    spacing: tuple[float, float]  # mm along a row, along a column


def read_series(folder: Path) -> ItkImage:
    """Read the CT series of a folder, in HU; files that are no DICOM are left out.

    Raises:
        ValueError: if the folder holds several series, something else than CT, slices at unequal
            distances, twice at one place, tilted, or damaged.
    """
    with quiet_simpleitk() as sitk:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        paths = [
            path for path in files if path.name != "DICOMDIR" and is_dicom(head_of(path))
        ]  # fmt: skip
        slices = [_read_slice(sitk, path) for path in paths]
        _check_one_series(folder, slices)
        normal = np.cross(*slices[0].directions)
        slices.sort(key=lambda one: float(one.position @ normal))
        distance = _check_distances(folder, slices, normal)
        _check_not_tilted(folder, slices, normal)
        first = slices[0]
        rows, columns = first.directions
        affine = lps_affine(
            np.stack([rows, columns, normal], axis=1), (*first.spacing, distance), first.position
        )
        check_affine(folder.name, affine)
        stored = np.stack([_read_pixels(sitk, one.path) for one in slices])
    return ItkImage(stored.transpose(2, 1, 0), affine)


def refuse_single_slice(path: Path) -> None:
    """Raise the ValueError of a single DICOM file."""
    raise ValueError(
        f"a scan in DICOM must be the folder of its slices, got the file {path.name}; give its "
        f"folder, or, if the file holds the whole scan, {CONVERT.replace('FOLDER', path.name)}"
    )


def _reader(sitk: Any, path: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(os.fspath(path))
    return reader


def _read_slice(sitk: Any, path: Path) -> _Slice:
    """Read the header of a slice."""
    reader = _reader(sitk, path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(
            f"every DICOM file of a folder must be a slice, but {path.name} is cut short or "
            "damaged, or no image (a report, a structure set); copy it again, or move it away"
        ) from error

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    modality = text("0008|0060")
    if modality not in ("", "CT"):
        raise ValueError(
            f"a scan in DICOM must be CT, but {path.name} is of the modality {modality}; give the "
            "folder of the CT, and label maps as NIfTI, NRRD or MetaImage"
        )
    if reader.GetNumberOfComponents() != 1 or math.prod(reader.GetSize()[2:]) != 1:
        raise ValueError(
            f"a slice must be one grey picture, but {path.name} holds several or colours; {CONVERT}"
        )
    if text("0028|1053") and _numbers(text("0028|1053")) in ([], [0.0]):
        raise ValueError(
            f"the rescale slope of {path.name} must be a number other than 0, got "
            f"{text('0028|1053')!r}; export the series again"
        )
    position, directions, spacing = (
        _numbers(text(tag)) for tag in ("0020|0032", "0020|0037", "0028|0030")
    )
    if len(position) != 3 or len(directions) != 6 or len(spacing) != 2:
        raise ValueError(
            f"every slice must say where it lies, but {path.name} lacks its position, its "
            "orientation or its pixel spacing (a secondary capture?); export the series again"
        )
    return _Slice(
        path,
        text("0020|000e"),
        text("0008|103e"),
        modality,
        tuple(reader.GetSize()[:2]),
        np.array(position),
        tuple(_decimals(part) for part in text("0020|0032").split("\\")),
        _unit(np.reshape(directions, (2, 3))),
        (spacing[1], spacing[0]),  # stored as between rows, between columns
    )


def _unit(directions: np.ndarray) -> np.ndarray:
    """Directions are written with few digits: make them exactly of length 1 at a right angle."""
    row = directions[0] / (np.linalg.norm(directions[0]) or 1)
    column = directions[1] - row * (row @ directions[1])
    return np.stack([row, column / (np.linalg.norm(column) or 1)])


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split("\\")]
    except ValueError:
        return []


def _decimals(text: str) -> int:
    try:
        exponent = Decimal(text.strip()).as_tuple().exponent
    except InvalidOperation:
        return 0
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _check_one_series(folder: Path, slices: Sequence[_Slice]) -> None:
    series = list(dict.fromkeys(one.series for one in slices))
    if len(series) > 1:
        words = []
        for uid in series[:LISTED]:
            members = [one for one in slices if one.series == uid]
            named = f" {members[0].description!r}" if members[0].description else ""
            words.append(f"{len(members)} slices{named} ({uid}, {members[0].path.name})")
        more = ", ..." if len(series) > LISTED else ""
        raise ValueError(
            f"a folder must hold one DICOM series, but {folder} holds {len(series)}: "
            f"{', '.join(words)}{more}; move each into a folder of its own"
        )
    if len(slices) < 2:
        raise ValueError(
            f"a DICOM series must have 2 slices or more, but {folder} holds {len(slices)}; give "
            "the folder of the whole series"
        )
    first = slices[0]
    for one in slices[1:]:
        for what, same, a, b in (
            ("size in pixels", one.size == first.size, first.size, one.size),
            ("pixel spacing", np.allclose(one.spacing, first.spacing, rtol=1e-3),
             first.spacing, one.spacing),
            ("orientation", np.allclose(one.directions, first.directions, atol=ROUNDED_COSINE),
             first.directions.round(3).tolist(), one.directions.round(3).tolist()),
        ):  # fmt: skip
            if not same:
                raise ValueError(
                    f"the slices of a series must have one {what}, but in {folder} "
                    f"{first.path.name} has {a} and {one.path.name} {b}; move those that do not "
                    "belong to the scan away"
                )


def _check_distances(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> float:
    """Return the distance of the slices; raise ValueError unless all are equal beyond rounding."""
    at = np.array([float(one.position @ normal) for one in slices])
    gaps = np.diff(at)
    usual = float(np.median(gaps))
    for k in np.flatnonzero(gaps <= max(0.05 * usual, 1e-4)).tolist():
        raise ValueError(
            f"the slices of a series must lie at different places, but in {folder} "
            f"{slices[k].path.name} and {slices[k + 1].path.name} lie both at {at[k]:.6g} mm "
            "(several phases or reconstructions?); keep one of them"
        )
    decimals = np.max([one.decimals for one in slices], axis=0)
    rounding = 0.5 * float(np.abs(normal) @ 10.0**-decimals)
    distance, off = _even_grid(at)
    if off > max(MAX_JITTER * usual, min(rounding, MAX_ROUNDING * usual)) + 1e-6:
        odd = np.argsort(-np.abs(gaps - usual), kind="stable")[:LISTED]
        listed = ", ".join(
            f"{at[k]:.6g} to {at[k + 1]:.6g} mm ({gaps[k]:.4g} mm)"
            for k in sorted(odd)
            if abs(gaps[k] - usual) > 1e-3 * usual
        )
        raise ValueError(
            f"the slices of a series must lie at equal distances, but in {folder} most are "
            f"{usual:.4g} mm apart and not from {listed}; copy the missing slices, or resample the "
            "series"
        )
    return distance


def _even_grid(at: np.ndarray) -> tuple[float, float]:
    """Return the mean step of positions, and how far the worst is from the nearest even grid."""
    index = np.arange(len(at))

    def off(step: float) -> float:
        rest = at - step * index
        return float(rest.max() - rest.min()) / 2

    gaps = np.diff(at)
    low, high = float(gaps.min()), float(gaps.max())
    for _ in range(60):  # off() is convex
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if off(a) <= off(b) else (a, high)
    return float(at[-1] - at[0]) / len(gaps), off((low + high) / 2)


def _check_not_tilted(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> None:
    moved = np.stack([one.position for one in slices]) - slices[0].position
    sideways = np.linalg.norm(moved - np.outer(moved @ normal, normal), axis=1)
    if sideways.max() <= MAX_DRIFT_PIXELS * min(slices[0].spacing):
        return
    along = float(moved[-1] @ normal)
    degrees = math.degrees(math.atan2(float(sideways[-1]), along))
    raise ValueError(
        f"the slices of a series must lie one above the other, but those in {folder} are shifted "
        f"by up to {sideways.max():.4g} mm sideways (a gantry tilted by {degrees:.3g} degrees); "
        f"{CONVERT.replace('FOLDER', str(folder))}, which corrects the tilt, and give its NIfTI"
    )


def _read_pixels(sitk: Any, path: Path) -> np.ndarray:
    """Return a slice (rows, columns) in HU: GDCM applies its rescale slope and intercept."""
    try:
        image = _reader(sitk, path).Execute()
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} is cut short or damaged, or compressed in a way that SimpleITK does not "
            f"read; copy it again, or {CONVERT}"
        ) from error
    pixels = sitk.GetArrayFromImage(image)[0]
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32)
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    fits = low <= pixels.min() and pixels.max() <= high
    return pixels.astype(np.int16) if fits else pixels
