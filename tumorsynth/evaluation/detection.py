"""Match the candidates of one scan to its real tumours. Needs NumPy and SciPy alone.

A candidate is a 26-connected part of the scan where the predicted probability of tumour is at least
a threshold; its score is the highest probability in it. A label map is a probability of 1.
`froc.py` turns the matches of many scans into sensitivities at rates of false positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from tumorsynth.arguments import format_beside
from tumorsynth.evaluation.boxes import crop_to_content
from tumorsynth.evaluation.surfaces import straighten, surface_dice

TOUCHING = np.ones((3, 3, 3))  # 26-connectivity: voxels that share a corner touch
SCORE_DIGITS = 6  # single precision holds no more
PROBABILITY_ROUNDING = 1e-3  # beyond 0 and 1, as files of whole numbers with a scale have it


@dataclass(frozen=True)
class TumorMatch:
    """What a prediction makes of one real tumour.

    Attributes:
        diameter_mm: equivalent diameter.
        score: highest score of the candidates that match it; None if none does.
        dsc: Dice of the tumour and the predicted parts that touch it; None if none does.
        nsd: surface Dice of the same.
    """

    diameter_mm: float
    score: float | None
    dsc: float | None
    nsd: float | None


@dataclass(frozen=True)
class ScanMatches:
    """Matches of one scan.

    Attributes:
        tumors: the real tumours, in the order of their first voxel (C order).
        false_scores: scores of the candidates that match no tumour, highest first.
        dsc: Dice of all tumour voxels; None if the label has no tumour.
        nsd: surface Dice of the same.
        outside: real tumours that are left out since none of their voxels lies in ``inside``.
    """

    tumors: tuple[TumorMatch, ...]
    false_scores: tuple[float, ...]
    dsc: float | None = None
    nsd: float | None = None
    outside: int = 0

    @property
    def is_healthy(self) -> bool:
        """Whether the label has no tumour."""
        return not self.tumors and not self.outside

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self) | {
            "tumors": [asdict(tumor) for tumor in self.tumors],
            "false_scores": list(self.false_scores),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScanMatches:
        """Return what `as_dict` was called on."""
        tumors = tuple(TumorMatch(**tumor) for tumor in values["tumors"])
        false_scores = tuple(values["false_scores"])
        return cls(**{**values, "tumors": tumors, "false_scores": false_scores})


def match_scan(
    prediction: Any,
    label: Any,
    spacing: Sequence[float],
    tumor_label: int = 2,
    *,
    inside: Any | None = None,
    candidate_threshold: float = 0.1,
    mask_threshold: float = 0.5,
    least_iou: float = 0.0,
    tolerance_mm: float = 2.0,
    instances: Any | None = None,
    shear: Sequence[Sequence[float]] | None = None,
) -> ScanMatches:
    """Match a prediction of tumour to the real tumours of a scan.

    A candidate matches a tumour if they share a voxel and their intersection over union is at least
    ``least_iou``. A candidate that matches none is a false positive.

    Args:
        prediction: (X, Y, Z), the probability of tumour in [0, 1], or a bool mask, which counts as
            probability 1; array or tensor. Of a label map pass ``prediction == tumor_label``.
        label: (X, Y, Z) on the same grid, integers or a bool mask of the tumours.
        spacing: mm per voxel along the three axes.
        tumor_label: value of tumours in ``label``, unless that is a bool mask.
        inside: (X, Y, Z), the region that counts, where it is not 0, for example an organ with its
            tumours. Predictions outside count as 0, and so do real tumours wholly outside. A tumour
            partly outside stays whole.
        candidate_threshold: lowest probability in a candidate.
        mask_threshold: probability from which a voxel belongs to the predicted mask, which the Dice
            scores compare.
        least_iou: from 0 to 1; 0 is one common voxel.
        tolerance_mm: tolerance of surface Dice.
        instances: (X, Y, Z), a number for each real tumour and 0 elsewhere. Without it tumours that
            touch, also at a corner, are one.
        shear: of axes that are not at right angles (`tumorsynth.geometry.shear_of` an affine).

    Raises:
        ValueError: for maps of different shapes, values that are no probabilities, or settings out
            of range.

    Examples:
        >>> match_scan(probability, label, spacing=(0.8, 0.8, 2.5), inside=label > 0).tumors
    """
    check_thresholds(candidate_threshold, mask_threshold, least_iou, tolerance_mm)
    probability, real = _probability(prediction), _tumor_mask(label, tumor_label)
    maps = {"label": real}
    if inside is not None:
        maps["inside"] = inside = _array(inside) != 0
    if instances is not None:
        maps["instances"] = instances = _array(instances)
    for name, one in maps.items():
        if one.shape != probability.shape:
            raise ValueError(
                f"prediction and {name} must share one grid, got shapes {probability.shape} and "
                f"{one.shape}; resample the prediction onto the label's grid"
            )
    if instances is not None and ((instances != 0) != real).any():
        raise ValueError(
            f"instances must be 0 but where label is {tumor_label}, and number each tumour there; "
            "make them from this label"
        )
    mm = _check_spacing(spacing)
    if inside is not None:
        probability = np.where(inside, probability, probability.dtype.type(0))
    least = min(candidate_threshold, mask_threshold)
    probability = np.where(probability >= least, probability, probability.dtype.type(0))
    if instances is None:
        numbered = ndimage.label(real, TOUCHING)[0]
    else:
        numbered = np.zeros(real.shape, int)  # numbers in a row
        numbered[real] = np.unique(instances[real], return_inverse=True)[1] + 1
    numbered, outside = keep_inside(numbered, inside)
    probability, numbered = crop_to_content(probability, numbered)

    voxel_mm3 = float(mm.prod()) * abs(1.0 if shear is None else float(np.linalg.det(shear)))
    scores, false_scores = _match(probability, numbered, candidate_threshold, least_iou)
    predicted, real = probability >= mask_threshold, numbered != 0
    compare = _Comparison(mm, tolerance_mm, shear)
    parts = ndimage.label(predicted, TOUCHING)[0]
    boxes, part_boxes = ndimage.find_objects(numbered), ndimage.find_objects(parts)
    tumors = []
    for number, score in scores.items():
        box = boxes[number - 1]
        own = numbered[box] == number
        diameter = equivalent_diameter_mm(float(own.sum()) * voxel_mm3)
        touching = np.unique(parts[box][own & predicted[box]])
        dsc = nsd = None
        if touching.size:
            box = _hull([box, *(part_boxes[k - 1] for k in touching)])
            own = numbered[box] == number
            dsc, nsd = compare(np.isin(parts[box], touching) & (own | ~real[box]), own)
        tumors.append(TumorMatch(diameter, score, dsc, nsd))
    dsc, nsd = compare(predicted, real) if tumors else (None, None)
    return ScanMatches(tuple(tumors), tuple(sorted(false_scores, reverse=True)), dsc, nsd, outside)


def equivalent_diameter_mm(volume_mm3: float) -> float:
    """Return the diameter of the sphere of this volume."""
    return float((6 * volume_mm3 / np.pi) ** (1 / 3))


def keep_inside(numbered: np.ndarray, inside: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Remove tumours that have no voxel inside, and count them.

    Args:
        numbered: a number for each tumour, 0 elsewhere.
        inside: bool, the same shape; None keeps all.

    Raises:
        ValueError: if no voxel is inside, so that nothing would count.
    """
    if inside is None:
        return numbered, 0
    if not inside.any():
        raise ValueError("inside must hold a voxel that counts, got 0 everywhere; give an organ")
    all_numbers = np.unique(numbered[numbered != 0])
    kept = np.unique(numbered[inside & (numbered != 0)])
    if len(kept) == len(all_numbers):
        return numbered, 0
    return np.where(np.isin(numbered, kept), numbered, 0), len(all_numbers) - len(kept)


def check_thresholds(
    candidate_threshold: float, mask_threshold: float, least_iou: float, tolerance_mm: float
) -> None:
    """Raise ValueError for settings of `match_scan` that are out of range."""
    for name, value in (
        ("candidate_threshold", candidate_threshold),
        ("mask_threshold", mask_threshold),
    ):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value}; it is a probability")
    if not 0 <= least_iou <= 1:
        raise ValueError(f"least_iou must lie in [0, 1], got {least_iou}; 0.5 is the strict rule")
    if not 0 <= tolerance_mm < float("inf"):
        raise ValueError(f"tolerance_mm must be at least 0, got {tolerance_mm}; 2 is usual")


@dataclass(frozen=True)
class _Comparison:
    """Dice and surface Dice of two masks."""

    mm: np.ndarray
    tolerance_mm: float
    shear: Sequence[Sequence[float]] | None

    def __call__(self, predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
        predicted, real = crop_to_content(predicted, real)
        dsc = 2 * int((predicted & real).sum()) / int(predicted.sum() + real.sum())
        nsd = 0.0
        if predicted.any():
            if self.shear is not None:
                predicted, real = (straighten(m, self.mm, self.shear) for m in (predicted, real))
            nsd = surface_dice(predicted, real, self.mm.tolist(), self.tolerance_mm)
        return round(dsc, SCORE_DIGITS), round(nsd, SCORE_DIGITS)


def _match(
    probability: np.ndarray, numbered: np.ndarray, threshold: float, least_iou: float
) -> tuple[dict[int, float | None], list[float]]:
    """Scores of the real tumours by their number, and scores of the false positives."""
    candidates, count = ndimage.label(probability >= threshold, TOUCHING)
    index = np.arange(1, count + 1)
    score = ndimage.maximum(probability, candidates, index) if count else np.zeros(0)
    candidate_voxels = np.bincount(candidates.ravel(), minlength=count + 1)
    numbers, first, tumor_voxels = np.unique(numbered, return_index=True, return_counts=True)
    voxels_of = dict(zip(numbers.tolist(), tumor_voxels.tolist(), strict=True))
    best: dict[int, float | None] = {
        int(numbers[k]): None for k in np.argsort(first) if numbers[k] != 0
    }
    both = (numbered != 0) & (candidates != 0)
    pairs, shared = np.unique([numbered[both], candidates[both]], axis=1, return_counts=True)
    matched = set()
    for number, candidate, common in zip(*pairs.tolist(), shared.tolist(), strict=True):
        union = voxels_of[number] + int(candidate_voxels[candidate]) - common
        if common / union >= least_iou:
            matched.add(candidate)
            own = float(score[candidate - 1])
            best[number] = max(own, best[number] or 0.0)
    return best, [float(score[k - 1]) for k in index.tolist() if k not in matched]


def _hull(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(
        slice(min(s.start for s in own), max(s.stop for s in own))
        for own in zip(*boxes, strict=True)
    )


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor; this module does without torch
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _probability(prediction: Any) -> np.ndarray:
    array = _array(prediction)
    if array.ndim != 3 or not array.size or array.dtype.kind not in "iufb":
        raise ValueError(
            f"prediction must be a map of probabilities (X, Y, Z), got shape {array.shape}, "
            f"{array.dtype}"
        )
    if array.dtype.kind == "b":
        return array.astype(np.float32)
    low, high = array.min(), array.max()  # NaN if there is one
    if not (low >= -PROBABILITY_ROUNDING and high <= 1 + PROBABILITY_ROUNDING):
        found = " to ".join(format_beside(float(end), (0, 1), ".6g") for end in (low, high))
        raise ValueError(
            f"prediction must be a probability of tumour in [0, 1], got {found}; for "
            "logits apply softmax or sigmoid first, for a label map pass prediction == tumor_label"
        )
    return np.clip(array if array.dtype.kind == "f" else array.astype(np.float32), 0, 1)


def _tumor_mask(label: Any, tumor_label: int) -> np.ndarray:
    array = _array(label)
    mask: np.ndarray = array if array.dtype.kind == "b" else array == tumor_label
    return mask


def _check_spacing(spacing: Sequence[float]) -> np.ndarray:
    mm = np.asarray(spacing, float)
    if mm.shape != (3,) or not np.isfinite(mm).all() or (mm <= 0).any():
        raise ValueError(f"spacing must be three positive numbers of mm, got {spacing!r}")
    return mm
