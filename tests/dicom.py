"""Write DICOM series with SimpleITK, with names in another order than the slices."""

from __future__ import annotations

import locale
from pathlib import Path

import numpy as np

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])


def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    pixel_mm: tuple[float, float] = (0.75, 0.75),
    positions: np.ndarray | list,
    directions: np.ndarray = AXIAL,
    uid: str = "1.2.826.0.1.3680043.2.1125.1",
    modality: str = "CT",
    intercept: int = -1024,
    first: int = 0,
    tags: dict[str, str] | None = None,
) -> list[Path]:
    """Write slices (X, Y, Z), HU, at ``positions`` (Z, 3), LPS mm of their first pixels.

    Args:
        folder: made where it does not exist.
        hu: (X, Y, Z).
        pixel_mm: along X, along Y.
        positions: of each slice.
        directions: of X and of Y, LPS.
        uid: of the series.
        modality: CT, MR, ...
        intercept: of the stored numbers.
        first: number of the first file.
        tags: further ones, or others.
    """
    import SimpleITK as sitk

    language = locale.setlocale(locale.LC_ALL)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(hu.shape[2])
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    paths = []
    for k in range(hu.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(hu[:, :, k].T))
        image.SetSpacing(pixel_mm)
        values = {
            "0008|0016": CT_STORAGE,
            "0008|0018": f"{uid}.{first + k + 1}",
            "0008|0060": modality,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": uid,
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{v:.10g}" for v in positions[k]),
            "0020|0037": "\\".join(f"{v:.10g}" for v in np.ravel(directions)),
            "0028|1052": str(intercept),
            "0028|1053": "1",
            **(tags or {}),
        }
        for tag, value in values.items():
            image.SetMetaData(tag, value)
        paths.append(folder / f"IM{first + int(order[k]):03d}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, language)  # writing DICOM leaves "C", where text is ASCII
    return paths


def positions_along(normal: np.ndarray, at: np.ndarray | list, origin=(-40.0, -30.0, -300.0)):
    """The positions of slices at these mm along a normal."""
    return np.asarray(origin) + np.outer(at, normal)
