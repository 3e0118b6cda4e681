"""Compare tumours: radiomic features, classifiers that try to tell them apart, a t-SNE map.

The paper's figure 2 asks whether early tumours of different organs look alike: classifiers guess
the organ from radiomic features, and a t-SNE map shows them. With the classes "real" and
"synthetic" the same classifiers are a two-sample test. MIRP computes the features (by the IBSI
reference), scikit-learn has the classifiers: ``pip install "tumorsynth[similarity]"``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from scipy import ndimage
    from sklearn.ensemble import AdaBoostClassifier, RandomForestClassifier
    from sklearn.manifold import TSNE
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'no {error.name}: the likeness of tumours needs pip install "tumorsynth[similarity]"'
    ) from error

# feature families: MIRP's names, and the prefixes of their features
FAMILIES = {
    "intensity": {"statistics": "stat_", "intensity_histogram": "ih_"},
    "texture": {"glcm": "cm_", "glrlm": "rlm_", "glszm": "szm_", "ngtdm": "ngt_"},
    "shape": {"morphological": "morph_"},
}
HU_RANGE = (-200.0, 300.0)  # soft tissue; intensity and texture leave out other voxels
MIN_TUMOR_VOXELS = 27  # of 1 mm; a smaller tumour has no texture
MARGIN_MM = 6  # of the crop around a tumour
MIN_FEATURE_SPAN = 1e-12  # a feature that varies less is constant
INTERVAL_RESAMPLES = 1000
CLASSIFIERS = ("SVM", "random forest", "AdaBoost")


def tumor_features(
    hu: np.ndarray,
    tumor: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    families: Sequence[str] = ("intensity", "texture"),
    bin_hu: float = 10.0,
) -> dict[str, float]:
    """Compute radiomic features of one tumour.

    The crop is resampled to 1 mm first, because texture depends on the voxel size.

    Args:
        hu: (X, Y, Z) CT in HU.
        tumor: (X, Y, Z) bool, one tumour.
        spacing: mm per voxel along the axes.
        families: of "intensity" (first order, histogram), "texture" (co-occurrence, run length,
            size zone, neighbourhood) and "shape". The paper leaves shape out, because the size of
            its tumours differs by organ.
        bin_hu: width of the grey levels.

    Returns:
        Features by MIRP's names.

    Raises:
        ValueError: for a tumour with less than 27 mm3 between -200 and 300 HU, or bad arguments.
        ModuleNotFoundError: if MIRP is not installed.

    Examples:
        >>> features = tumor_features(ct, label == 2, spacing=(0.8, 0.8, 2.5))
    """
    try:
        from mirp import extract_features
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'no {error.name}: radiomic features need pip install "tumorsynth[similarity]"'
        ) from error

    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"families must be of {', '.join(FAMILIES)}, got {list(families)}")
    if hu.shape != tumor.shape or hu.ndim != 3:
        raise ValueError(
            f"hu and tumor must be (X, Y, Z) of one shape, got {hu.shape}, {tumor.shape}"
        )
    image, mask = _resample_to_1_mm(hu, tumor, spacing)
    low, high = HU_RANGE
    inside = int((mask & (image >= low) & (image <= high)).sum())
    if inside < MIN_TUMOR_VOXELS:
        raise ValueError(
            f"a tumour must have at least {MIN_TUMOR_VOXELS} mm3 between {low:g} and {high:g} HU, "
            f"got {inside}; leave it out"
        )
    prefixes = {kind: prefix for name in families for kind, prefix in FAMILIES[name].items()}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # MIRP logs two lines of progress for each tumour
    try:
        (table,) = extract_features(
            image=image,
            mask=mask.astype(np.uint8),
            image_modality="ct",
            base_feature_families=list(prefixes),
            base_discretisation_method="fixed_bin_size",
            base_discretisation_bin_width=float(bin_hu),
            resegmentation_intensity_range=list(HU_RANGE),
        )
    finally:
        logging.disable(before)
    return {
        k: float(table[k].iloc[0]) for k in table if str(k).startswith(tuple(prefixes.values()))
    }


def table(rows: Sequence[dict[str, float]]) -> tuple[np.ndarray, list[str]]:
    """Collect features of tumours in a table.

    Args:
        rows: features of each tumour, by name.

    Returns:
        (tumours, features) and the names of the features. Features that some tumours lack, that are
        not finite or that do not vary are left out.

    Raises:
        ValueError: for no tumours.
    """
    if not rows:
        raise ValueError("a table takes at least one tumour, got none")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    values = np.array([[row[name] for name in names] for row in rows], float)
    usable = np.isfinite(values).all(0)
    usable[usable] &= np.ptp(values[:, usable], axis=0) > MIN_FEATURE_SPAN
    return values[:, usable], [name for name, kept in zip(names, usable, strict=True) if kept]


def tell_apart(
    features: np.ndarray,
    classes: Sequence[Any],
    groups: Sequence[Any] | None = None,
    *,
    folds: int = 5,
    permutations: int = 200,
    seed: int = 0,
    classifiers: Sequence[str] = CLASSIFIERS,
) -> dict[str, Any]:
    """Test by cross-validation how well classifiers tell classes of tumours apart.

    Args:
        features: (n, f), finite.
        classes: (n,), such as organs.
        groups: (n,), such as patients; a fold never splits a group. By default each tumour is a
            group of its own.
        folds: of the cross-validation, at most the number of groups of the smallest class.
        permutations: of the permutation test of the first classifier; 0 for no test.
        seed: of folds, classifiers and permutations.
        classifiers: of CLASSIFIERS.

    Returns:
        JSON types. For each classifier: the balanced accuracy over all folds with its 95 % interval
        (tumours resampled, fits kept), the confusion matrix (rows: truth) and, for two classes, the
        mean AUC of the folds that hold both. ``chance`` is 1 / classes. The first classifier also
        has a ``p_value``: the share of class permutations that score at least as well (by AUC, or
        balanced accuracy for more than two classes). Classes are permuted within groups if groups
        hold several classes, else among groups.

    Raises:
        ValueError: for fewer than two classes, two groups in each, or two folds; for features that
            are not finite or do not match.

    Examples:
        >>> x, names = table([tumor_features(ct, mask) for ct, mask in tumors])
        >>> result = tell_apart(x, ["real", "synthetic", ...], groups=patients)
        >>> result["classifiers"]["SVM"]["auc"]
    """
    x = np.asarray(features, float)
    names, y = np.unique(np.asarray(classes), return_inverse=True)
    g = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    folds = _check_classes(x, y, g, folds)
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {
        "classes": {str(name): int((y == k).sum()) for k, name in enumerate(names)},
        "features": x.shape[1],
        "groups": len(np.unique(g)),
        "folds": folds,
        "chance": round(1 / len(names), 3),
        "classifiers": {},
    }
    for kind in classifiers:
        predicted, auc = _cross_validate(kind, x, y, g, folds, seed)
        entry: dict[str, Any] = {"balanced_accuracy": _round(balanced_accuracy_score(y, predicted))}
        entry["ci95"] = _accuracy_interval(y, predicted, rng)
        if auc is not None:
            entry["auc"] = _round(auc)
        if permutations and kind == classifiers[0]:
            permuted = (_permute_classes(y, g, rng) for _ in range(permutations))
            null = [
                _score(other, *_cross_validate(kind, x, other, g, folds, seed))
                for other in permuted
            ]
            as_good = sum(score >= _score(y, predicted, auc) for score in null)
            entry["permuted_p5_p50_p95"] = [_round(v) for v in np.percentile(null, [5, 50, 95])]
            entry["p_value"] = _round((1 + as_good) / (1 + permutations))
        entry["confusion"] = confusion_matrix(y, predicted).tolist()
        result["classifiers"][kind] = entry
    return result


def _check_classes(x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int) -> int:
    """Check the arguments of `tell_apart`, and return the number of folds that is possible."""
    if x.ndim != 2 or len(x) != len(y) or len(groups) != len(y) or not np.isfinite(x).all():
        raise ValueError(
            f"features must be finite (n, f), classes and groups n, got {x.shape}, {len(y)} and "
            f"{len(groups)}; `table` leaves out features that are not finite"
        )
    classes = np.unique(y)
    fewest = min((len(np.unique(groups[y == k])) for k in classes), default=0)
    if len(classes) < 2 or fewest < 2 or folds < 2:
        raise ValueError(
            f"it takes two classes of two groups each and two folds, got {len(classes)} classes, "
            f"the smallest of {fewest} groups, and {folds} folds"
        )
    return min(folds, fewest)


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Map tumours to the plane by t-SNE of their standardised features.

    Args:
        features: (n, f), at least four tumours. The perplexity is 30, or (n - 1) / 3 if smaller.
        seed: of the embedding.

    Returns:
        (n, 2).

    Raises:
        ValueError: for fewer than four tumours.
    """
    n = len(features)
    if n < 4:
        raise ValueError(f"a t-SNE map takes at least 4 tumours, got {n}")
    scaled = StandardScaler().fit_transform(features)
    perplexity = min(30.0, (n - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(scaled)


def save_map(
    path: Path | str, panels: dict[str, tuple[np.ndarray, Sequence[Any]]], columns: int = 2
) -> None:
    """Write maps side by side as a PNG.

    Args:
        path: the PNG to write.
        panels: by title, points (n, 2) of `embed` and their classes (n,).
        columns: most maps in a row.
    """
    from tumorsynth.scans.preview import require_matplotlib

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    markers = "o^sDvP*X"
    for axis, (title, (points, classes)) in zip(axes, panels.items(), strict=False):
        for k, name in enumerate(np.unique(np.asarray(classes))):
            own = points[np.asarray(classes) == name]
            axis.scatter(*own.T, s=22, marker=markers[k % 8], label=f"{name} ({len(own)})")
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(fontsize="small", framealpha=0.6)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


# -- classifiers ----------------------------------------------------------------------------------


def _classifier(kind: str, seed: int) -> Any:
    if kind == "SVM":
        return make_pipeline(StandardScaler(), SVC(class_weight="balanced"))
    if kind == "random forest":
        return RandomForestClassifier(100, class_weight="balanced", random_state=seed)
    return AdaBoostClassifier(n_estimators=50, random_state=seed)


def _cross_validate(
    kind: str, x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> tuple[np.ndarray, float | None]:
    """Class predicted for each tumour by a fit without its fold; mean AUC of two classes."""
    predicted, aucs = np.full(len(y), -1), []
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in split.split(x, y, groups):
        model = _classifier(kind, seed).fit(x[train], y[train])
        predicted[test] = model.predict(x[test])
        if y.max() == 1 and len(np.unique(y[test])) == 2:
            if kind == "SVM":
                score = -model.decision_function(x[test])
            else:
                score = model.predict_proba(x[test])[:, 0]
            aucs.append(roc_auc_score(y[test] == 0, score))
    return predicted, float(np.mean(aucs)) if aucs else None


def _score(y: np.ndarray, predicted: np.ndarray, auc: float | None) -> float:
    return balanced_accuracy_score(y, predicted) if auc is None else auc


def _permute_classes(y: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permute classes for the permutation null; groups of one class stay of one class."""
    permuted = y.copy()
    members = [np.flatnonzero(groups == k) for k in np.unique(groups)]
    if any(len(np.unique(y[m])) > 1 for m in members):
        for m in members:
            permuted[m] = y[rng.permutation(m)]
        return permuted
    for m, k in zip(members, rng.permutation([y[m[0]] for m in members]), strict=True):
        permuted[m] = k
    return permuted


def _accuracy_interval(
    y: np.ndarray, predicted: np.ndarray, rng: np.random.Generator
) -> list[float]:
    """95 % interval of the balanced accuracy: the tumours of each class are resampled."""
    correct = [predicted[y == k] == k for k in np.unique(y)]
    accuracies = np.mean(
        [[rng.choice(c, len(c)).mean() for _ in range(INTERVAL_RESAMPLES)] for c in correct], axis=0
    )
    return [_round(v) for v in np.percentile(accuracies, [2.5, 97.5])]


def _round(value: float) -> float:
    return round(float(value), 3)


def _resample_to_1_mm(
    hu: np.ndarray, tumor: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The tumour and 6 mm around it, trilinear; a voxel is tumour if at least half of it is."""
    zoom = np.asarray(spacing, float)
    if zoom.shape != (3,) or not (zoom > 0).all():
        raise ValueError(f"spacing must be three positive numbers of mm, got {spacing!r}")
    box = ndimage.find_objects(tumor.astype(np.uint8))
    if not box:
        raise ValueError("tumor must hold a tumour, got an empty mask")
    where = tuple(
        slice(max(0, b.start - int(np.ceil(MARGIN_MM / s))), b.stop + int(np.ceil(MARGIN_MM / s)))
        for b, s in zip(box[0], zoom, strict=True)
    )
    image, mask = hu[where].astype(np.float32), tumor[where].astype(bool)
    if np.allclose(zoom, 1):
        return image, mask
    image, share = (
        ndimage.zoom(a.astype(np.float32), zoom, order=1, mode="nearest", grid_mode=True)
        for a in (image, mask)
    )
    return image, share >= 0.5
