"""How like real tumours are synthetic ones, patient by patient?

    python -m benchmarks.realism.patients CT_DIR --generator v4=FOLDER --generator v6=liver-early

CT_DIR holds NAME_ct.nii.gz with NAME_label.nii.gz (1 liver, 2 tumour); outlines in annotations/
come first. For every real tumour each generator paints --each tumours of its diameter and contrast
into the same liver, at least 10 mm from real ones. "sham" are the outlines of the first generator
on the untouched scan: what the figures say where there is no tumour. lesions.py defines the
figures. A patient's figure is the median of its tumours; the table has means over patients, 95 %
intervals resample patients. The classifier never sees a patient that it judges. Patients that a
generator was trained on are reported apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import write
from benchmarks.realism.generators import Entry, load
from benchmarks.realism.lesions import FEATURES, measure, table
from benchmarks.realism.paired import Made, Tumor, pairs, real_tumors
from benchmarks.realism.real_or_synthetic import classify_patients
from benchmarks.realism.scans import ANNOTATIONS, Scan, liver_scans

COLUMNS = {
    "diameter_mm": "diameter, mm",
    "core_contrast_hu": "contrast, HU",
    "noise_in_hu": "noise in, HU",
    "noise_out_hu": "noise out, HU",
    "noise_ratio": "noise in / out",
    "noise_length_mm": "noise length in, mm",
    "noise_length_ratio": "noise length in / out",
    "lumps_ratio": "slow variation in / out",
    "edge_width_mm": "edge 10-90 %, mm",
}
EVERY = FEATURES["intensity"] + FEATURES["texture"] + FEATURES["edge"]
SETS = {"all but shape": EVERY} | {key: FEATURES[key] for key in ("intensity", "texture", "edge")}
RESAMPLED = 2000
Row = dict[str, float]


@dataclass
class Rows:
    """Figures of tumours of one kind, with the patient of each."""

    figures: list[Row] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)

    def add(self, tumor: Tumor) -> None:
        lesion = tumor.lesion
        self.figures.append(measure(lesion.hu, lesion.tumor, lesion.organ))
        self.patients.append(tumor.scan.patient)

    def medians(self, patient: str) -> Row:
        """Of every column, over the patient's tumours that have it."""
        ours = [row for row, p in zip(self.figures, self.patients, strict=True) if p == patient]
        values = table(ours, tuple(COLUMNS)) if ours else np.full((1, len(COLUMNS)), np.nan)
        return {
            name: float(np.median(column[np.isfinite(column)]))
            if np.isfinite(column).any()
            else np.nan
            for name, column in zip(COLUMNS, values.T, strict=True)
        }


# -- the run --------------------------------------------------------------------------------------


def measured(
    scans: Iterable[Scan], entries: list[Entry], size_mm: tuple[float, float], each: int, seed: int
) -> tuple[dict[str, Rows], list[dict[str, Any]], dict[str, Any]]:
    """Rows of "real", "sham" and every generator; what the scans are; how painting went."""
    rows = {label: Rows() for label in ("real", "sham", *(e.label for e in entries))}
    how: dict[str, Any] = {e.label: {"cpu_seconds": 0, "skipped": {}} for e in entries}
    about = []
    for scan in scans:
        real = [t for t in real_tumors(scan) if size_mm[0] <= t.diameter_mm < size_mm[1]]
        if not real:
            continue
        about.append(describe(scan, real))
        for tumor in real:
            rows["real"].add(tumor)
        for k, entry in enumerate(entries):
            start = time.process_time()
            for made in pairs(entry.generator, scan, real, each, seed):
                if isinstance(made, Made):
                    rows[entry.label].add(made.tumor)
                    if k == 0:
                        rows["sham"].add(made.sham)
                else:
                    skipped = how[entry.label]["skipped"]
                    skipped[made] = skipped.get(made, 0) + 1
            how[entry.label]["cpu_seconds"] += round(time.process_time() - start)
        print(about[-1], flush=True)
    return rows, about, how


def describe(scan: Scan, real: list[Tumor]) -> dict[str, Any]:
    return {
        "scan": scan.name,
        "patient": scan.patient,
        "spacing_mm": [round(mm, 2) for mm in scan.spacing],
        "liver_hu": round(float(scan.hu[scan.label == 1].median()), 1),
        "tumours": [[round(t.diameter_mm, 1), round(t.contrast_hu, 1)] for t in real],
    }


# -- figures --------------------------------------------------------------------------------------


def over_patients(values: Iterable[float], rng: np.random.Generator) -> list[float] | None:
    """Mean with its 95 % interval, patients resampled; None where no patient has a value."""
    found = np.array([value for value in values if np.isfinite(value)])
    if not len(found):
        return None
    means = found[rng.integers(0, len(found), (RESAMPLED, len(found)))].mean(1)
    values = (found.mean(), *np.percentile(means, [2.5, 97.5]))
    return [round(float(v), 2) + 0.0 for v in values]  # no -0


def compare(
    rows: dict[str, Rows], label: str, names: list[str], aucs: dict[str, Any], seed: int
) -> dict[str, Any]:
    """One generator, or "sham", beside the real tumours of some patients."""
    rng = np.random.default_rng(seed)
    count = {kind: sum(p in names for p in rows[kind].patients) for kind in ("real", label)}
    out: dict[str, Any] = {
        "patients": names,
        "real_tumours": count["real"],
        "synthetic_tumours": count[label],
        "figures": {},
        "auc": {},
    }
    real = {name: rows["real"].medians(name) for name in names}
    made = {name: rows[label].medians(name) for name in names}
    for column in COLUMNS:
        pairs = [(real[name][column], made[name][column]) for name in names]
        both = [(a, b) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
        out["figures"][column] = {
            "real": over_patients((a for a, _ in both), rng),
            "synthetic": over_patients((b for _, b in both), rng),
            "difference": over_patients((b - a for a, b in both), rng),
        }
    for features, (found, chance) in aucs.items():
        judged = [name for name in names if name in found]
        if judged:
            null = np.mean([chance[name] for name in judged], 0)
            higher = int((null >= np.mean([found[name] for name in judged])).sum())
            out["auc"][features] = {
                "auc": over_patients((found[name] for name in judged), rng),
                "chance_p5_p95": [round(float(v), 2) for v in np.percentile(null, [5, 95])],
                "p_value": round((1 + higher) / (1 + len(null)), 3),
            }
    return out


def groups_of(patients: list[str], entries: list[Entry]) -> dict[str, dict[str, list[str]]]:
    """By column: which patients are compared, unseen ones apart from those trained on."""
    seen_by_any = {name for entry in entries for name in entry.trained_on}
    fair = [name for name in patients if name not in seen_by_any]
    out: dict[str, dict[str, list[str]]] = {"sham": {"all": patients}}
    for entry in entries:
        own = {
            "unseen": [name for name in patients if name not in entry.trained_on],
            "trained on": [name for name in patients if name in entry.trained_on],
        }
        if len(entries) > 1 and fair != own["unseen"]:
            own["unseen by all"] = fair
        out[entry.label] = {kind: names for kind, names in own.items() if names}
    return out


def markdown(groups: dict[str, dict[str, Any]]) -> str:
    """Tables: mean over patients (95 % interval)."""
    columns = [(label, kind, one) for label, own in groups.items() for kind, one in own.items()]
    lines = [
        "| | " + " | ".join(f"{label}, {kind}" for label, kind, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        "| patients, real, synthetic | "
        + " | ".join(
            f"{len(one['patients'])}, {one['real_tumours']}, {one['synthetic_tumours']}"
            for *_, one in columns
        )
        + " |",
    ]
    for name, title in COLUMNS.items():
        for kind in ("real", "synthetic", "difference"):
            cells = [shown(one["figures"][name][kind]) for *_, one in columns]
            lines.append(f"| {title}: {kind} | " + " | ".join(cells) + " |")
    for features in SETS:
        cells = []
        for *_, one in columns:
            found = one["auc"].get(features)
            low, high = found["chance_p5_p95"] if found else (0, 0)
            cells.append(f"{shown(found['auc'])}; chance {low} to {high}" if found else "")
        lines.append(f"| AUC, {features} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: list[float] | None) -> str:
    return "" if value is None else "{:g} ({:g} to {:g})".format(*value)


def per_patient(
    rows: dict[str, Rows], names: list[str], entries: list[Entry], aucs: dict[str, Any]
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names:
        out[name] = {"trained_on_by": [e.label for e in entries if name in e.trained_on]}
        for label, some in rows.items():
            row = {key: round(v, 2) for key, v in some.medians(name).items() if np.isfinite(v)}
            out[name][label] = {"tumours": some.patients.count(name), **row}
        for label, sets in aucs.items():
            out[name][label]["auc"] = {
                features: round(found[name], 2)
                for features, (found, _) in sets.items()
                if name in found
            }
    return out


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS, help="more labels")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scans; default: all")
    parser.add_argument("--generator", action="append", required=True, metavar="[LABEL=]NAME")
    parser.add_argument(
        "--trained-on", action="append", default=[], metavar="LABEL=PATIENT,...", help="or =none"
    )
    parser.add_argument(
        "--size-mm", type=float, nargs=2, default=(0.0, 200.0), help="of the real tumours"
    )
    parser.add_argument("--each", type=int, default=3, help="synthetic tumours for a real one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--permutations", type=int, default=200, help="of the chance level")
    parser.add_argument("-o", "--out", default="patients", metavar="NAME", help="of the JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = load(args.generator, args.trained_on)
    scans = liver_scans(args.scans, args.annotations, args.only)
    rows, about, how = measured(scans, entries, tuple(args.size_mm), args.each, args.seed)
    names = sorted(set(rows["real"].patients))
    if not names:
        raise SystemExit(f"no annotated liver tumours of --size-mm in {args.scans}")
    others = [label for label in rows if label != "real"]
    aucs = {
        label: {
            features: classify_patients(
                table(rows["real"].figures, columns),
                table(rows[label].figures, columns),
                rows["real"].patients,
                rows[label].patients,
                seed=args.seed,
                permutations=args.permutations,
            )
            for features, columns in SETS.items()
        }
        for label in others
        if rows[label].figures
    }
    groups = {
        label: {
            kind: compare(rows, label, some, aucs.get(label, {}), args.seed)
            for kind, some in own.items()
        }
        for label, own in groups_of(names, entries).items()
    }
    results = {
        "question": str(__doc__).splitlines()[0],
        "how": "a patient's figure is the median of its tumours; means over patients with 95 % "
        "intervals, patients resampled; AUC of a linear discriminant fitted to the other patients",
        "generators": {e.label: {**e.describe(), **how[e.label]} for e in entries},
        "size_mm": list(args.size_mm),
        "each": args.each,
        "seed": args.seed,
        "patients": len(names),
        "tumours": len(rows["real"].figures),
        "scans": about,
        "groups": groups,
        "per_patient": per_patient(rows, names, entries, aucs),
    }
    print(markdown(groups))
    write(args.out, results)
    return results


if __name__ == "__main__":
    main()
