"""Scores of one segmentation against its label, and their summary over cases with intervals.

Dice, surface Dice and Hausdorff distance are MONAI's; components are SciPy's, by 26-connectivity.
docs/evaluation.md gives every definition in words.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

try:
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    from scipy import ndimage
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'no {error.name}: scores need pip install "tumorsynth[evaluation]"'
    ) from error


@dataclass(frozen=True)
class CaseScores:
    """Scores of one scan. None where a score is undefined, which its comment says.

    The tuples have one entry for each real tumour, in the order of its first voxel (C order).
    """

    dsc: float | None  # no tumour in the label
    nsd: float | None  # no tumour in the label
    hd95_mm: float | None  # no tumour in the label or none predicted
    organ_dsc: float | None  # no organ in the label
    tumors: int
    detected: int
    false_positives: int  # predicted components
    early_tumors: int
    early_detected: int
    early_false_positives: int  # of less than early_mm themselves
    diameters_mm: tuple[float, ...]  # equivalent diameters of the real tumours
    found: tuple[bool, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON's own types."""
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
) -> CaseScores:
    """Compare a predicted label map with the real one.

    prediction, label: (X, Y, Z) integer maps on one grid, arrays or tensors. spacing: mm per voxel
    along the axes. tumor_label and organ_labels hold for both; a tumour counts as organ, too.
    early_mm: tumours of a smaller equivalent diameter are early. tolerance_mm: of surface Dice.

    A real tumour is detected where the prediction shares a voxel with it and, with ``least_iou``,
    where the intersection over union with all predicted components that touch it is at least that
    (0.5 is the strict convention). A predicted component that touches no detected tumour is a false
    positive. Tumours that touch, corners included, are one, unless ``instances`` numbers them:
    (X, Y, Z), 0 outside the tumours. Components of one voxel count, as real tumours and as false
    positives.

    ValueError for another shape, spacing that is not positive, or instances that do not cover
    exactly the label's tumours.
    """
    guess, truth = _map(prediction, "prediction"), _map(label, "label")
    if guess.shape != truth.shape:
        raise ValueError(
            f"prediction and label must share one grid, got shapes {guess.shape} and "
            f"{truth.shape}; resample the prediction onto the label's grid (nearest neighbour)"
        )
    mm = np.asarray(spacing, float)
    if mm.shape != (3,) or not np.isfinite(mm).all() or (mm <= 0).any():
        raise ValueError(f"spacing must be three positive numbers of mm, got {spacing!r}")
    check_settings(early_mm=early_mm, tolerance_mm=tolerance_mm, least_iou=least_iou)
    organ = [organ_labels] if isinstance(organ_labels, int) else list(organ_labels)
    predicted, real = guess == tumor_label, truth == tumor_label
    numbered = None
    if instances is not None:
        numbered = _map(instances, "instances")
        if numbered.shape != real.shape or ((numbered != 0) != real).any():
            raise ValueError(
                f"instances must be 0 but where label is {tumor_label}, and number each tumour "
                "there; make them from this label"
            )
    organs = [np.isin(m, [*organ, tumor_label]) for m in (guess, truth)]
    organ_dsc = None
    if np.isin(truth, organ).any():
        organ_dsc = _dice(*_boxed(*organs))
    if numbered is None:
        predicted, real = _boxed(predicted, real)
        numbered = ndimage.label(real, np.ones((3, 3, 3)))[0]
    else:
        predicted, real, numbered = _boxed(predicted, real, numbered)

    diameters, found, false = _lesions(predicted, numbered, float(mm.prod()), least_iou)
    early = [d < early_mm for d in diameters]
    nsd = hd95 = None
    if real.any() and predicted.any():
        with warnings.catch_warnings():  # MONAI 1.6 uses what it deprecates
            warnings.simplefilter("ignore", FutureWarning)
            nsd = _surface_dice(predicted, real, mm, tolerance_mm)
            hd95 = _hausdorff95(predicted, real, mm)
    elif real.any():
        nsd = 0.0
    return CaseScores(
        dsc=_dice(predicted, real) if real.any() else None,
        nsd=nsd,
        hd95_mm=hd95,
        organ_dsc=organ_dsc,
        tumors=len(found),
        detected=sum(found),
        false_positives=len(false),
        early_tumors=sum(early),
        early_detected=sum(f for f, e in zip(found, early, strict=True) if e),
        early_false_positives=sum(d < early_mm for d in false),
        diameters_mm=tuple(diameters),
        found=tuple(found),
    )


def summary(cases: Sequence[CaseScores], bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over cases with 95 % intervals, JSON's own types.

    Each score is {"value", "ci95": [low, high] or None, "n", "of"}: n cases, tumours or scans count
    (``of`` says which). Sensitivity is pooled: detected tumours of all tumours. Every score is a
    ratio of sums over cases; the interval resamples cases (percentile bootstrap, ``bootstrap``
    draws), because tumours of one patient are not independent. It is None below two cases that
    count, and an interval of few cases is too narrow.
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be 0 or more draws, got {bootstrap}")
    count = len(cases)
    ill = np.array([c.tumors > 0 for c in cases], bool)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), bootstrap) if count else None

    def ratio(top: Sequence[float | None], below: Any, of: str) -> dict[str, Any]:
        under = np.asarray(below, float)
        over = np.array([t or 0.0 for t in top], float) * (under > 0)
        n = int(under.sum())
        interval = None
        if bootstrap and drawn is not None and (under > 0).sum() > 1:
            parts = drawn @ under
            draws = (drawn @ over)[parts > 0] / parts[parts > 0]
            interval = [float(v) for v in np.percentile(draws, [2.5, 97.5])]
        return {"value": float(over.sum() / n) if n else None, "ci95": interval, "n": n, "of": of}

    def mean(name: str) -> dict[str, Any]:
        values = [getattr(c, name) for c in cases]
        return ratio(values, [v is not None for v in values], "cases")

    def pooled(top: str, below: str) -> dict[str, Any]:
        return ratio(
            [getattr(c, top) for c in cases], [getattr(c, below) for c in cases], "tumours"
        )

    return {
        "cases": count,
        "cases_with_tumor": int(ill.sum()),
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
            [float(not c.false_positives) for c in cases], ~ill, "scans without tumour"
        ),
    }


def _map(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.ndim != 3 or not array.size or array.dtype.kind not in "iufb":
        raise ValueError(
            f"{name} must be a map of labels (X, Y, Z), got shape {array.shape}, {array.dtype}"
        )
    return array


def _boxed(*maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """The maps cut to the box of all that is not 0, with a rim of zeros one voxel wide.

    The rim makes a mask's face at the scan's border a surface, as everywhere else.
    """
    whole = maps[0] != 0
    for other in maps[1:]:
        whole = whole | (other != 0)
    box = ndimage.find_objects(whole.astype(np.uint8))
    where = box[0] if box else (slice(0, 0),) * 3
    return tuple(np.pad(m[where], 1) for m in maps)


def check_settings(*, early_mm: float, tolerance_mm: float, least_iou: float) -> None:
    """ValueError for settings that no case can be scored with."""
    if not 0 <= least_iou <= 1:
        raise ValueError(f"least_iou must lie in [0, 1], got {least_iou}; 0.5 is the strict rule")
    if not 0 <= tolerance_mm < float("inf"):
        raise ValueError(f"tolerance_mm must be at least 0, got {tolerance_mm}; 2 is usual")
    if not 0 <= early_mm < float("inf"):
        raise ValueError(f"early_mm must be at least 0, got {early_mm}; the paper's is 20")


def _lesions(
    predicted: np.ndarray, real: np.ndarray, voxel_mm3: float, least_iou: float
) -> tuple[list[float], list[bool], list[float]]:
    """Equivalent diameters of the real tumours, which are found, and those of false positives."""
    parts, _ = ndimage.label(predicted, np.ones((3, 3, 3)))
    size = np.bincount(parts.ravel())
    numbers, first, volumes = np.unique(real, return_index=True, return_counts=True)
    order = [k for k in np.argsort(first) if numbers[k] != 0]
    both = (real != 0) & predicted
    pairs, shared = np.unique([real[both], parts[both]], axis=1, return_counts=True)
    found, true = [], set()
    for k in order:
        ours = pairs[0] == numbers[k]
        touching, common = pairs[1, ours], shared[ours].sum()
        union = volumes[k] + size[touching].sum() - common
        found.append(bool(common > 0 and common / union >= least_iou))
        if found[-1]:
            true.update(touching.tolist())
    false = [_diameter(n * voxel_mm3) for k, n in enumerate(size) if k and k not in true]
    return [_diameter(volumes[k] * voxel_mm3) for k in order], found, false


def _diameter(mm3: float) -> float:
    return float((6 * mm3 / np.pi) ** (1 / 3))


def _dice(predicted: np.ndarray, real: np.ndarray) -> float:
    return _number(compute_dice(*_batches(predicted, real), include_background=True))


def _surface_dice(
    predicted: np.ndarray, real: np.ndarray, mm: np.ndarray, tolerance: float
) -> float:
    # by the area of surface elements: counting boundary voxels would weigh a thick slice's rim as
    # little as a thin one's
    value = compute_surface_dice(
        *_batches(predicted, real),
        class_thresholds=[tolerance],
        include_background=True,
        spacing=mm.tolist(),
        use_subvoxels=True,
    )
    return _number(value)


def _hausdorff95(predicted: np.ndarray, real: np.ndarray, mm: np.ndarray) -> float:
    value = compute_hausdorff_distance(
        *_batches(predicted, real), include_background=True, percentile=95, spacing=mm.tolist()
    )
    return _number(value)


def _batches(predicted: np.ndarray, real: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(predicted)[None, None], torch.from_numpy(real)[None, None]


def _number(value: torch.Tensor) -> float:
    return round(float(value), 6)  # single precision holds no more
