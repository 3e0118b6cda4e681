"""The table of downstream.py: scores by network and arm with intervals, and differences of arms.

Intervals are percentile bootstraps over patients, never over scans or lesions. A difference of two
arms draws the same patients for both, so it is paired. What they cannot know is how another
training would have come out: only several --seeds show that, and with few of them not well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tumorsynth.evaluation.metrics import CaseScores, summary

SCORES = {
    "dsc": "DSC",
    "nsd": "NSD",
    "sensitivity": "sensitivity",
    "early_sensitivity": "sensitivity, early",
    "false_positives_per_scan": "false positives per scan",
}
FEW = 5
ByPatient = Mapping[str, Sequence[CaseScores]]
Run = dict[str, Any]


def by_patient(runs: Iterable[Run], part: str, patients: Iterable[str] | None = None) -> ByPatient:
    """All scores of each patient: of every seed, of every scan; ``part`` is "test" or "extra"."""
    wanted = None if patients is None else set(patients)
    held: dict[str, list[CaseScores]] = {}
    for run in runs:
        for entry in run[part]:
            if wanted is None or entry["patient"] in wanted:
                held.setdefault(entry["patient"], []).append(case_scores(entry["scores"]))
    return held


def case_scores(values: Mapping[str, Any]) -> CaseScores:
    """From JSON."""
    return CaseScores(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def compared(
    arms: Mapping[str, ByPatient], draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """For each arm and score {"value", "ci95"}; under "minus <first arm>" the paired differences.

    ci95 is None with fewer than FEW patients, who cannot stand for others.

    The first arm is what the others are compared with. All must have scored the same patients.
    """
    names = list(arms)
    patients = sorted(arms[names[0]])
    for name in names[1:]:
        if sorted(arms[name]) != patients:
            raise ValueError(
                f"{name} and {names[0]} were not tested on the same patients; finish all runs first"
            )
    rng = np.random.default_rng(seed)
    found = {name: _means(arms[name], patients) for name in names}
    drawn: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(draws if len(patients) >= FEW else 0):
        chosen = [patients[k] for k in rng.integers(len(patients), size=len(patients))]
        for name in names:
            drawn[name].append(_means(arms[name], chosen))
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        out[name] = {
            key: _interval(found[name][key], [d[key] for d in drawn[name]]) for key in SCORES
        }
        if name != names[0]:
            out[name][f"minus {names[0]}"] = {
                key: _interval(
                    found[name][key] - found[names[0]][key],
                    [a[key] - b[key] for a, b in zip(drawn[name], drawn[names[0]], strict=True)],
                )
                for key in SCORES
            }
    return out


def _means(held: ByPatient, patients: Sequence[str]) -> dict[str, float]:
    told = summary([score for p in patients for score in held[p]], bootstrap=0)
    return {k: np.nan if told[k]["value"] is None else told[k]["value"] for k in SCORES}


def _interval(value: float, draws: Sequence[float]) -> dict[str, Any]:
    held = [d for d in draws if np.isfinite(d)]
    low, high = np.percentile(held, [2.5, 97.5]) if held else (np.nan, np.nan)
    return {
        "value": _number(value),
        "ci95": None if np.isnan(low) else [_number(low), _number(high)],
    }


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 4)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row per network and arm, then the differences. ``results``: by network."""
    lines = ["| network | arm | " + " | ".join(SCORES.values()) + " |"]
    lines.append("| --- " * (len(SCORES) + 2) + "|")
    for network, arms in results.items():
        for name, row in arms.items():
            cells = [_cell(row[key]) for key in SCORES]
            lines.append(f"| {network} | {name} | " + " | ".join(cells) + " |")
    for network, arms in results.items():
        for name, row in arms.items():
            for against in (key for key in row if key.startswith("minus ")):
                cells = [_cell(row[against][key], "+") for key in SCORES]
                lines.append(f"| {network} | {name} {against} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any], sign: str = "") -> str:
    if entry["value"] is None:
        return "-"
    words = f"{entry['value']:{sign}.2f}"
    if entry["ci95"] is not None:
        words += " [{:{s}.2f}, {:{s}.2f}]".format(*entry["ci95"], s=sign)
    return words
