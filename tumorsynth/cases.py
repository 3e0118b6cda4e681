"""Scans on disk, one after another: find the pairs, synthesise, write the four results.

The command line calls this; it needs nibabel and matplotlib, and knows nothing of the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tumorsynth
from tumorsynth import nifti
from tumorsynth.nifti import Volume

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
            raise ValueError(f"a CT must be a .nii or .nii.gz file, got {ct.name}")
        if label is None or label.is_dir():
            got = "none" if label is None else f"the folder {label}"
            raise ValueError(f"CT {ct.name} needs its label file as second argument, got {got}")
        return [Pair(name, ct, label)]
    if label is not None and not label.is_dir():
        raise ValueError(f"CT {ct} is a folder, so the label must be one too, got {label}")

    one_folder = label is None
    scans = _by_name(ct, "_ct", only=one_folder)
    masks = _by_name(label or ct, "_label", only=one_folder)
    if not scans:
        wanted = "NAME_ct.nii.gz" if one_folder else ".nii.gz"
        raise ValueError(f"the folder {ct} holds no {wanted}; give the folder of the CTs")
    ending = "_label.nii.gz" if one_folder else ".nii.gz"
    return [
        Pair(name, path, masks.get(name, (label or ct) / f"{name}{ending}"))
        for name, path in sorted(scans.items())
    ]


def _by_name(folder: Path, ending: str, *, only: bool) -> dict[str, Path]:
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = _name(path, ending)
        if name is None or path.name.startswith(".") or not path.is_file():
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
) -> list[dict[str, Any]]:
    """Tumours into one scan, and its four files; returns the report's records.

    ``step`` is called after each of reading, synthesising, writing and drawing.
    """
    import torch

    from tumorsynth.preview import save_preview

    before, old = image.values(), label.integers()
    _check_intensity(image.name, before, synth)
    step()
    changed_image, changed_label = synth(
        torch.from_numpy(before)[None], torch.from_numpy(old)[None], affine=image.affine, seed=seed
    )
    after, new = changed_image[0].numpy(), changed_label[0].numpy()
    records = [dict(record) for record in synth.report]
    step()
    differs = (after != before) & ~(np.isnan(after) & np.isnan(before))
    tumor = new != old
    paths = output_paths(out, name)
    paths["report"].unlink(missing_ok=True)  # written last: where it is, the scan is complete
    nifti.write_volume(paths["ct"], image, image.with_changes(differs, after[differs]))
    nifti.write_volume(paths["label"], label, label.with_changes(tumor, new[tumor]))
    step()
    hu = [synth.intensity.to_hu(torch.from_numpy(v)).numpy() for v in (before, after)]
    save_preview(paths["preview"], *hu, tumor, image.affine, records, title=f"{name}, seed {seed}")
    card = synth.handle.get(synth.compute_device or "cpu").card
    document = {
        "tumorsynth": tumorsynth.__version__,
        "ct": image.name,
        "label": label.name,
        "seed": seed,
        "generator": {key: card[key] for key in ("name", "sha256", "licence") if key in card},
        "options": {
            key: getattr(synth, key)
            for key in ("organ_labels", "tumor_label", "p", "count", "size_mm", "blend")
        },
        "tumors": records,
        "params": synth.params,
    }
    text = json.dumps(document, indent=2, default=_plain) + "\n"
    nifti.write_atomic(paths["report"], lambda file: file.write(text.encode()))
    step()
    return records


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


def check_outputs(cases: list[Pair], out: Path, overwrite: bool) -> None:
    """ValueError when results would replace an input, or, unless wanted, what is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file; choose another name")
    inputs = {path.resolve() for case in cases for path in (case.ct, case.label)}
    there = []
    for case in cases:
        for path in output_paths(out, case.name).values():
            if path.resolve() in inputs:
                raise ValueError(f"{path} is an input and would be replaced; choose another --out")
            if path.exists():
                there.append(path)
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"{there[0]}{more} exists; choose another --out or add --overwrite")


def _check_intensity(name: str, values: np.ndarray, synth: SynthesizeTumor) -> None:
    """ValueError for the clear case: values in [0, 1] or [-1, 1] taken for HU."""
    from tumorsynth.intensity import HU

    finite = values[np.isfinite(values)]
    if not isinstance(synth.intensity, HU):
        return
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high - low <= 2:
        raise ValueError(
            f"a CT must be in HU, but {name} holds values from {low:g} to {high:g}; give the CT "
            "in HU, or say how it was scaled, for example --intensity -175,250,0,1"
        )
