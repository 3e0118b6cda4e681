"""FROC: sensitivity by tumour at rates of false positives a scan. Needs NumPy alone.

A threshold on the score of candidates trades sensitivity for false positives. The free-response
operating characteristic (FROC) is the curve of both; comparing two methods at the same rate of
false positives compares like with like. The curve is a staircase: at a rate counts what a threshold
reaches that stays within it, and nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tumorsynth.evaluation.detection import ScanMatches

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives a scan
SIZE_EDGES_MM = (10.0, 20.0)
ROUNDING = 1e-9  # of a rate times a number of scans


@dataclass(frozen=True)
class FrocCurve:
    """The corners of the staircase, from the highest threshold to the lowest.

    Attributes:
        thresholds: scores from which candidates count; the first is infinite.
        false_positives: a scan, at each threshold.
        sensitivity: share of the tumours found.
    """

    thresholds: np.ndarray
    false_positives: np.ndarray
    sensitivity: np.ndarray


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold on the scores reaches, over some scans.

    Attributes:
        rate: false positives a scan that were asked for.
        threshold: lowest score of the candidates that count; None if none counts.
        false_positives: a scan, as reached: at most ``rate``.
        sensitivity: share of the tumours found; None without tumours.
        by_size: the same of each bin of diameters.
        healthy_false_positives: in scans without tumour, a scan; None without such scans.
    """

    rate: float
    threshold: float | None
    false_positives: float
    sensitivity: float | None
    by_size: tuple[float | None, ...]
    healthy_false_positives: float | None


class Pool:
    """The tumours and false positives of many scans, sorted once.

    Args:
        scans: matches of each scan.
        size_edges: where bins of diameters end and the next begin, in mm; a diameter on an edge
            belongs to the larger bin.

    Raises:
        ValueError: for no scans, or edges that do not ascend.
    """

    def __init__(
        self, scans: Sequence[ScanMatches], size_edges: Sequence[float] = SIZE_EDGES_MM
    ) -> None:
        if not scans:
            raise ValueError("FROC needs at least one scan, got none")
        self.size_edges = check_size_edges(size_edges)
        self.healthy = np.array([scan.is_healthy for scan in scans])
        self.count = len(scans)
        tumors = [(k, tumor) for k, scan in enumerate(scans) for tumor in scan.tumors]
        self.tumor_scan = np.array([k for k, _ in tumors], int)
        self.tumor_score = np.array([-np.inf if t.score is None else t.score for _, t in tumors])
        diameters = np.array([t.diameter_mm for _, t in tumors])
        self.tumor_bin = np.digitize(diameters, self.size_edges)
        false = [(s, k) for k, scan in enumerate(scans) for s in scan.false_scores]
        false.sort(reverse=True)
        self.false_score = np.array([s for s, _ in false], float)
        self.false_scan = np.array([k for _, k in false], int)

    def at_rate(self, rate: float, weights: np.ndarray | None = None) -> OperatingPoint:
        """Return the operating point with the most sensitivity within a rate.

        Args:
            rate: most false positives a scan.
            weights: how often each scan counts, for a bootstrap; None is once.
        """
        weights = np.ones(self.count) if weights is None else np.asarray(weights, float)
        counted = np.cumsum(weights[self.false_scan])
        too_many = counted > rate * weights.sum() + ROUNDING
        # candidates count above this score, that of the first false positive too many
        limit = self.false_score[too_many.argmax()] if too_many.any() else -np.inf
        found = self.tumor_score > limit
        false = self.false_score > limit
        own = weights[self.tumor_scan]
        scores = np.concatenate([self.tumor_score[found], self.false_score[false]])
        in_healthy = self.healthy[self.false_scan]
        return OperatingPoint(
            rate=float(rate),
            threshold=float(scores.min()) if scores.size else None,
            false_positives=float(weights[self.false_scan[false]].sum() / weights.sum()),
            sensitivity=_share(found, own),
            by_size=tuple(
                _share(found[self.tumor_bin == k], own[self.tumor_bin == k])
                for k in range(len(self.size_edges) + 1)
            ),
            healthy_false_positives=_ratio(
                weights[self.false_scan[false & in_healthy]].sum(), weights[self.healthy].sum()
            ),
        )


def sensitivity_at(
    scans: Sequence[ScanMatches], rate: float, weights: Sequence[float] | None = None
) -> float | None:
    """Return the share of tumours found at a rate of false positives a scan; None without tumours.

    Args:
        scans: matches of each scan, healthy ones included.
        rate: most false positives a scan.
        weights: how often each scan counts, for a bootstrap; None is once.

    Examples:
        >>> sensitivity_at([match_scan(p, l, spacing) for p, l in pairs], rate=1.0)
    """
    return Pool(scans).at_rate(rate, None if weights is None else np.asarray(weights)).sensitivity


def froc_curve(scans: Sequence[ScanMatches]) -> FrocCurve:
    """Return the whole curve.

    Args:
        scans: matches of each scan, of which at least one has a tumour.

    Raises:
        ValueError: for scans without any tumour.
    """
    pool = Pool(scans)
    if not pool.tumor_score.size:
        raise ValueError("a FROC curve needs tumours, but no label has any")
    scores = np.concatenate([pool.tumor_score[np.isfinite(pool.tumor_score)], pool.false_score])
    thresholds = np.concatenate([[np.inf], np.unique(scores)[::-1]])
    found, false = np.sort(pool.tumor_score), pool.false_score[::-1]
    return FrocCurve(
        thresholds=thresholds,
        false_positives=(len(false) - np.searchsorted(false, thresholds)) / pool.count,
        sensitivity=(len(found) - np.searchsorted(found, thresholds)) / len(found),
    )


def froc_summary(
    scans: Sequence[ScanMatches],
    rates: Sequence[float] = RATES,
    size_edges: Sequence[float] = SIZE_EDGES_MM,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Summarise matches over scans, with 95 % intervals.

    The intervals resample scans (percentile bootstrap), and find the threshold of each rate anew in
    each resample.

    Args:
        scans: matches of each scan.
        rates: false positives a scan.
        size_edges: where bins of diameters end, in mm.
        bootstrap: number of resamples; 0 for no intervals.
        seed: of the resampling.

    Returns:
        JSON types: numbers of scans and tumours; ``rates``, a list with the operating point of each
        rate; ``mean_sensitivity`` over them; ``found_dsc`` and ``found_nsd``, means over the
        tumours that the predicted mask touches; ``dsc`` and ``nsd`` over the scans with tumours.
        A score is {"value", "ci95"}, where "ci95" is None for fewer than two scans.

    Raises:
        ValueError: for no scans, or settings out of range.
    """
    rates = check_rates(rates)
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be 0 or more draws, got {bootstrap}")
    pool = Pool(scans, size_edges)
    points = [pool.at_rate(rate) for rate in rates]
    rng = np.random.default_rng(seed)
    draws = bootstrap if pool.count > 1 else 0
    resamples = rng.multinomial(pool.count, np.full(pool.count, 1 / pool.count), draws)
    drawn = [[pool.at_rate(rate, weights) for rate in rates] for weights in resamples]

    def score(value: float | None, draws: Sequence[float | None]) -> dict[str, Any]:
        known = [v for v in draws if v is not None]
        interval = np.percentile(known, [2.5, 97.5]).tolist() if known else None
        return {"value": value, "ci95": interval if value is not None else None}

    def mean(name: str, found_only: bool) -> dict[str, Any]:
        owners = [(k, scan) for k, scan in enumerate(scans)]
        if found_only:
            pairs = [(k, getattr(t, name)) for k, scan in owners for t in scan.tumors]
        else:
            pairs = [(k, getattr(scan, name)) for k, scan in owners]
        pairs = [(k, v) for k, v in pairs if v is not None]
        scan_of, values = np.array([k for k, _ in pairs], int), np.array([v for _, v in pairs])
        draws = [_share(values, w[scan_of].astype(float)) for w in resamples]
        return score(_share(values, np.ones(len(values))), draws) | {"n": len(pairs)}

    rows = []
    for k, point in enumerate(points):
        own = [row[k] for row in drawn]
        rows.append(
            {
                "rate": point.rate,
                "threshold": point.threshold,
                "false_positives_per_scan": point.false_positives,
                "sensitivity": score(point.sensitivity, [p.sensitivity for p in own]),
                "by_size": {
                    name: score(point.by_size[b], [p.by_size[b] for p in own])
                    for b, name in enumerate(size_names(pool.size_edges))
                },
                "healthy_false_positives_per_scan": score(
                    point.healthy_false_positives, [p.healthy_false_positives for p in own]
                ),
            }
        )
    bins = np.bincount(pool.tumor_bin, minlength=len(pool.size_edges) + 1)
    return {
        "scans": pool.count,
        "healthy_scans": int(pool.healthy.sum()),
        "tumors": len(pool.tumor_score),
        "tumors_by_size": dict(zip(size_names(pool.size_edges), bins.tolist(), strict=True)),
        "tumors_outside": sum(scan.outside for scan in scans),
        "rates": rows,
        "mean_sensitivity": score(_mean(points), [_mean(row) for row in drawn]),
        "found_dsc": mean("dsc", True),
        "found_nsd": mean("nsd", True),
        "dsc": mean("dsc", False),
        "nsd": mean("nsd", False),
    }


def size_names(size_edges: Sequence[float]) -> list[str]:
    """Name the bins of diameters: "<10 mm", "10-20 mm", ">=20 mm"."""
    edges = [f"{edge:g}" for edge in size_edges]
    if not edges:
        return ["all"]
    middle = [f"{low}-{high} mm" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"<{edges[0]} mm", *middle, f">={edges[-1]} mm"]


def check_size_edges(size_edges: Sequence[float]) -> tuple[float, ...]:
    """Return the edges as floats; raise ValueError unless they ascend from above 0."""
    edges = tuple(float(edge) for edge in size_edges)
    if not all(low < high for low, high in zip((0.0, *edges), (*edges, np.inf), strict=True)):
        raise ValueError(f"size_edges must ascend, in mm, got {edges}; pass for example (10, 20)")
    return edges


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Return the rates as floats; raise ValueError unless they are some numbers of 0 or more."""
    values = tuple(float(rate) for rate in rates)
    if not values or not all(0 <= rate < np.inf for rate in values):
        raise ValueError(f"rates must be false positives a scan, got {values}; pass {RATES}")
    return values


def _share(values: np.ndarray, weights: np.ndarray) -> float | None:
    return _ratio(float((values * weights).sum()), float(weights.sum()))


def _ratio(top: float, bottom: float) -> float | None:
    return float(top / bottom) if bottom > 0 else None


def _mean(points: Sequence[OperatingPoint]) -> float | None:
    known = [point.sensitivity for point in points if point.sensitivity is not None]
    return float(np.mean(known)) if known else None
