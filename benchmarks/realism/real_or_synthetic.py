"""Do figures tell real lesions from synthetic ones? A classifier, judged on what it did not see."""

from __future__ import annotations

from typing import Any

import numpy as np

RIDGE = 0.3  # added to the scatter of standardised features within a class


def classify(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_tumors: np.ndarray | None = None,
    *,
    seed: int = 0,
    permutations: int = 200,
) -> dict[str, Any]:
    """AUC of a linear discriminant that tells real from synthetic lesions it was not fitted to.

    real (n, features), synthetic (m, features). real_tumors: which tumour each real row comes from,
    where one tumour gives several; by default each is its own. 0.5: cannot tell, 1: always can.

    Every pair of one real tumour and one synthetic one is left out in turn, the rest is fitted, and
    the pair counts where the real one scores higher (leave-pair-out: unlike pooled leave-one-out
    scores it has no bias with few samples). Missing values take the feature's median. The interval
    resamples tumours, 5 to 95 %; the baseline permutes who is real: what chance gives at this n.
    """
    n, m = len(real), len(synthetic)
    groups = np.arange(n) if real_tumors is None else np.unique(real_tumors, return_inverse=True)[1]
    r = int(groups.max()) + 1 if n else 0
    if r < 2 or m < 2:
        return {"auc": None, "reason": f"{r} real and {m} synthetic tumours; it takes two of each"}
    x = np.concatenate([real, synthetic])
    x = np.where(np.isfinite(x), x, np.nan)
    known = np.isfinite(x)  # a feature that most of a class lack compares nothing
    x = x[:, (known[:n].mean(0) >= 0.5) & (known[n:].mean(0) >= 0.5)]
    if not x.shape[1]:
        return {"auc": None, "reason": "no feature that most of both have"}
    x = np.where(np.isnan(x), np.nanmedian(x, 0), x)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    groups = np.concatenate([groups, r + np.arange(m)])
    is_real = np.arange(r + m) < r
    rng = np.random.default_rng(seed)

    wins = _pair_wins(x, groups, is_real)
    resampled = [wins[rng.integers(0, r, r)][:, rng.integers(0, m, m)].mean() for _ in range(2000)]
    chance = [_pair_wins(x, groups, rng.permutation(is_real)).mean() for _ in range(permutations)]
    auc = float(wins.mean())
    return {
        "auc": round(auc, 3),
        "auc_p5_p95": _rounded(np.percentile(resampled, [5, 95])),
        "chance_p5_p50_p95": _rounded(np.percentile(chance, [5, 50, 95])),
        "p_value": round(float((1 + (np.array(chance) >= auc).sum()) / (1 + permutations)), 3),
        "real_tumours": r,
        "real_samples": n,
        "synthetic": m,
    }


def classify_patients(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_patients: list[str],
    synthetic_patients: list[str],
    *,
    seed: int = 0,
    permutations: int = 200,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """AUC in each patient of the discriminant fitted to the tumours of all other patients.

    An AUC is the share of pairs of a real and a synthetic tumour of one patient in which the real
    one scores higher; patients with one kind alone have none.

    Returns:
        AUC by patient, and the AUCs by patient where it is permuted, within patients, which tumours
        are real. Both are empty with fewer than two patients.
    """
    x = np.concatenate([real, synthetic]).astype(float)
    is_real = np.arange(len(x)) < len(real)
    patients = np.array([*real_patients, *synthetic_patients])
    names = sorted(set(real_patients) & set(synthetic_patients))
    if len(names) < 2:
        return {}, {}
    rng = np.random.default_rng(seed)
    found = _patient_aucs(x, is_real, patients, names)
    chance: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(permutations):
        permuted = is_real.copy()
        for name in names:
            ours = patients == name
            permuted[ours] = rng.permutation(is_real[ours])
        for name, auc in _patient_aucs(x, permuted, patients, names).items():
            chance[name].append(auc)
    return found, chance


def _patient_aucs(
    x: np.ndarray, is_real: np.ndarray, patients: np.ndarray, names: list[str]
) -> dict[str, float]:
    out = {}
    for name in names:
        ours = patients == name
        scores = _scores(x[~ours], is_real[~ours], x[ours])
        more = scores[is_real[ours]][:, None] - scores[~is_real[ours]][None]
        out[name] = float((more > 0).mean() + (more == 0).mean() / 2)
    return out


def _scores(x: np.ndarray, is_real: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Scores of ``others`` by the discriminant fitted to x: higher for real."""
    x, others = (np.where(np.isfinite(values), values, np.nan) for values in (x, others))
    known = np.isfinite(x)
    kept = (known[is_real].mean(0) >= 0.5) & (known[~is_real].mean(0) >= 0.5)
    if not kept.any():
        return np.zeros(len(others))
    x, others = x[:, kept], others[:, kept]
    middle = np.nanmedian(x, 0)
    x, others = (np.where(np.isnan(values), middle, values) for values in (x, others))
    mean, spread = x.mean(0), np.maximum(x.std(0), 1e-9)
    x, others = (x - mean) / spread, (others - mean) / spread
    apart = x[is_real].mean(0) - x[~is_real].mean(0)
    within = np.concatenate([x[is_real] - x[is_real].mean(0), x[~is_real] - x[~is_real].mean(0)])
    scatter = within.T @ within / max(1, len(x) - 2) + RIDGE * np.eye(x.shape[1])
    return np.asarray(others @ np.linalg.solve(scatter, apart))


def _pair_wins(x: np.ndarray, groups: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """(real groups, synthetic groups): 1 where the real one scores higher, 0 where lower.

    The discriminant is Fisher's with a ridge on standardised features, fitted to all other
    groups from their sums, so that 500 fits are one batched solve.
    """
    count = len(is_real)
    size = np.bincount(groups, minlength=count).astype(float)
    total = np.zeros((count, x.shape[1]))
    square = np.zeros((count, x.shape[1], x.shape[1]))
    np.add.at(total, groups, x)
    np.add.at(square, groups, x[:, :, None] * x[:, None, :])

    def without(ours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Size, mean and scatter of a class with each of its groups left out."""
        n = size[ours].sum() - size[ours]
        mean = (total[ours].sum(0) - total[ours]) / n[:, None]
        outer = mean[:, :, None] * mean[:, None, :]
        return n, mean, square[ours].sum(0) - square[ours] - n[:, None, None] * outer

    n1, mean1, scatter1 = without(is_real)
    n0, mean0, scatter0 = without(~is_real)
    n = n1[:, None] + n0[None]
    within = (scatter1[:, None] + scatter0[None]) / np.maximum(n - 2, 1)[..., None, None]
    within += RIDGE * np.eye(x.shape[1])
    apart = mean1[:, None] - mean0[None]
    weights = np.linalg.solve(within, apart[..., None])[..., 0]
    middle = total / size[:, None]  # a tumour's score is the mean of its samples'
    scores = np.einsum("abd,abd->ab", weights, middle[is_real][:, None] - middle[~is_real][None])
    return (scores > 0) + (scores == 0) / 2


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]
