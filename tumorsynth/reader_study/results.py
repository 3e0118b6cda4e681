"""The table of a reader study: sensitivity, specificity and accuracy with confidence intervals.

Positive is "real" unless said otherwise. Then sensitivity is the share of real cases called real,
specificity the share of synthetic cases found out; readers who cannot tell get half of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tumorsynth.reader_study.store import ANSWERS, Answer, Store

INTERVALS = ("wilson", "exact")


@dataclass(frozen=True)
class Share:
    """right of count, as a share of 1, with a 95 % interval; NaN where nothing is to count."""

    right: int
    count: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not self.count:
            return "-"
        return f"{100 * self.value:.1f} ({100 * self.low:.1f}-{100 * self.high:.1f})"


@dataclass(frozen=True)
class Row:
    """One reader, or all together. auc: of the answers graded by confidence. seconds: median."""

    reader: str
    cases: int
    sensitivity: Share
    specificity: Share
    accuracy: Share
    auc: float
    seconds: float


def row(
    reader: str, answers: Sequence[Answer], *, positive: str = "real", interval: str = "wilson"
) -> Row:
    """The figures of these answers; those of several readers may stand together."""
    negative = _other(positive)
    return Row(
        reader=reader,
        cases=len({a.case for a in answers}),
        sensitivity=share([a for a in answers if a.truth == positive], interval),
        specificity=share([a for a in answers if a.truth == negative], interval),
        accuracy=share(answers, interval),
        auc=_auc(answers, positive),
        seconds=float(np.median([a.seconds for a in answers])) if answers else math.nan,
    )


def share(answers: Sequence[Answer], interval: str = "wilson") -> Share:
    """How many are right, with a 95 % interval: Wilson's, or the exact one of Clopper and Pearson.

    Answers of several readers to one case are not independent. The interval is then that of the
    effective number of answers, after Korn and Graubard (1998): the number divided by the design
    effect of cases, kept between the number of cases and that of answers.
    """
    if interval not in INTERVALS:
        raise ValueError(f"--interval must be {' or '.join(INTERVALS)}, got {interval!r}")
    count = len(answers)
    right = [a.answer == a.truth for a in answers]
    if not count:
        return Share(0, 0, math.nan, math.nan, math.nan)
    value = sum(right) / count
    by_case: dict[str, list[bool]] = {}
    for answer, good in zip(answers, right, strict=True):
        by_case.setdefault(answer.case, []).append(good)
    effective: float = len(by_case)
    if 0 < value < 1 and 1 < len(by_case) < count:
        off = np.array([sum(good) - value * len(good) for good in by_case.values()])
        variance = (off**2).sum() * len(off) / (len(off) - 1) / count**2
        effective = min(max(value * (1 - value) / max(variance, 1e-12), len(off)), count)
    low, high = (_wilson if interval == "wilson" else _exact)(value * effective, effective)
    return Share(sum(right), count, value, low, high)


def _wilson(right: float, count: float) -> tuple[float, float]:
    """As scipy's binomtest(...).proportion_ci(method="wilson"), of numbers that are not whole."""
    z = 1.959963984540054
    value = right / count
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + (z / count / 2) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _exact(right: float, count: float) -> tuple[float, float]:
    from scipy.stats import beta

    low = beta.ppf(0.025, right, count - right + 1) if right > 0 else 0.0
    high = beta.ppf(0.975, right + 1, count - right) if right < count else 1.0
    return float(low), float(high)


def _auc(answers: Sequence[Answer], positive: str) -> float:
    """Area under the ROC curve of the confidence, signed by the answer: 0.5 is chance."""
    graded = [(a.confidence if a.answer == positive else -a.confidence) for a in answers]
    yes = np.array([g for a, g in zip(answers, graded, strict=True) if a.truth == positive])
    no = np.array([g for a, g in zip(answers, graded, strict=True) if a.truth != positive])
    if not len(yes) or not len(no):
        return math.nan
    difference = yes[:, None] - no[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def study_results(
    store: Store, *, positive: str = "real", interval: str = "wilson"
) -> dict[str, Any]:
    """JSON-able: the rows of those who have finished, and who has not. NaN becomes None."""
    rows, pooled, unfinished = [], [], []
    for reader in store.readers():
        answers = store.answers(reader)
        if not reader.finished:
            unfinished.append({"reader": reader.name, "answered": len(answers)})
            continue
        rows.append(row(reader.name, answers, positive=positive, interval=interval))
        pooled += answers
    if len(rows) > 1:
        rows.append(row("together", pooled, positive=positive, interval=interval))
    return {
        "positive": positive,
        "convention": convention(positive),
        "interval": f"95 %, {interval}",
        "rows": [_plain(asdict(r)) for r in rows],
        "table": table(rows),
        "unfinished": unfinished,
    }


def convention(positive: str) -> str:
    other = _other(positive)
    return (
        f"positive = {positive}: sensitivity is the share of {positive} cases called {positive}, "
        f"specificity the share of {other} cases called {other}"
    )


def _other(positive: str) -> str:
    if positive not in ANSWERS:
        raise ValueError(f"--positive must be {' or '.join(ANSWERS)}, got {positive!r}")
    return next(a for a in ANSWERS if a != positive)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, the heading first; shares in per cent."""
    heading = ["reader", "cases", "sensitivity", "specificity", "accuracy", "AUC", "s per case"]
    body = [
        [r.reader, str(r.cases), str(r.sensitivity), str(r.specificity), str(r.accuracy)]
        + ["-" if math.isnan(r.auc) else f"{r.auc:.2f}", f"{r.seconds:.0f}"]
        for r in rows
    ]
    return [heading, *body]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
