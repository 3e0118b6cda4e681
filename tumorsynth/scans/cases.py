"""Scans on disk, one after another: find the pairs, synthesise, write the four results.

The command line calls this; it needs nibabel and matplotlib, and knows nothing of the terminal.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tumorsynth
from tumorsynth.scans import nifti
from tumorsynth.scans.nifti import Volume

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor


@dataclass(frozen=True)
class Pair:
    """A CT file and its label map; the results are named after ``name``."""

    name: str
    ct: Path
    label: Path


def find_pairs(ct: Path, label: Path | None) -> list[Pair]:
    """Pairs sorted by name: of two files, of one folder, or of two folders.

    One folder: every NAME_ct.nii[.gz] with NAME_label.nii[.gz] beside it. Two folders: every
    .nii[.gz] of the first with its namesake in the second. Names are compared without .nii[.gz]
    and without _ct or _label at their end. A CT without a label map is listed with the path its
    label map would have; a label map without a CT is not. Hidden files are ignored.
    FileNotFoundError and ValueError say what is missing.
    """
    for path in (ct, label):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    if not ct.is_dir():
        name = _name(ct, "_ct")
        if name is None:
            raise ValueError(
                f"a CT must be a .nii or .nii.gz file, got {ct.name}; convert it first (DICOM with "
                "dcm2niix, say)"
            )
        if label is None or label.is_dir():
            got = "none" if label is None else f"the folder {label}"
            raise ValueError(f"CT {ct.name} needs its label file as second argument, got {got}")
        return [Pair(name, ct, label)]
    if label is not None and not label.is_dir():
        raise ValueError(f"CT {ct} is a folder, so the label must be one too, got {label}")

    one_folder = label is None
    scans = by_name(ct, "_ct", only=one_folder)
    masks = by_name(label or ct, "_label", only=one_folder)
    if not scans:
        raise ValueError(
            f"the folder {ct} holds no NAME_ct.nii.gz; name files so, and NAME_label.nii.gz, or "
            "give the folder of the CTs and then that of the label maps"
            if one_folder
            else f"the folder {ct} holds no .nii.gz; give the folder of the CTs"
        )
    ending = "_label.nii.gz" if one_folder else ".nii.gz"
    return [
        Pair(name, path, masks.get(name, (label or ct) / f"{name}{ending}"))
        for name, path in sorted(scans.items())
    ]


def by_name(folder: Path, ending: str, *, only: bool = False) -> dict[str, Path]:
    """The NIfTI files of a folder by name, without .nii[.gz] and ``ending``; ``only``: with it."""
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = _name(path, ending)
        # a link that leads nowhere is a scan that cannot be read, not none
        if name is None or path.name.startswith(".") or not (path.is_file() or path.is_symlink()):
            continue
        if only and f"{ending}.nii" not in path.name:
            continue
        if name in out:
            raise ValueError(
                f"each scan needs its own name, but {out[name].name} and {path.name} in {folder} "
                f"are both {name!r}; rename or move one"
            )
        out[name] = path
    return out


def _name(path: Path, ending: str) -> str | None:
    """File name without .nii[.gz] and without ``ending``; None when it is no NIfTI name."""
    for suffix in (".nii.gz", ".nii"):
        if path.name.endswith(suffix) and len(path.name) > len(suffix):
            stem = path.name.removesuffix(suffix)
            return stem.removesuffix(ending) or stem
    return None


def synthesize_scan(
    synth: SynthesizeTumor,
    image: Volume,
    label: Volume,
    out: Path,
    name: str,
    seed: int,
    step: Callable[[], None],
    params: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Tumours into one scan, and its four files; returns the report.

    ``step`` is called after each of reading, synthesising, writing and drawing. With ``params``, of
    an earlier report, its tumours are made again.
    """
    import torch

    from tumorsynth.scans.preview import save_preview

    before, old = image.values(), label.integers()
    _check_intensity(image.name, before, synth)
    step()
    changed_image, changed_label = synth(
        torch.from_numpy(before)[None],
        torch.from_numpy(old)[None],
        affine=image.affine,
        seed=seed,
        params=params,
    )
    after, new = changed_image[0].numpy(), changed_label[0].numpy()
    records = [dict(record) for record in synth.report]
    step()
    differs = (after != before) & ~(np.isnan(after) & np.isnan(before))
    relabelled = new != old
    stored = (
        image.with_changes(differs, after[differs]),
        label.with_changes(relabelled, new[relabelled]),
    )
    tumor = relabelled & (new == synth.tumor_label)
    document = {
        **settings(synth, name=image.name, label=label.name, seed=seed),
        "voxels_sha256": {
            "ct": digest(image.stored),
            "label": digest(label.stored),
            "new_ct": digest(stored[0]),
            "new_label": digest(stored[1]),
        },
        "tumors": records,
        "params": synth.params,
    }
    paths = output_paths(out, name)
    # the mark says that files without a report are ours, should we be killed before the report
    mark = unfinished_mark(out, name)
    mark.touch()
    paths["report"].unlink(missing_ok=True)  # written last: where it is, the scan is complete
    nifti.write_volume(paths["ct"], image, stored[0])
    nifti.write_volume(paths["label"], label, stored[1])
    step()
    hu = [synth.intensity.to_hu(torch.from_numpy(v)).numpy() for v in (before, after)]
    save_preview(paths["preview"], *hu, tumor, image.affine, records, title=f"{name}, seed {seed}")
    text = json.dumps(document, indent=2, default=_plain) + "\n"
    nifti.write_atomic(paths["report"], lambda file: file.write(text.encode()))
    mark.unlink(missing_ok=True)
    step()
    return document


def check_organ(label: Volume, organ_labels: tuple[int, ...]) -> None:
    """ValueError where a label map has none of the values: nothing can be made of such a scan."""
    held = np.unique(label.integers())
    if not np.isin(held, organ_labels).any():
        there = ", ".join(map(str, held[:20])) + (", ..." if len(held) > 20 else "")
        raise ValueError(
            f"--organ-label {' '.join(map(str, organ_labels))} must be in the label map, but "
            f"{label.name} holds {there}; name the value that the organ has there"
        )


def settings(synth: SynthesizeTumor, *, name: str, label: str, seed: int) -> dict[str, Any]:
    """What decides a scan's result, as its report names it, in JSON's own types."""
    import torch

    card = synth.handle.get(synth.device or "cpu").card
    options = ("organ_labels", "tumor_label", "p", "count", "size_mm", "blend", "contrast_hu")
    own = ("sigma_mm", "gap_mm", "merge", "mass_effect", "bulge")
    known = {
        "tumorsynth": tumorsynth.__version__,
        "ct": name,
        "label": label,
        "seed": seed,
        "generator": {key: card[key] for key in ("name", "sha256", "licence") if key in card},
        "options": {key: synth.options[key] for key in (*options, *own)}
        | {"intensity": {"kind": type(synth.intensity).__name__, **_fields(synth.intensity)}},
        # the last bit of a convolution depends on these
        "device": (synth.device or torch.device("cpu")).type,
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(known, default=_plain))


def digest(stored: np.ndarray) -> str:
    """sha256 of the numbers as stored, in C order, without header or compression."""
    return hashlib.sha256(np.ascontiguousarray(stored).data).hexdigest()


def _fields(value: Any) -> dict[str, Any]:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else {}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return value.tolist()
    return str(value)


def output_paths(out: Path, name: str) -> dict[str, Path]:
    """The files of one scan: ct, label, report and preview."""
    endings = {"ct": "ct.nii.gz", "label": "label.nii.gz", "report": "report.json"}
    endings["preview"] = "preview.png"
    return {key: out / f"{name}_{ending}" for key, ending in endings.items()}


def unfinished_mark(out: Path, name: str) -> Path:
    """A file that is there while a scan's results are being put in place."""
    return out / f".{name}_unfinished"


def check_outputs(
    cases: list[Pair],
    out: Path,
    overwrite: bool,
    finished: Callable[[int, Path], str | None] | None = None,
) -> list[int]:
    """Which cases are still to be done, by index; ValueError when that would replace an input, or,
    unless wanted, results of something else.

    ``finished(k, report)`` says why the report of case k is not what this run would write, or None
    where it is. Files without a report are replaced where the mark of a killed run stands beside
    them.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file; choose another name")
    folders = {path.parent.resolve() for case in cases for path in (case.ct, case.label)}
    if finished is not None and out.resolve() in folders:
        raise ValueError(
            f"--out must not be the folder of the scans, got {out}: the next run would take the "
            "results for scans; choose another"
        )
    same: dict[str, str] = {}
    for case in cases:
        first = same.setdefault(unicodedata.normalize("NFC", case.name).casefold(), case.name)
        if first != case.name:
            raise ValueError(
                f"names of scans must differ by more than case, which not every disk tells apart, "
                f"got {first!r} and {case.name!r}; rename one"
            )
    inputs = {path.resolve() for case in cases for path in (case.ct, case.label)}
    there: list[Path] = []
    todo: list[int] = []
    reason = ""
    for k, case in enumerate(cases):
        paths = output_paths(out, case.name)
        for path in paths.values():
            if path.resolve() in inputs:
                raise ValueError(f"{path} is an input and would be replaced; choose another --out")
        present = [path for path in paths.values() if path.exists()]
        if finished is not None and not overwrite and paths["report"].exists():
            other = finished(k, paths["report"])
            if other is None and len(present) == len(paths):
                unfinished_mark(out, case.name).unlink(missing_ok=True)
                continue
            if other is not None:
                there += present
                reason = reason or f" ({paths['report'].name}: {other})"
        elif not unfinished_mark(out, case.name).exists():
            there += present
        todo.append(k)
    if there and not overwrite:
        exist = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise ValueError(f"{there[0]}{exist}{reason}; choose another --out or add --overwrite")
    return todo


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """ValueError while another run writes into this folder. A kill ends the claim."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"only one run may write into a folder, but another one writes into {out}; wait for "
            "its end, or choose another --out"
        ) from None
    except OSError:  # a disk without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def forget(cases: list[Pair], out: Path) -> None:
    """Earlier results count as unfinished from here on: a killed run can then be gone on with."""
    for case in cases:
        paths = output_paths(out, case.name)
        if any(path.exists() for path in paths.values()):
            unfinished_mark(out, case.name).touch()
            paths["report"].unlink(missing_ok=True)


def sweep(cases: list[Pair], out: Path) -> None:
    """Remove what a killed run was writing; call it before anything is written."""
    ours = {path.name for case in cases for path in output_paths(out, case.name).values()}
    for path in list(out.iterdir()) if out.is_dir() else []:
        name, _, process = path.name.removeprefix(".").removesuffix(".part").rpartition(".")
        if path.name == f".{name}.{process}.part" and process.isdigit() and name in ours:
            path.unlink(missing_ok=True)


def made_otherwise(report: Path, expected: dict[str, Any]) -> str | None:
    """Why a report is not the one of these `settings`, or None where it is."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "cannot be read"
    if not isinstance(found, dict):
        return "is no report"
    for key, value in expected.items():
        old = found.get(key)
        if old != value:
            if isinstance(old, dict) and isinstance(value, dict):
                key, old, value = next(
                    (f"{key} {k}", old.get(k), value.get(k))
                    for k in {**value, **old}
                    if old.get(k) != value.get(k)
                )
            return f"made with {key} {old}, now {value}"
    return None


def _check_intensity(name: str, values: np.ndarray, synth: SynthesizeTumor) -> None:
    """ValueError for the clear cases: no values at all, or [0, 1], [-1, 1] or HU + 1024 taken for
    HU."""
    from tumorsynth.intensity import HU

    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(
            f"a CT must hold finite numbers, but every voxel of {name} is NaN or infinite; "
            "export it again"
        )
    if not isinstance(synth.intensity, HU):
        return
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 2:
        raise ValueError(
            f"a CT must be in HU, but {name} holds values from {low:g} to {high:g}; give the CT "
            "in HU, or say how it was scaled, for example --intensity -175,250,0,1"
        )
    # in no body a tenth of the voxels is bone as dense as that
    shifted = float(((finite > 900) & (finite < 1300)).mean())
    if shifted > 0.1:
        raise ValueError(
            f"a CT must be in HU, but in {name} {shifted:.0%} of the voxels lie from 900 to 1300, "
            "as soft tissue does where 1024 was added; subtract it"
        )
