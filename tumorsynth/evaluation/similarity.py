"""How alike are tumours? Radiomic features, classifiers that try to tell them apart, and a map.

The paper's figure 2 asks whether early tumours of different organs look alike: classifiers that
guess the organ from radiomic features, and a t-SNE map. The same classifiers, told real from
synthetic, are a two-sample test. Features are MIRP's (they follow the IBSI reference), classifiers
scikit-learn's: ``pip install "tumorsynth[similarity]"``.
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

# Feature families, and how the names of their features begin
FAMILIES = {
    "intensity": {"statistics": "stat_", "intensity_histogram": "ih_"},
    "texture": {"glcm": "cm_", "glrlm": "rlm_", "glszm": "szm_", "ngtdm": "ngt_"},
    "shape": {"morphological": "morph_"},
}
HU_RANGE = (-200.0, 300.0)  # soft tissue; voxels outside are left out of intensity and texture
LEAST_VOXELS = 27  # of 1 mm: a smaller tumour has no texture
CLASSIFIERS = ("SVM", "random forest", "AdaBoost")


def tumor_features(
    hu: np.ndarray,
    tumor: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    families: Sequence[str] = ("intensity", "texture"),
    bin_hu: float = 10.0,
) -> dict[str, float]:
    """Radiomic features of one tumour, by MIRP's names.

    hu: (X, Y, Z) CT in HU. tumor: the same shape, bool, one tumour. spacing: mm along the axes;
    both are resampled to 1 mm first, because texture depends on the voxel. families: of "intensity"
    (first order, histogram), "texture" (co-occurrence, run length, size zone, neighbourhood) and
    "shape", which the paper's question is not about: its tumours differ in size by organ. bin_hu:
    width of the grey levels. ValueError for a tumour below 27 mm3 or outside -200 to 300 HU.
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
    image, mask = _on_1_mm(hu, tumor, spacing)
    low, high = HU_RANGE
    inside = int((mask & (image >= low) & (image <= high)).sum())
    if inside < LEAST_VOXELS:
        raise ValueError(
            f"a tumour must have at least {LEAST_VOXELS} mm3 between {low:g} and {high:g} HU to "
            f"have a texture, got {inside}; leave it out"
        )
    wanted = {kind: start for name in families for kind, start in FAMILIES[name].items()}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # two lines of progress for each tumour
    try:
        (table,) = extract_features(
            image=image,
            mask=mask.astype(np.uint8),
            image_modality="ct",
            base_feature_families=list(wanted),
            base_discretisation_method="fixed_bin_size",
            base_discretisation_bin_width=float(bin_hu),
            resegmentation_intensity_range=list(HU_RANGE),
        )
    finally:
        logging.disable(before)
    return {k: float(table[k].iloc[0]) for k in table if str(k).startswith(tuple(wanted.values()))}


def table(rows: Sequence[dict[str, float]]) -> tuple[np.ndarray, list[str]]:
    """(tumours, features) and the names: features that all have, finite, and that vary."""
    if not rows:
        raise ValueError("a table takes at least one tumour, got none")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    values = np.array([[row[name] for name in names] for row in rows], float)
    good = np.isfinite(values).all(0)
    good[good] &= np.ptp(values[:, good], axis=0) > 1e-12
    return values[:, good], [name for name, kept in zip(names, good, strict=True) if kept]


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
    """How well each classifier guesses the class of tumours it was not fitted to; JSON's own types.

    features: (n, f). classes: (n,), organs for example. groups: (n,), tumours of one group (one
    patient, say) are never on both sides of a fold; by default each tumour is its own.

    For each of ``classifiers``: balanced accuracy over all folds with its 95 % interval (tumours
    resampled, fits kept), the confusion matrix (rows: truth), and of two classes the AUC, the mean
    over folds that hold both. 1 / classes is what chance gives. The first classifier, the SVM as
    the quickest, is also the test, one and not three: p_value says how often permuted classes score
    as well (by AUC, of more than two classes by balanced accuracy). They are permuted within groups
    that hold several classes, and among groups where each holds one.

    ValueError below two classes or fewer groups of a class than folds (at least two).
    """
    x = np.asarray(features, float)
    names, y = np.unique(np.asarray(classes), return_inverse=True)
    g = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if x.ndim != 2 or len(x) != len(y) or len(g) != len(y) or not np.isfinite(x).all():
        raise ValueError(
            f"features must be finite (n, f), classes and groups n, got {x.shape}, {len(y)} and "
            f"{len(g)}; `table` leaves out what is not finite"
        )
    fewest = min((len(np.unique(g[y == k])) for k in range(len(names))), default=0)
    if len(names) < 2 or fewest < 2 or folds < 2:
        raise ValueError(
            f"it takes two classes of two groups each and two folds, got {len(names)} classes, the "
            f"smallest of {fewest} groups, and {folds} folds"
        )
    folds = min(folds, fewest)
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
        guessed, auc = _cross_validated(kind, x, y, g, folds, seed)
        entry: dict[str, Any] = {"balanced_accuracy": _round(balanced_accuracy_score(y, guessed))}
        entry["ci95"] = _accuracy_interval(y, guessed, rng)
        if auc is not None:
            entry["auc"] = _round(auc)
        if permutations and kind == classifiers[0]:
            by_chance = (_permuted(y, g, rng) for _ in range(permutations))
            scores = [
                _score(other, *_cross_validated(kind, x, other, g, folds, seed))
                for other in by_chance
            ]
            better = sum(score >= _score(y, guessed, auc) for score in scores)
            entry["permuted_p5_p50_p95"] = [_round(v) for v in np.percentile(scores, [5, 50, 95])]
            entry["p_value"] = _round((1 + better) / (1 + permutations))
        entry["confusion"] = confusion_matrix(y, guessed).tolist()
        result["classifiers"][kind] = entry
    return result


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, 2): a t-SNE map of standardised features, perplexity 30 or a third of few tumours."""
    n = len(features)
    if n < 4:
        raise ValueError(f"a t-SNE map takes at least 4 tumours, got {n}")
    scaled = StandardScaler().fit_transform(features)
    perplexity = min(30.0, (n - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(scaled)


def save_map(
    path: Path | str, panels: dict[str, tuple[np.ndarray, Sequence[Any]]], columns: int = 2
) -> None:
    """A PNG of maps side by side: title to (points (n, 2), classes (n,))."""
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
            ours = points[np.asarray(classes) == name]
            axis.scatter(*ours.T, s=22, marker=markers[k % 8], label=f"{name} ({len(ours)})")
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


def _cross_validated(
    kind: str, x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> tuple[np.ndarray, float | None]:
    """The class guessed for each tumour by a fit without its fold; the mean AUC of two classes."""
    guessed, aucs = np.full(len(y), -1), []
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in split.split(x, y, groups):
        model = _classifier(kind, seed).fit(x[train], y[train])
        guessed[test] = model.predict(x[test])
        if y.max() == 1 and len(np.unique(y[test])) == 2:
            if kind == "SVM":
                score = -model.decision_function(x[test])
            else:
                score = model.predict_proba(x[test])[:, 0]
            aucs.append(roc_auc_score(y[test] == 0, score))
    return guessed, float(np.mean(aucs)) if aucs else None


def _score(y: np.ndarray, guessed: np.ndarray, auc: float | None) -> float:
    return balanced_accuracy_score(y, guessed) if auc is None else auc


def _permuted(y: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Classes drawn anew as if they meant nothing, and groups as alike inside as they are."""
    out = y.copy()
    members = [np.flatnonzero(groups == k) for k in np.unique(groups)]
    if any(len(np.unique(y[m])) > 1 for m in members):
        for m in members:
            out[m] = y[rng.permutation(m)]
        return out
    for m, k in zip(members, rng.permutation([y[m[0]] for m in members]), strict=True):
        out[m] = k
    return out


def _accuracy_interval(y: np.ndarray, guessed: np.ndarray, rng: np.random.Generator) -> list[float]:
    """95 %: the tumours of each class resampled."""
    right = [guessed[y == k] == k for k in np.unique(y)]
    draws = np.mean([[rng.choice(r, len(r)).mean() for _ in range(1000)] for r in right], axis=0)
    return [_round(v) for v in np.percentile(draws, [2.5, 97.5])]


def _round(value: float) -> float:
    return round(float(value), 3)


def _on_1_mm(
    hu: np.ndarray, tumor: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The tumour with 6 mm around it, trilinear; a voxel is tumour where half of it is."""
    zoom = np.asarray(spacing, float)
    if zoom.shape != (3,) or not (zoom > 0).all():
        raise ValueError(f"spacing must be three positive numbers of mm, got {spacing!r}")
    box = ndimage.find_objects(tumor.astype(np.uint8))
    if not box:
        raise ValueError("tumor must hold a tumour, got an empty mask")
    where = tuple(
        slice(max(0, b.start - int(np.ceil(6 / s))), b.stop + int(np.ceil(6 / s)))
        for b, s in zip(box[0], zoom, strict=True)
    )
    image, mask = hu[where].astype(np.float32), tumor[where].astype(bool)
    if np.allclose(zoom, 1):
        return image, mask
    image, part = (
        ndimage.zoom(a.astype(np.float32), zoom, order=1, mode="nearest", grid_mode=True)
        for a in (image, mask)
    )
    return image, part >= 0.5
