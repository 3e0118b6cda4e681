"""Folders of predictions: pair them with labels and score them, or select healthy scans.

The paper (appendix E.1) synthesises tumours into healthy scans only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tumorsynth.affines import voxel_sizes
from tumorsynth.geometry import shear_of
from tumorsynth.scans import volume_files
from tumorsynth.scans.file_kinds import check_is_there, describe_folder
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.pairing import find_files, has_ending, name_of
from tumorsynth.scans.volume import Volume

if TYPE_CHECKING:
    from tumorsynth.evaluation.detection import ScanMatches
    from tumorsynth.evaluation.metrics import CaseScores


@dataclass(frozen=True)
class Comparison:
    """A predicted label map and the real one; ``inside`` is a map of the organ that counts."""

    name: str
    prediction: Path
    label: Path
    inside: Path | None = None


@dataclass(frozen=True)
class PairScores:
    """Scores of one pair: of its masks, and of its candidates.

    Attributes:
        scores: of the masks.
        matches: of the candidates.
        holds_tumor: whether a voxel is predicted as tumour.
        holds_other: whether the predicted map holds another value than 0 and the tumour's.
    """

    scores: CaseScores
    matches: ScanMatches
    holds_tumor: bool
    holds_other: bool


def find_comparisons(
    predictions: Path, labels: Path, inside: Path | None = None
) -> tuple[list[Comparison], list[str]]:
    """Pair predictions with labels.

    Args:
        predictions: a folder of .nii[.gz] files, or one file.
        labels: a folder with files of the same names, or one file. Names are compared without
            .nii[.gz] and without a final _label. NAME_ct beside NAME_label or NAME, as
            `tumorsynth synthesize` writes them, is a CT and left out.
        inside: organ maps, likewise: a folder with one for each prediction, or one file.

    Returns:
        The pairs sorted by name, and the names of labels without a prediction, which is no error: a
        fold predicts some of them.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: for a folder and a file, an empty folder, or a prediction without a label.
    """
    for path in (predictions, labels, inside):
        if path is not None:
            check_is_there(path)
    if inside is not None and inside.is_dir() != predictions.is_dir():
        raise ValueError(
            f"predictions and organ maps must be two folders or two files, got {predictions} and "
            f"{inside}"
        )
    if not predictions.is_dir() and not labels.is_dir():
        name = name_of(predictions) or predictions.name
        return [Comparison(name, predictions, labels, inside)], []
    if not (predictions.is_dir() and labels.is_dir()):
        raise ValueError(
            f"predictions and labels must be two folders or two files, got {predictions} and "
            f"{labels}"
        )
    predicted, real = (_files_by_name(folder) for folder in (predictions, labels))
    _check_all_paired(predicted, real, "label", labels, "rename or remove those predictions")
    organs: dict[str, Path] = {}
    if inside is not None:
        organs = _files_by_name(inside)
        _check_all_paired(predicted, organs, "organ map", inside, "add it")
    pairs = [
        Comparison(name, path, real[name], organs.get(name))
        for name, path in sorted(predicted.items())
    ]
    return pairs, sorted(set(real) - set(predicted))


def _check_all_paired(
    predicted: dict[str, Path], others: dict[str, Path], kind: str, folder: Path, fix: str
) -> None:
    unpaired = [name for name in predicted if name not in others]
    if unpaired:
        more = f" and {len(unpaired) - 1} more" if len(unpaired) > 1 else ""
        raise ValueError(
            f"every prediction needs one {kind} of its name, but {folder} holds none for "
            f"{predicted[unpaired[0]].name}{more}; {fix}"
        )


def score(
    pair: Comparison,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    *,
    tumor_label: int = 2,
    organ_labels: Sequence[int] = (1,),
    probabilities: bool = False,
    threshold: float = 0.5,
    candidate_threshold: float = 0.1,
    inside_organ: bool = False,
    early_mm: float = 20.0,
    tolerance_mm: float = 2.0,
    least_iou: float = 0.0,
) -> PairScores:
    """Read the maps of a pair and score them.

    Args:
        pair: the files.
        reading: what to do where they contradict themselves or each other.
        tumor_label: value of tumours in label maps.
        organ_labels: values of the organ in label maps.
        probabilities: whether the prediction is a map of the tumour's probability.
        threshold: probability from which a voxel is predicted as tumour.
        candidate_threshold: lowest probability in a candidate of FROC.
        inside_organ: whether only the organ and the tumours of the label count.
        early_mm: see `metrics.scores`, as for the rest.
        tolerance_mm: of surface Dice.
        least_iou: of a detection.

    Raises:
        ValueError: if they do not share one grid; nothing is resampled.
    """
    from tumorsynth.evaluation.detection import match_scan
    from tumorsynth.evaluation.metrics import scores

    label = volume_files.read_volume(pair.label, reading)
    predicted = volume_files.read_volume(pair.prediction, reading)
    volume_files.check_same_grid(label, predicted, "label and prediction", reading)
    values = label.integers()
    region = label if inside_organ else None
    if pair.inside is not None:
        region = volume_files.read_volume(pair.inside, reading)
        volume_files.check_same_grid(label, region, "label and organ map", reading)
    inside = None
    if region is not None:
        inside = _inside(region, [*organ_labels, tumor_label])
    try:
        probability = predicted.values() if probabilities else predicted.integers() == tumor_label
    except ValueError as error:
        raise ValueError(f"{error}; of probabilities, add --probabilities") from None
    common: dict[str, Any] = {
        "spacing": voxel_sizes(label.affine).tolist(),
        "tumor_label": tumor_label,
        "tolerance_mm": tolerance_mm,
        "least_iou": least_iou,
        "inside": inside,
        "shear": shear_of(label.affine),
    }
    matches = match_scan(
        probability,
        values,
        candidate_threshold=candidate_threshold,
        mask_threshold=threshold,
        **common,
    )
    if probabilities:
        predicted_map = (probability >= threshold).astype(np.int32) * tumor_label
    else:
        predicted_map = predicted.integers()
    of_masks = scores(predicted_map, values, organ_labels=organ_labels, early_mm=early_mm, **common)
    if probabilities:  # which say nothing about the organ
        of_masks = replace(of_masks, organ_dsc=None)
    is_tumor = predicted_map == tumor_label
    holds_other = bool(((predicted_map != 0) & ~is_tumor).any())
    return PairScores(of_masks, matches, bool(is_tumor.any()), holds_other)


def _inside(region: Volume, wanted: Sequence[int]) -> np.ndarray:
    values = region.integers()
    inside = np.isin(values, wanted)
    if not inside.any():
        held = ", ".join(map(str, np.unique(values)))
        raise ValueError(
            f"{region.name} must hold the organ that counts, but none of "
            f"{', '.join(map(str, wanted))} is in it (it holds {held}); give its value as "
            "--organ-label"
        )
    return inside


def label_values(path: Path, reading: Reading) -> list[int]:
    """Return the values that a label map holds, in order."""
    return np.unique(volume_files.read_volume(path, reading).integers()).tolist()


@dataclass(frozen=True)
class Scan:
    """A scan as a segmenter saw it; ``ct`` is None without a folder of CTs."""

    name: str
    prediction: Path
    ct: Path | None = None


def find_scans(predictions: Path, cts: Path | None = None) -> list[Scan]:
    """Find the predictions of a folder and their CTs.

    Args:
        predictions: a folder of .nii[.gz] files.
        cts: a folder of CTs with the same names, which may end in _ct or in nnU-Net's _0000.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: for an empty folder, or a prediction without a CT.
    """
    for folder in (predictions, cts):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    predicted = _files_by_name(predictions)
    if cts is None:
        return [Scan(name, path) for name, path in sorted(predicted.items())]
    images = {name.removesuffix("_0000"): path for name, path in find_files(cts, "_ct").items()}
    _check_all_paired(predicted, images, "CT", cts, "rename, or give the folder of those CTs")
    return [Scan(name, path, images[name]) for name, path in sorted(predicted.items())]


def volumes_ml(
    scan: Scan,
    tumor_label: int,
    organ_labels: Sequence[int],
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> tuple[float, float]:
    """Return the predicted volumes in ml of the organ (without tumour) and of the tumour."""
    predicted = volume_files.read_volume(scan.prediction, reading)
    values = predicted.integers()
    voxel_ml = abs(float(np.linalg.det(predicted.affine[:3, :3]))) / 1000
    organ = int(np.isin(values, list(organ_labels)).sum())
    return organ * voxel_ml, int((values == tumor_label).sum()) * voxel_ml


def why_not_healthy(
    organ_ml: float, tumor_ml: float, *, least_organ_ml: float, most_tumor_ml: float
) -> str | None:
    """Return why a scan is not healthy, or None if it is.

    Args:
        organ_ml: predicted volume of the organ.
        tumor_ml: predicted volume of the tumour.
        least_organ_ml: smallest organ of a healthy scan.
        most_tumor_ml: largest tumour of a healthy scan.
    """
    if tumor_ml > most_tumor_ml:
        return "tumour predicted"
    if organ_ml < least_organ_ml or organ_ml == 0:
        return "too little of the organ"
    return None


def decathlon(scans: Sequence[Scan], beside: Path) -> dict[str, Any]:
    """Build a dataset.json of healthy CTs with the predictions as labels.

    Args:
        scans: healthy scans; those without a CT are left out.
        beside: folder of the dataset.json, to which paths are relative.
    """

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()

    entries = [
        {"image": relative(s.ct), "label": relative(s.prediction), "healthy": True}
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


def _files_by_name(folder: Path) -> dict[str, Path]:
    """List the label maps of a folder by name; NAME_ct beside NAME_label or NAME is their CT."""
    files = find_files(folder, "_label")
    names = {name.casefold() for name in files}
    cts = [
        name
        for name, path in files.items()
        if has_ending(path, "_ct") and name[: -len("_ct")].casefold() in names
    ]
    for name in cts:
        del files[name]
    if not files:
        if what := describe_folder(folder):
            raise ValueError(f"label maps must be several files, but {folder} is a folder{what}")
        raise ValueError(f"the folder {folder} holds no .nii.gz or .nii; give another folder")
    return files
