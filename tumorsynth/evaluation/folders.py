"""Predicted label maps in a folder: paired with their labels and scored, or searched for healthy
scans (the paper's appendix E.1 synthesises into those alone)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tumorsynth.scans import nifti
from tumorsynth.scans.pairing import find_files

if TYPE_CHECKING:
    from tumorsynth.evaluation.metrics import CaseScores


@dataclass(frozen=True)
class Comparison:
    """A predicted label map and the real one."""

    name: str
    prediction: Path
    label: Path


def find_comparisons(predictions: Path, labels: Path) -> tuple[list[Comparison], list[str]]:
    """Pairs sorted by name, and the names of labels without a prediction.

    Two folders: every .nii[.gz] of the first with its namesake in the second; names are compared
    without .nii[.gz] and without _label at their end. Two files are one pair. FileNotFoundError and
    ValueError say what is missing; a prediction without a label is an error, a label without a
    prediction is not (a fold predicts a part of them).
    """
    for path in (predictions, labels):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    if not predictions.is_dir() and not labels.is_dir():
        name = predictions.name.removesuffix(".gz").removesuffix(".nii")
        return [Comparison(name, predictions, labels)], []
    if not (predictions.is_dir() and labels.is_dir()):
        raise ValueError(
            f"predictions and labels must be two folders or two files, got {predictions} and "
            f"{labels}"
        )
    guesses, truths = (_named(folder) for folder in (predictions, labels))
    _check_none_lost(guesses, truths, "label", labels, "rename or remove those predictions")
    pairs = [Comparison(name, path, truths[name]) for name, path in sorted(guesses.items())]
    return pairs, sorted(set(truths) - set(guesses))


def _check_none_lost(
    guesses: dict[str, Path], others: dict[str, Path], what: str, folder: Path, fix: str
) -> None:
    lost = [name for name in guesses if name not in others]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"every prediction needs a {what} of its name, but {folder} holds none for "
            f"{guesses[lost[0]].name}{more}; {fix}"
        )


def score(pair: Comparison, **options: Any) -> CaseScores:
    """Read both maps and score them; options as of `metrics.scores`.

    ValueError where they do not share one grid: scores are of voxels, nothing is resampled.
    """
    from tumorsynth.evaluation.metrics import scores

    label, guess = nifti.read_volume(pair.label), nifti.read_volume(pair.prediction)
    nifti.check_same_grid(label, guess, "label and prediction")
    spacing = np.linalg.norm(label.affine[:3, :3], axis=0)
    return scores(guess.integers(), label.integers(), spacing.tolist(), **options)


@dataclass(frozen=True)
class Scan:
    """A scan as a segmenter saw it; ``ct`` where a folder of CTs is given."""

    name: str
    prediction: Path
    ct: Path | None = None


def find_scans(predictions: Path, cts: Path | None = None) -> list[Scan]:
    """Every .nii[.gz] of a folder of predictions, with its namesake among the CTs.

    A CT's name may end in _ct, or in nnU-Net's _0000.
    """
    for folder in (predictions, cts):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    guesses = _named(predictions)
    if cts is None:
        return [Scan(name, path) for name, path in sorted(guesses.items())]
    images = {name.removesuffix("_0000"): path for name, path in find_files(cts, "_ct").items()}
    _check_none_lost(guesses, images, "CT", cts, "rename, or give the folder of those CTs")
    return [Scan(name, path, images[name]) for name, path in sorted(guesses.items())]


def volumes_ml(scan: Scan, tumor_label: int, organ_labels: Sequence[int]) -> tuple[float, float]:
    """Predicted volume of the organ labels together, without tumour, and of the tumour."""
    guess = nifti.read_volume(scan.prediction)
    values = guess.integers()
    ml = abs(float(np.linalg.det(guess.affine[:3, :3]))) / 1000
    organ = int(np.isin(values, list(organ_labels)).sum())
    return organ * ml, int((values == tumor_label).sum()) * ml


def why_not_healthy(
    organ_ml: float, tumor_ml: float, *, least_organ_ml: float, most_tumor_ml: float
) -> str | None:
    """None for a healthy scan: enough of the organ, and no more tumour than allowed."""
    if tumor_ml > most_tumor_ml:
        return "tumour predicted"
    if organ_ml < least_organ_ml or organ_ml == 0:
        return "too little of the organ"
    return None


def decathlon(scans: Sequence[Scan], beside: Path) -> dict[str, Any]:
    """A dataset.json of healthy CTs with the predictions as labels; paths as from ``beside``."""

    def path(to: Path) -> str:
        return Path(os.path.relpath(to.resolve(), beside.resolve())).as_posix()

    entries = [
        {"image": path(s.ct), "label": path(s.prediction), "healthy": True}
        for s in scans
        if s.ct is not None
    ]
    return {
        "name": "healthy scans",
        "description": "CTs without a predicted tumour; the labels are a segmenter's predictions",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "numTraining": len(entries),
        "numTest": 0,
        "training": entries,
        "test": [],
    }


def _named(folder: Path) -> dict[str, Path]:
    found = find_files(folder, "_label")
    if not found:
        raise ValueError(f"the folder {folder} holds no .nii.gz or .nii; give another folder")
    return found
