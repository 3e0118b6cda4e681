"""Compare the arms of a run: sensitivities at equal false positives, paired intervals, FROC curves.

    python -m benchmarks.downstream.table RUN [-o NAME] [--experiment large-to-small] [--arms ...]

Compares what is finished: the folds and seeds that every arm has, on the scans that every arm may
be tested on. Writes RUN/results.json, RUN/table.md and RUN/froc.png, and with -o also
benchmarks/results/NAME.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, picture, write
from benchmarks.downstream.compare import PRIMARY, compare, curve
from benchmarks.downstream.files import write_json, write_whole
from tumorsynth.evaluation.detection import ScanMatches

REFERENCES = ("real-and-healthy", "real", "copy-paste")  # what other arms are compared with
COLUMNS = {
    PRIMARY: "found at 1",
    "sensitivity_at_0.25": "0.25",
    "sensitivity_at_4": "4",
    "sensitivity_at_8": "8",
    "sensitivity_<10 mm": "< 10 mm",
    "sensitivity_10-20 mm": "10-20",
    "sensitivity_>=20 mm": ">= 20",
    "healthy_false_positives": "FP, healthy",
    "dsc": "DSC",
    "nsd": "NSD",
    "found_dsc": "DSC, found",
    "found_nsd": "NSD, found",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", metavar="NAME", help="also benchmarks/results/NAME.json")
    parser.add_argument("--experiment", nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only these, in this order")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in sorted((args.run / "jobs").glob("*.json"))]
    names = sorted({r["job"]["experiment"] for r in results})
    compared, curves, text = {}, {}, []
    for name in args.experiment or names:
        own = [r for r in results if r["job"]["experiment"] == name]
        cells = complete_cells(own, args.arms)
        if not cells:
            print(f"{name}: no fold and seed is finished in every arm")
            continue
        patient_of = {n: p for r in own for n, p in r["patients"].items()}
        compared[name] = {**about(own, cells), **compare(cells, patient_of, REFERENCES, args.draws)}
        curves[name] = {arm: curve(cells, arm) for arm in compared[name]["arms"]}
        text.append(markdown(name, compared[name]))
    content = {"settings": results[0]["settings"] if results else None, "experiments": compared}
    write_json(args.run / "results.json", {"environment": environment(), **content})
    write_whole(args.run / "table.md", "\n".join(text).encode())
    print("\n".join(text))
    if not compared:
        return
    if args.output:
        write(args.output, content)
    for path in (args.run / "froc", *([args.output] if args.output else [])):
        picture(str(path), lambda axes: draw(axes, curves), len(curves))


Cell = dict[str, dict[str, Any]]  # by arm: {"tests": by scan, "healthy": by scan, "missing": 0}


def complete_cells(
    results: Sequence[Mapping[str, Any]], arms: Sequence[str] | None = None
) -> dict[tuple[int, int], Cell]:
    """Group results by (fold, seed); keep what every arm has, on scans that every arm tested."""
    cells: dict[tuple[int, int], Cell] = {}
    for result in results:
        job = result["job"]
        if arms and job["arm"]["name"] not in arms:
            continue
        cell = cells.setdefault((job["fold"], job["seed"]), {})
        held = cell.setdefault(
            job["arm"]["name"], {"tests": {}, "healthy": {}, "missing": job["parts"]}
        )
        held["missing"] -= 1
        for kind, names in (("tests", job["tests"]), ("healthy", job["healthy_tests"])):
            for name in names:
                matches = ScanMatches.from_dict(result["scans"][name])
                held[kind].setdefault(name, []).append(matches)
    wanted = set(arms or {arm for cell in cells.values() for arm in cell})
    kept = {}
    for at, cell in sorted(cells.items()):
        if set(cell) != wanted or any(held["missing"] for held in cell.values()):
            continue
        for kind in ("tests", "healthy"):
            common = set.intersection(*(set(held[kind]) for held in cell.values()))
            for held in cell.values():
                held[kind] = {n: held[kind][n] for n in sorted(common)}
        kept[at] = {arm: cell[arm] for arm in arms or cell}
    return kept


def about(
    results: Sequence[Mapping[str, Any]], cells: Mapping[tuple[int, int], Cell]
) -> dict[str, Any]:
    """Patients, tumours, seeds and CPU hours."""
    first = {arm: held for cell in cells.values() for arm, held in cell.items()}
    any_arm = [next(iter(cell.values())) for cell in cells.values()]
    tests = {n: m[0] for held in any_arm for n, m in held["tests"].items()}
    seconds = [sum(r["cpu_seconds"].values()) for r in results if r["job"]["arm"]["name"] in first]
    return {
        "folds": sorted({fold for fold, _ in cells}),
        "seeds": sorted({seed for _, seed in cells}),
        "cells": len(cells),
        "scans": {n: [round(t.diameter_mm, 1) for t in m.tumors] for n, m in tests.items()},
        "tumors": sum(len(m.tumors) for m in tests.values()),
        "cpu_hours": round(sum(seconds) / 3600, 2),
        "commits": sorted({r["environment"]["commit"] for r in results}),
    }


def markdown(name: str, compared: Mapping[str, Any]) -> str:
    """A table of arms, then of differences."""
    lines = [
        f"### {name}",
        "",
        f"{compared['tumors']} tumours in {len(compared['scans'])} scans; folds "
        f"{compared['folds']}, seeds {compared['seeds']}; {compared['cpu_hours']} CPU hours.",
        "",
        "| arm | " + " | ".join(COLUMNS.values()) + " |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for part, sign in (("arms", ""), ("differences", "+")):
        for row, scores in compared[part].items():
            cells = [_cell(scores[key], sign) for key in COLUMNS]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(score: Mapping[str, Any], sign: str) -> str:
    if score["value"] is None:
        return "-"
    words = f"{score['value']:{sign}.2f}"
    if score["ci95"] is not None:
        low, high = score["ci95"]
        words += f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return words


def draw(axes: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """One panel of FROC curves for each experiment."""
    panels = np.atleast_1d(axes)
    for panel, (name, arms) in zip(panels, curves.items(), strict=True):
        for arm, (rates, sensitivity) in arms.items():
            panel.plot(rates, sensitivity, label=arm)
        panel.set(title=name, xscale="log", ylim=(0, 1))
        panel.set(xlabel="false positives a scan", ylabel="tumours found")
        panel.axvline(1, color="grey", linewidth=0.5)
    panels[-1].legend(fontsize="x-small")


if __name__ == "__main__":
    main()
