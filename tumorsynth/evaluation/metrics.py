"""Score a segmentation against its label, and summarise scores over cases with intervals.

MONAI computes Dice, surface Dice and Hausdorff distance; SciPy finds 26-connected components.
docs/evaluation.md defines every score.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tumorsynth.geometry import Frame, Rows3
from tumorsynth.label_values import round_labels

try:
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    from scipy import ndimage

    from tumorsynth.evaluation.boxes import crop_to_content
    from tumorsynth.evaluation.detection import (
        SCORE_DIGITS,
        TOUCHING,
        equivalent_diameter_mm,
        keep_inside,
    )
    from tumorsynth.evaluation.surfaces import straighten
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'no {error.name}: scores need pip install "tumorsynth[evaluation]"'
    ) from error


@dataclass(frozen=True)
class CaseScores:
    """Scores of one scan.

    The tuples have one entry for each real tumour, in the order of its first voxel (C order).

    Attributes:
        dsc: Dice of the tumours; None if the label has no tumour.
        nsd: surface Dice of the tumours; None if the label has no tumour.
        hd95_mm: 95th percentile of the Hausdorff distance; None if the label or the prediction has
            no tumour.
        organ_dsc: Dice of the organ with its tumours; None if the label has no organ.
        tumors: number of real tumours.
        detected: number of real tumours that are detected.
        false_positives: number of predicted components that touch no detected tumour.
        early_tumors: number of real tumours smaller than ``early_mm``.
        early_detected: number of early tumours that are detected.
        early_false_positives: number of false positives smaller than ``early_mm``.
        diameters_mm: equivalent diameters of the real tumours.
        found: whether each real tumour is detected.
    """

    dsc: float | None
    nsd: float | None
    hd95_mm: float | None
    organ_dsc: float | None
    tumors: int
    detected: int
    false_positives: int
    early_tumors: int
    early_detected: int
    early_false_positives: int
    diameters_mm: tuple[float, ...]
    found: tuple[bool, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return all scores as JSON types."""
        return asdict(self) | {"diameters_mm": list(self.diameters_mm), "found": list(self.found)}


def scores(
    prediction: Any,
    label: Any,
    spacing: Sequence[float],
    tumor_label: int = 2,
    organ_labels: int | Sequence[int] = (1,),
    early_mm: float = 20.0,
    *,
    tolerance_mm: float = 2.0,
    least_iou: float = 0.0,
    instances: Any | None = None,
    inside: Any | None = None,
    shear: Rows3 | None = None,
) -> CaseScores:
    """Score a predicted label map against the real one.

    A real tumour is detected if the prediction shares a voxel with it and the intersection over
    union with all predicted components that touch it is at least ``least_iou``. A predicted
    component that touches no detected tumour is a false positive. Components of one voxel count, as
    real tumours and as false positives.

    Args:
        prediction: (X, Y, Z) integer map, array or tensor.
        label: (X, Y, Z) integer map on the same grid.
        spacing: mm per voxel along the three axes.
        tumor_label: value of tumours in both maps.
        organ_labels: value or values of the organ in both maps; tumours count as organ, too.
        early_mm: tumours of a smaller equivalent diameter are early.
        tolerance_mm: tolerance of surface Dice.
        least_iou: from 0 to 1; 0.5 is the strict convention.
        instances: (X, Y, Z), a number for each real tumour and 0 elsewhere. Without it tumours that
            touch, also at a corner, are one.
        inside: (X, Y, Z), the region in which tumours count, where it is not 0. Predicted tumour
            outside is left out, and so are real tumours wholly outside.
        shear: of axes that are not at right angles (`tumorsynth.geometry.shear_of` an affine).

    Raises:
        ValueError: for maps of different shapes, spacing that is not positive, settings out of
            range, or instances that do not cover exactly the label's tumours.

    Examples:
        >>> case = scores(predicted, label, spacing=(0.8, 0.8, 2.5))
        >>> case.dsc, case.detected, case.tumors
    """
    predicted_map, label_map = _label_map(prediction, "prediction"), _label_map(label, "label")
    if predicted_map.shape != label_map.shape:
        raise ValueError(
            f"prediction and label must share one grid, got shapes {predicted_map.shape} and "
            f"{label_map.shape}; resample the prediction onto the label's grid (nearest neighbour)"
        )
    mm = _check_spacing(spacing)
    check_settings(early_mm=early_mm, tolerance_mm=tolerance_mm, least_iou=least_iou)
    organ = [organ_labels] if isinstance(organ_labels, int) else list(organ_labels)
    predicted, real = predicted_map == tumor_label, label_map == tumor_label
    numbered = None
    if instances is not None:
        numbered = _check_instances(instances, real, tumor_label)
    if inside is not None:
        region = _label_map(inside, "inside") != 0
        if region.shape != real.shape:
            raise ValueError(
                f"label and inside must share one grid, got shapes {real.shape} and "
                f"{region.shape}; resample the region onto the label's grid"
            )
        all_tumors = ndimage.label(real, TOUCHING)[0] if numbered is None else numbered
        numbered = keep_inside(all_tumors, region)[0]
        predicted, real = predicted & region, numbered != 0
    organs = [np.isin(m, [*organ, tumor_label]) for m in (predicted_map, label_map)]
    organ_dsc = None
    if np.isin(label_map, organ).any():
        organ_dsc = _dice(*crop_to_content(*organs))
    if numbered is None:
        predicted, real = crop_to_content(predicted, real)
        numbered = ndimage.label(real, TOUCHING)[0]
    else:
        predicted, real, numbered = crop_to_content(predicted, real, numbered)

    x, y, z = mm.tolist()
    voxel_mm3 = Frame((x, y, z), shear=shear).voxel_mm3
    diameters, detected, false = _match_tumors(predicted, numbered, voxel_mm3, least_iou)
    early = [d < early_mm for d in diameters]
    nsd = hd95 = None
    if real.any() and predicted.any():
        surfaces = predicted, real
        if shear is not None:
            surfaces = straighten(predicted, mm, shear), straighten(real, mm, shear)
        with warnings.catch_warnings():  # MONAI 1.6 calls its own deprecated functions
            warnings.simplefilter("ignore", FutureWarning)
            nsd = _surface_dice(*surfaces, mm, tolerance_mm)
            hd95 = _hausdorff95(*surfaces, mm)
    elif real.any():
        nsd = 0.0
    return CaseScores(
        dsc=_dice(predicted, real) if real.any() else None,
        nsd=nsd,
        hd95_mm=hd95,
        organ_dsc=organ_dsc,
        tumors=len(detected),
        detected=sum(detected),
        false_positives=len(false),
        early_tumors=sum(early),
        early_detected=sum(d for d, e in zip(detected, early, strict=True) if e),
        early_false_positives=sum(d < early_mm for d in false),
        diameters_mm=tuple(diameters),
        found=tuple(detected),
    )


def summary(cases: Sequence[CaseScores], bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Summarise scores over cases, with 95 % intervals.

    Every score is a ratio of sums over cases; sensitivity is pooled over all tumours. The intervals
    resample cases (percentile bootstrap), because tumours of one patient are not independent. With
    few cases they are too narrow.

    Args:
        cases: scores of each case.
        bootstrap: number of resamples; 0 for no intervals.
        seed: of the resampling.

    Returns:
        JSON types: the number of cases, and for each score {"value", "ci95": [low, high], "n",
        "of"}, where ``n`` counts the cases, tumours or scans that ``of`` names. "ci95" is None for
        fewer than two cases with a defined score.

    Raises:
        ValueError: for a negative ``bootstrap``.

    Examples:
        >>> summary([scores(p, l, spacing) for p, l in pairs])["sensitivity"]["value"]
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be 0 or more draws, got {bootstrap}")
    count = len(cases)
    with_tumor = np.array([c.tumors > 0 for c in cases], bool)
    rng = np.random.default_rng(seed)
    # how often each resample holds each case
    resamples = rng.multinomial(count, np.full(count, 1 / count), bootstrap) if count else None

    def ratio(top: Sequence[float | None], bottom: Any, of: str) -> dict[str, Any]:
        denominator = np.asarray(bottom, float)
        numerator = np.array([t or 0.0 for t in top], float) * (denominator > 0)
        n = int(denominator.sum())
        interval = None
        if bootstrap and resamples is not None and (denominator > 0).sum() > 1:
            sums = resamples @ denominator
            ratios = (resamples @ numerator)[sums > 0] / sums[sums > 0]
            interval = [float(v) for v in np.percentile(ratios, [2.5, 97.5])]
        value = float(numerator.sum() / n) if n else None
        return {"value": value, "ci95": interval, "n": n, "of": of}

    def mean(name: str) -> dict[str, Any]:
        values = [getattr(c, name) for c in cases]
        return ratio(values, [v is not None for v in values], "cases")

    def pooled(top: str, bottom: str) -> dict[str, Any]:
        return ratio(
            [getattr(c, top) for c in cases], [getattr(c, bottom) for c in cases], "tumours"
        )

    return {
        "cases": count,
        "cases_with_tumor": int(with_tumor.sum()),
        "dsc": mean("dsc"),
        "nsd": mean("nsd"),
        "hd95_mm": mean("hd95_mm"),
        "organ_dsc": mean("organ_dsc"),
        "sensitivity": pooled("detected", "tumors"),
        "early_sensitivity": pooled("early_detected", "early_tumors"),
        "false_positives_per_scan": ratio(
            [c.false_positives for c in cases], np.ones(count), "scans"
        ),
        "early_false_positives_per_scan": ratio(
            [c.early_false_positives for c in cases], np.ones(count), "scans"
        ),
        "specificity": ratio(
            [float(not c.false_positives) for c in cases], ~with_tumor, "scans without tumour"
        ),
    }


def _check_spacing(spacing: Sequence[float]) -> np.ndarray:
    mm = np.asarray(spacing, float)
    if mm.shape != (3,) or not np.isfinite(mm).all() or (mm <= 0).any():
        raise ValueError(f"spacing must be three positive numbers of mm, got {spacing!r}")
    return mm


def _check_instances(instances: Any, real: np.ndarray, tumor_label: int) -> np.ndarray:
    numbered = _label_map(instances, "instances")
    if numbered.shape != real.shape or ((numbered != 0) != real).any():
        raise ValueError(
            f"instances must be 0 but where label is {tumor_label}, and number each tumour "
            "there; make them from this label"
        )
    return numbered


def _label_map(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.ndim != 3 or not array.size or array.dtype.kind not in "iufb":
        raise ValueError(
            f"{name} must be a map of labels (X, Y, Z), got shape {array.shape}, {array.dtype}"
        )
    if array.dtype.kind != "f":
        return array
    try:
        return round_labels(array)
    except ValueError as error:
        raise ValueError(
            f"{name} must hold whole numbers, got {error}; give a label map (of "
            "probabilities, match_scan and --probabilities take those)"
        ) from None


def check_settings(*, early_mm: float, tolerance_mm: float, least_iou: float) -> None:
    """Raise ValueError for settings of `scores` that are out of range."""
    if not 0 <= least_iou <= 1:
        raise ValueError(f"least_iou must lie in [0, 1], got {least_iou}; 0.5 is the strict rule")
    if not 0 <= tolerance_mm < float("inf"):
        raise ValueError(f"tolerance_mm must be at least 0, got {tolerance_mm}; 2 is usual")
    if not 0 <= early_mm < float("inf"):
        raise ValueError(f"early_mm must be at least 0, got {early_mm}; the paper's is 20")


def _match_tumors(
    predicted: np.ndarray, real: np.ndarray, voxel_mm3: float, least_iou: float
) -> tuple[list[float], list[bool], list[float]]:
    """Diameters of the real tumours, whether each is detected, and diameters of false positives."""
    components, _ = ndimage.label(predicted, TOUCHING)
    size = np.bincount(components.ravel())
    numbers, first, volumes = np.unique(real, return_index=True, return_counts=True)
    order = [k for k in np.argsort(first) if numbers[k] != 0]
    both = (real != 0) & predicted
    pairs, shared = np.unique([real[both], components[both]], axis=1, return_counts=True)
    detected, true_positives = [], set()
    for k in order:
        own = pairs[0] == numbers[k]
        touching, intersection = pairs[1, own], shared[own].sum()
        union = volumes[k] + size[touching].sum() - intersection
        detected.append(bool(intersection > 0 and intersection / union >= least_iou))
        if detected[-1]:
            true_positives.update(touching.tolist())
    diameters = [equivalent_diameter_mm(volumes[k] * voxel_mm3) for k in order]
    false = [
        equivalent_diameter_mm(n * voxel_mm3)
        for k, n in enumerate(size)
        if k and k not in true_positives
    ]
    return diameters, detected, false


def _dice(predicted: np.ndarray, real: np.ndarray) -> float:
    return _rounded(compute_dice(*_batches(predicted, real), include_background=True))


def _surface_dice(
    predicted: np.ndarray, real: np.ndarray, mm: np.ndarray, tolerance: float
) -> float:
    # weighted by the area of surface elements: counting boundary voxels would weigh thick slices
    # like thin ones
    value = compute_surface_dice(
        *_batches(predicted, real),
        class_thresholds=[tolerance],
        include_background=True,
        spacing=mm.tolist(),
        use_subvoxels=True,
    )
    return _rounded(value)


def _hausdorff95(predicted: np.ndarray, real: np.ndarray, mm: np.ndarray) -> float:
    value = compute_hausdorff_distance(
        *_batches(predicted, real), include_background=True, percentile=95, spacing=mm.tolist()
    )
    return _rounded(value)


def _batches(predicted: np.ndarray, real: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(predicted)[None, None], torch.from_numpy(real)[None, None]


def _rounded(value: torch.Tensor) -> float:
    return round(float(value), SCORE_DIGITS)
