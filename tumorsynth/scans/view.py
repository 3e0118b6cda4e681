"""An interactive page of scans before and after, which opens from the disk in any browser.

The page is OUT/view.html. OUT/view holds its code and, for each scan, a script with its voxels: a
page from the disk may load scripts, but fetch no files.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.nifti_header import require_nibabel
from tumorsynth.scans.outputs import output_paths
from tumorsynth.scans.preview import choose_window

PAGE = Path(__file__).parent / "view_page"
STUDY_PAGE = Path(__file__).parents[1] / "reader_study" / "static"  # read as files, not code
NIIVUE = STUDY_PAGE / "vendor"
FOLDER, SCRIPTS = "view", "view/scans"
HU_RANGE = (-1024, 3071)  # shown
MAX_VOXELS = 32_000_000  # of a scan; of a larger one, the part around its tumours is shown
MARGIN_MM = 60.0  # around the tumours
FIGURES = ("diameter_mm", "hu_change", "visibility")


def view_path(out: Path, name: str) -> Path:
    """The script of a scan's voxels."""
    return out / SCRIPTS / f"{name}.js"


def save_view(
    out: Path,
    name: str,
    before: np.ndarray,
    after: np.ndarray,
    tumor: np.ndarray,
    affine: np.ndarray,
    report: Mapping[str, Any],
) -> None:
    """Write the script of a scan.

    Args:
        out: an existing folder.
        name: of the scan.
        before: (X, Y, Z) HU.
        after: (X, Y, Z) HU.
        tumor: (X, Y, Z) bool, the new tumour voxels.
        affine: (4, 4), voxel to mm (RAS).
        report: of the scan.
    """
    placed = [record for record in report["tumors"] if record.get("applied", True)]
    skipped = [record for record in report["tumors"] if not record.get("applied", True)]
    centres = [record["centre_voxel"] for record in placed]
    box = _box(before.shape, tumor, affine, centres)
    start = np.array([part.start for part in box])
    shown = affine.copy()
    shown[:3, 3] += affine[:3, :3] @ start
    old, new = (_whole_hu(values[box]) for values in (before, after))
    window = choose_window(before, tumor)
    nibabel = require_nibabel()
    image = nibabel.Nifti1Image(old, shown)
    to_ras = nibabel.io_orientation(shown)
    ras = image.as_reoriented(to_ras)
    turned = np.linalg.inv(ras.affine) @ affine  # from the scan's voxels to those of the page

    def reorient(values: np.ndarray) -> str:
        return _zipped(nibabel.apply_orientation(values, to_ras).ravel(order="F").tobytes())

    part = "" if old.shape == before.shape else "; shown is the part around the tumours"
    content = {
        "name": name,
        "window": window,
        "about": f"generator {report['generator'].get('name')}, seed {report['seed']}, tumorsynth "
        f"{report['tumorsynth']}{part}",
        "tumors": [
            {
                "at": (turned @ [*centre, 1])[:3].round().astype(int).tolist(),
                **{key: _figure(record.get(key)) for key in FIGURES},
            }
            for centre, record in zip(centres, placed, strict=True)
        ],
        "skipped": list(dict.fromkeys(str(record.get("reason")) for record in skipped)),
        "nifti": _zipped(ras.to_bytes()),
        "change": reorient(new - old),
        "mask": reorient(tumor[box].astype(np.uint8)),
    }
    path = view_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    script = f"tumorsynthScan({json.dumps(content)});\n"
    write_atomic(path, lambda file: file.write(script.encode()))


def write_view_page(out: Path) -> Path:
    """Write the page of all scans that have a script and a report, and the code that it needs.

    Args:
        out: the folder of the results.

    Returns:
        The page.
    """
    folder = out / FOLDER
    (out / SCRIPTS).mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in (out / SCRIPTS).glob("[!.]*.js"))
    there = [name for name in names if output_paths(out, name)["report"].is_file()]
    files = {
        folder / "scans.js": f"const SCANS = {json.dumps(there)};\n".encode(),
        folder / "LICENSES.txt": (NIIVUE / "LICENSES.txt").read_bytes(),
        folder / "niivue.umd.js": (NIIVUE / "niivue.umd.js").read_bytes(),
        folder / "planes.js": (STUDY_PAGE / "planes.js").read_bytes(),
        **{folder / name: (PAGE / name).read_bytes() for name in ("view.js", "view.css")},
        out / "view.html": (PAGE / "view.html").read_bytes(),
    }
    for path, content in files.items():
        write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return out / "view.html"


def _whole_hu(values: np.ndarray) -> np.ndarray:
    low, high = HU_RANGE
    finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint(np.clip(finite, low, high)).astype(np.int16)


def _box(
    shape: tuple[int, ...],
    tumor: np.ndarray,
    affine: np.ndarray,
    centres: Sequence[Sequence[float]],
) -> tuple[slice, ...]:
    """The part to show: all, or what lies around the tumours, or around the first of them."""
    whole = tuple(slice(0, n) for n in shape)
    if np.prod(shape) <= MAX_VOXELS:
        return whole
    margin = np.ceil(MARGIN_MM / np.linalg.norm(affine[:3, :3], axis=0)).astype(int)
    middle = np.array(shape) // 2
    first = np.rint(centres[0]).astype(int) if len(centres) else middle
    voxels = np.argwhere(tumor) if tumor.any() else first[None]
    for low, high in ((voxels.min(0), voxels.max(0)), (first, first)):
        starts = np.maximum(low - margin, 0)
        ends = np.minimum(high + margin + 1, shape)
        if np.prod(ends - starts) <= MAX_VOXELS:
            break
    return tuple(slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True))


def _zipped(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, compresslevel=5, mtime=0)).decode()


def _figure(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
