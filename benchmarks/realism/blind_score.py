"""Score the answers to a blind sheet.

    python -m benchmarks.realism.blind_score KEYS/key.json ANSWERS.csv [...] [-o blind_sheet]

Each ANSWERS.csv is one reader's: case, answer ("real" or "synthetic"), confidence (1 to 5, or
empty). Sensitivity is the share of synthetic cases called synthetic, specificity the share of real
ones called real. Intervals are 95 %, Wilson's; p: exact binomial test against guessing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.common import write
from tumorsynth.reader_study.results import Share, row
from tumorsynth.reader_study.store import ANSWERS, Answer

SIZES_MM = (0, 10, 20, 30, math.inf)
FAINT_HU = 10.0
MAX_CONFIDENCE, CERTAIN_FROM = 5, 4


def read_answers(path: Path, truths: dict[str, str]) -> list[Answer]:
    """One reader's answers to all cases of the key."""
    found: dict[str, Answer] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not {"case", "answer"} <= set(rows.fieldnames or []):
            raise SystemExit(f"{path} must have the columns case and answer, got {rows.fieldnames}")
        for line in rows:
            case, answer = (line["case"] or "").strip(), (line["answer"] or "").strip().lower()
            confidence = (line.get("confidence") or "").strip() or "1"
            if case not in truths or case in found:
                problem = "answered twice" if case in found else "not in the key"
                raise SystemExit(f"{path}: case {case!r} is {problem}")
            if answer not in ANSWERS:
                raise SystemExit(
                    f"{path}: the answer to case {case} must be {' or '.join(ANSWERS)}, got "
                    f"{answer!r}"
                )
            if confidence not in map(str, range(1, MAX_CONFIDENCE + 1)):
                raise SystemExit(
                    f"{path}: the confidence in case {case} must be 1 to {MAX_CONFIDENCE}, got "
                    f"{confidence}"
                )
            found[case] = Answer(path.stem, case, truths[case], answer, int(confidence), 0.0)
    if missing := sorted(set(truths) - set(found)):
        raise SystemExit(f"{path} lacks answers to the cases {', '.join(missing)}")
    return list(found.values())


def score(answers: list[Answer]) -> dict[str, Any]:
    """Shares with intervals of one or several readers' answers."""
    figures = row("", answers, positive="synthetic")
    right = figures.accuracy.right
    out: dict[str, Any] = {
        "accuracy": plain(figures.accuracy),
        "sensitivity": plain(figures.sensitivity),
        "specificity": plain(figures.specificity),
    }
    if any(a.confidence > 1 for a in answers) and not math.isnan(figures.auc):
        out["auc_of_confidence"] = round(figures.auc, 3)
    # several readers' answers are not independent
    if len({a.reader for a in answers}) == 1:
        out["p_against_guessing"] = round(float(binomtest(right, len(answers), 0.5).pvalue), 4)
    return out


def plain(share: Share) -> dict[str, Any] | None:
    if not share.count:
        return None
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(share).items()}


def size_of(about: dict[str, Any]) -> str:
    low, high = next(
        pair
        for pair in zip(SIZES_MM, SIZES_MM[1:], strict=False)
        if pair[0] <= about["diameter_mm"] < pair[1]
    )
    return f"{low} to {high} mm" if math.isfinite(high) else f"from {low} mm"


def contrast_of(about: dict[str, Any]) -> str:
    faint = abs(about["contrast_hu"]) < FAINT_HU
    return (
        f"within {FAINT_HU:g} HU" if faint else "darker" if about["contrast_hu"] < 0 else "brighter"
    )


def grouped(
    answers: list[Answer], cases: dict[str, Any], group: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    names = sorted({group(about) for about in cases.values()})
    return {name: score([a for a in answers if group(cases[a.case]) == name]) for name in names}


def table(readers: dict[str, Any]) -> str:
    lines = ["| | accuracy | synthetic called synthetic | real called real | p |", "|---" * 5 + "|"]
    for reader, found in readers.items():
        groups = {"all": found["all"]} | {
            name: own for by in ("size", "contrast", "patient") for name, own in found[by].items()
        }
        for name, own in groups.items():
            cells = [shown(own[key]) for key in ("accuracy", "sensitivity", "specificity")]
            p = own.get("p_against_guessing", "")
            lines.append(f"| {reader}, {name} | {' | '.join(cells)} | {p} |")
    return "\n".join(lines)


def shown(share: dict[str, Any] | None) -> str:
    if share is None:
        return ""
    return "{right} of {count}: {value:.2f} ({low:.2f} to {high:.2f})".format(**share)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("key", type=Path, metavar="KEY.json")
    parser.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.csv")
    parser.add_argument("--reader", help="who read: a person's profession, or a model")
    parser.add_argument("-o", "--out", metavar="NAME", help="results/NAME.json [default: none]")
    args = parser.parse_args(arguments)
    key = json.loads(args.key.read_text())
    cases = key["cases"]
    truths = {name: about["truth"] for name, about in cases.items()}
    by_reader = {path.stem: read_answers(path, truths) for path in args.answers}
    if len(by_reader) < len(args.answers):
        raise SystemExit("every reader's file needs a name of its own")
    if len(by_reader) > 1:
        by_reader["together"] = [answer for own in by_reader.values() for answer in own]
    readers = {
        reader: {
            "all": score(answers),
            "size": grouped(answers, cases, size_of),
            "contrast": grouped(answers, cases, contrast_of),
            "patient": grouped(answers, cases, lambda about: about["patient"]),
            "certain": score([a for a in answers if a.confidence >= CERTAIN_FROM]),
        }
        for reader, answers in by_reader.items()
    }
    results = {
        "question": "Does a reader tell synthetic tumours from real ones?",
        "reader": args.reader,
        "generator": key["generator"],
        "made_with": key["environment"],
        "cases": len(cases),
        "real": sum(truth == "real" for truth in truths.values()),
        "patients": sorted({about["patient"] for about in cases.values()}),
        "readers": readers,
    }
    print(table(readers))
    if args.out:
        write(args.out, results)
    return results


if __name__ == "__main__":
    main()
