"""The table of a reader study: sensitivity, specificity and accuracy with confidence intervals.

By default "real" is positive: sensitivity is the share of real cases called real, specificity the
share of synthetic cases called synthetic. A reader who guesses has an accuracy of about one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tumorsynth.reader_study.store import ANSWERS, Answer, Store

INTERVALS = ("wilson", "exact")
Z_95 = 1.959963984540054  # standard deviations of a normal 95 % interval


@dataclass(frozen=True)
class Share:
    """The share of right answers from 0 to 1 with its 95 % interval; NaN without answers."""

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
    """The figures of one reader, or of all together.

    auc: of the answers, graded by confidence. seconds: median per case.
    """

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
    """Compute the figures of answers, of one or several readers.

    Args:
        reader: name for the row.
        answers: the answers.
        positive: "real" or "synthetic".
        interval: "wilson" or "exact".
    """
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
    """Compute the share of right answers with a 95 % interval.

    Answers of several readers to one case are not independent. The interval is then that of the
    effective number of answers (Korn and Graubard, 1998): the number of answers divided by the
    design effect of cases, clipped to lie between the numbers of cases and of answers.

    Args:
        answers: the answers to count.
        interval: "wilson", or "exact" (Clopper and Pearson).

    Raises:
        ValueError: for another interval.
    """
    if interval not in INTERVALS:
        raise ValueError(f"--interval must be {' or '.join(INTERVALS)}, got {interval!r}")
    count = len(answers)
    right = [a.answer == a.truth for a in answers]
    if not count:
        return Share(0, 0, math.nan, math.nan, math.nan)
    value = sum(right) / count
    by_case: dict[str, list[bool]] = {}
    for answer, is_right in zip(answers, right, strict=True):
        by_case.setdefault(answer.case, []).append(is_right)
    effective: float = len(by_case)
    if 0 < value < 1 and 1 < len(by_case) < count:
        residuals = np.array([sum(own) - value * len(own) for own in by_case.values()])
        cases = len(residuals)
        variance = (residuals**2).sum() * cases / (cases - 1) / count**2
        effective = min(max(value * (1 - value) / max(variance, 1e-12), cases), count)
    low, high = (_wilson if interval == "wilson" else _exact)(value * effective, effective)
    return Share(sum(right), count, value, low, high)


def _wilson(right: float, count: float) -> tuple[float, float]:
    """As scipy's binomtest(...).proportion_ci(method="wilson"), for any real numbers."""
    z = Z_95
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
    grades = [(a.confidence if a.answer == positive else -a.confidence) for a in answers]
    positives = np.array([g for a, g in zip(answers, grades, strict=True) if a.truth == positive])
    negatives = np.array([g for a, g in zip(answers, grades, strict=True) if a.truth != positive])
    if not len(positives) or not len(negatives):
        return math.nan
    difference = positives[:, None] - negatives[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def study_results(
    store: Store, *, positive: str = "real", interval: str = "wilson"
) -> dict[str, Any]:
    """Compute the results of a study.

    Args:
        store: the open study.
        positive: "real" or "synthetic".
        interval: "wilson" or "exact".

    Returns:
        A JSON-able dict: ``rows`` and ``table`` of the readers who have finished, and of all of
        them together; ``unfinished``, the others. NaN becomes None.
    """
    rows: list[Row] = []
    pooled: list[Answer] = []
    unfinished: list[dict[str, Any]] = []
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
        "rows": [_replace_nan(asdict(r)) for r in rows],
        "table": table(rows),
        "unfinished": unfinished,
    }


def convention(positive: str) -> str:
    """Describe sensitivity and specificity in words; ValueError for another ``positive``."""
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
    """Format rows as lines of cells, the heading first, shares in per cent."""
    heading = ["reader", "cases", "sensitivity", "specificity", "accuracy", "AUC", "s per case"]
    body = [
        [r.reader, str(r.cases), str(r.sensitivity), str(r.specificity), str(r.accuracy)]
        + ["-" if math.isnan(r.auc) else f"{r.auc:.2f}", f"{r.seconds:.0f}"]
        for r in rows
    ]
    return [heading, *body]


def _replace_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _replace_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
