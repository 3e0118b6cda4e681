"""Paired bootstrap over patients, tumours and seeds: scores of arms and their differences.

A cell is one fold and seed. In each, candidates of all test scans share one threshold, chosen for a
rate of false positives a scan; an arm's score is the mean over its cells. A draw resamples seeds,
patients and the tumours in each scan, the same for every arm, and finds every threshold anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tumorsynth.evaluation.detection import ScanMatches
from tumorsynth.evaluation.froc import RATES, SIZE_EDGES_MM, Pool, size_names

PRIMARY = "sensitivity_at_1"
CURVE_RATES = np.geomspace(0.1, 10, 60)
FEWEST = 3  # patients that an interval needs

Cells = Mapping[tuple[int, int], Mapping[str, Mapping[str, Any]]]


def scores_of(tests: Sequence[ScanMatches], healthy: Sequence[ScanMatches]) -> dict[str, Any]:
    """All scores of one arm in one cell; None where undefined."""
    pool = Pool(tests)
    found: dict[str, Any] = {}
    for rate in RATES:
        point = pool.at_rate(rate)
        found[f"sensitivity_at_{rate:g}"] = point.sensitivity
        if rate != 1:
            continue
        for name, value in zip(size_names(SIZE_EDGES_MM), point.by_size, strict=True):
            found[f"sensitivity_{name}"] = value
        above = np.inf if point.threshold is None else point.threshold
        found["healthy_false_positives"] = mean(
            [float(sum(s >= above for s in scan.false_scores)) for scan in healthy]
        )
    tumors = [tumor for scan in tests for tumor in scan.tumors]
    found["dsc"], found["nsd"] = (mean([getattr(s, k) for s in tests]) for k in ("dsc", "nsd"))
    found["found_dsc"] = mean([tumor.dsc for tumor in tumors])
    found["found_nsd"] = mean([tumor.nsd for tumor in tumors])
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is defined."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def compare(
    cells: Cells,
    patient_of: Mapping[str, str],
    references: Sequence[str],
    draws: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of every arm, and differences to reference arms.

    Args:
        cells: by (fold, seed), then arm: "tests" and "healthy", each a list of `ScanMatches` by
            scan, with the same scans in every arm.
        patient_of: the patient of each scan.
        references: arms to compare with, where they are there.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        {"arms": {arm: {score: {"value", "ci95"}}}, "differences": {"arm - reference": ...}}.
        "ci95" is None with fewer than three patients.
    """
    arms = list(next(iter(cells.values())))
    seeds = sorted({s for _, s in cells})
    first = {n: m[0] for cell in cells.values() for n, m in cell[arms[0]]["tests"].items()}
    scans_of: dict[str, list[str]] = {}
    for name in sorted(first):
        scans_of.setdefault(patient_of[name], []).append(name)
    patients = list(scans_of)
    rng = np.random.default_rng(seed)
    value = {arm: _average(cells, arm, seeds, list(first), None) for arm in arms}
    drawn: dict[str, list[dict[str, float | None]]] = {arm: [] for arm in arms}
    for _ in range(draws if len(patients) >= FEWEST else 0):
        own_seeds = [seeds[k] for k in rng.integers(len(seeds), size=len(seeds))]
        chosen = rng.integers(len(patients), size=len(patients))
        own_names = [name for k in chosen for name in scans_of[patients[k]]]
        tumors = {n: rng.integers(len(m.tumors), size=len(m.tumors)) for n, m in first.items()}
        for arm in arms:
            drawn[arm].append(_average(cells, arm, own_seeds, own_names, tumors))
    keys = list(value[arms[0]])
    pairs = [(a, r) for r in references if r in arms for a in arms if a != r]
    return {
        "arms": {
            arm: {k: _interval(value[arm][k], [d[k] for d in drawn[arm]]) for k in keys}
            for arm in arms
        },
        "differences": {
            f"{arm} - {reference}": {
                k: _interval(
                    _minus(value[arm][k], value[reference][k]),
                    [_minus(a[k], b[k]) for a, b in zip(drawn[arm], drawn[reference], strict=True)],
                )
                for k in keys
            }
            for arm, reference in pairs
        },
    }


def _average(
    cells: Cells,
    arm: str,
    seeds: Sequence[int],
    names: Sequence[str],
    tumors: Mapping[str, np.ndarray] | None,
) -> dict[str, float | None]:
    """Mean over cells of the chosen seeds, on the chosen scans, with the chosen tumours."""
    rows = []
    for seed in seeds:
        for (_, own), cell in cells.items():
            held = cell[arm]
            tests = [_resample(held["tests"][n][0], n, tumors) for n in names if n in held["tests"]]
            if own != seed or not tests:
                continue
            healthy = [scan for scans in held["healthy"].values() for scan in scans]
            rows.append(scores_of(tests, healthy))
    keys = rows[0] if rows else scores_of([ScanMatches((), ())], [])
    return {k: mean([row[k] for row in rows]) for k in keys}


def _resample(scan: ScanMatches, name: str, tumors: Mapping[str, np.ndarray] | None) -> ScanMatches:
    if tumors is None:
        return scan
    return replace(scan, tumors=tuple(scan.tumors[k] for k in tumors[name]))


def curve(cells: Cells, arm: str) -> tuple[list[float], list[float]]:
    """Mean FROC curve of an arm over its cells."""
    pools = [Pool([m[0] for m in cell[arm]["tests"].values()]) for cell in cells.values()]
    rows = [[pool.at_rate(rate).sensitivity or 0.0 for rate in CURVE_RATES] for pool in pools]
    return CURVE_RATES.tolist(), np.mean(rows, 0).tolist()


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _interval(value: float | None, draws: Sequence[float | None]) -> dict[str, Any]:
    known = [d for d in draws if d is not None]
    bounds = [round(float(v), 4) for v in np.percentile(known, [2.5, 97.5])] if known else None
    return {"value": None if value is None else round(value, 4), "ci95": bounds}
