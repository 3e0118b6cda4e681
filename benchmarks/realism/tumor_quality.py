"""How like real tumours are synthetic ones: a table, a classifier, and pictures.

    python -m benchmarks.realism.tumor_quality CASES.npz --real ANNOTATED.npz \\
        --generator liver-early --generator one-tumour=RUN/gen --generator hu2023 \\
        --organ-label 1 --tumor-label 2 --count 64 -o OUT.json --pictures DIR

Synthetic tumours go into the organ of CASES, a pack (`tumorsynth train pack`), away from its real
ones; the real tumours to compare with are those of CASES, or of --real. "sham" are the masks of the
first generator on the untouched scan: what the numbers say where there is no tumour. What is
measured is said in lesions.py, how the classifier is judged in real_or_synthetic.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

import tumorsynth as ts
from benchmarks.common import environment
from benchmarks.realism.lesion_pictures import sheets
from benchmarks.realism.lesions import (
    FEATURES,
    PROBE_FEATURES,
    Lesion,
    measure,
    probes,
    radial_profile,
    table,
)
from benchmarks.realism.real_or_synthetic import classify, tell_tales
from tumorsynth.training.data import Case, load_pack

PER_CALL, GAP_MM = 8, 10.0  # tumours in one call, and organ between them: shells end 8 mm off
MARGIN = 32  # mm of scan kept on each side of a lesion's centre or box
SIZES_MM = (0, 10, 14, 20, 30, 100)
LARGE_MM = 14.0  # smaller tumours have no middle to speak of
BY_SIZE = ("contrast_hu", "deep_contrast_hu", "edge_gradient")
COLUMNS = {
    "diameter_mm": "diameter, mm",
    "contrast_hu": "contrast, HU",
    "deep_contrast_hu": "in the middle, HU",
    "noise_in_hu": "noise in, HU",
    "noise_out_hu": "noise out, HU",
    "noise_ratio": "in / out",
    "edge_width_mm": "edge 10-90 %, mm",
    "edge_offset_mm": "edge offset, mm",
    "noise_length_mm": "noise length in, mm",
    "noise_length_out_mm": "and out, mm",
    "lumps_ratio": "slow variation, in / out",
}


# -- lesions --------------------------------------------------------------------------------------


def real_lesions(
    cases: list[Case], organ_labels: list[int], tumor_label: int, least_voxels: int = 50
) -> list[Lesion]:
    """Every connected annotated tumour (26 neighbours)."""
    lesions = []
    for case in cases:
        if case.label is None:
            continue
        hu, label = case.hu.numpy().astype(np.float32), case.label.numpy()
        parts, count = ndimage.label(label == tumor_label, np.ones((3, 3, 3)))
        for k, box in enumerate(ndimage.find_objects(parts), 1):
            where = tuple(slice(max(0, b.start - MARGIN), b.stop + MARGIN) for b in box)
            tumor = parts[where] == k
            if tumor.sum() >= least_voxels:
                about = {"case": case.name, "centre": [(b.start + b.stop) // 2 for b in box]}
                organ = np.isin(label[where], organ_labels)
                lesions.append(Lesion(hu[where], tumor, organ, about))
    return lesions


def synthetic_lesions(
    generator: str,
    cases: list[Case],
    organ_labels: list[int],
    tumor_label: int,
    count: int,
    seed: int,
    **options: Any,
) -> tuple[list[Lesion], list[Lesion], dict[str, Any]]:
    """``count`` synthetic tumours, the same masks on the untouched scans, and how it went.

    ``options`` go to SynthesizeTumor. Fewer where the organs have no room for more.
    """
    synth = ts.SynthesizeTumor(
        generator, organ_labels, tumor_label, count=PER_CALL, gap_mm=GAP_MM, **options
    )
    made: list[Lesion] = []
    sham: list[Lesion] = []
    reasons: dict[str, int] = {}
    annotated = [case for case in cases if case.label is not None]
    start, call = time.perf_counter(), 0
    while len(made) < count and call < 4 * count:
        case = annotated[call % len(annotated)]
        hu, label = case.hu.float()[None], case.label[None]
        image, new_label = synth(hu, label, seed=seed + call)
        for record in synth.report:
            if not record["applied"]:
                reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
                continue
            centre = record["centre_voxel"]
            where = tuple(slice(max(0, c - MARGIN), c + MARGIN) for c in centre)
            new = ((new_label == tumor_label) & (label != tumor_label))[0][where].numpy()
            parts, _ = ndimage.label(new, np.ones((3, 3, 3)))
            at = tuple(c - part.start for c, part in zip(centre, where, strict=True))
            organ = np.isin(new_label[0][where].numpy(), organ_labels)
            about = {"case": case.name, "centre": centre, "call_seed": seed + call}
            about["hu_change"] = round(record["hu_change"], 1)
            tumor = parts == parts[at]
            made.append(Lesion(image[0][where].numpy(), tumor, organ, about))
            sham.append(Lesion(hu[0][where].numpy(), tumor, organ, about))
        call += 1
    seconds = time.perf_counter() - start
    how = {"calls": call, "seconds": round(seconds, 1), "skipped": reasons}
    return made[:count], sham[:count], how


# -- figures --------------------------------------------------------------------------------------


def rows_of(lesions: list[Lesion]) -> list[dict[str, float]]:
    return [measure(lesion.hu, lesion.tumor, lesion.organ) for lesion in lesions]


def percentiles(rows: list[dict[str, float]]) -> dict[str, Any]:
    """5, 50 and 95 % of every column of the table, over the lesions that have it."""
    out: dict[str, Any] = {"count": len(rows)}
    for name in COLUMNS:
        values = table(rows, (name,))[:, 0]
        values = values[np.isfinite(values)]
        if len(values):
            out[name] = [round(float(v), 2) for v in np.percentile(values, [5, 50, 95])]
    return out


def by_size(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Median contrast and steepness of the edge by diameter: small tumours are the hard ones."""
    out: dict[str, Any] = {}
    for low, high in zip(SIZES_MM, SIZES_MM[1:], strict=False):
        some = [row for row in rows if low <= row["diameter_mm"] < high]
        if some:
            columns = zip(BY_SIZE, table(some, BY_SIZE).T, strict=True)
            out[f"{low} to {high} mm"] = {"count": len(some)} | {
                name: _plain(np.median(values[np.isfinite(values)]))
                for name, values in columns
                if np.isfinite(values).any()
            }
    return out


def profile(lesions: list[Lesion]) -> dict[int, float]:
    """Median radial profile of the lesions of at least 14 mm, HU by mm from the outline."""
    large = [each for each in lesions if each.tumor.sum() >= np.pi / 6 * LARGE_MM**3]
    profiles = [radial_profile(each.hu, each.tumor, each.organ) for each in large]
    places = sorted({far for one in profiles for far in one})
    out = {}
    for far in places:
        values = [one[far] for one in profiles if far in one]
        if 2 * len(values) >= len(profiles) and np.isfinite(values).any():
            out[far] = round(float(np.nanmedian(values)), 1)
    return out


def compare(
    real: list[Lesion],
    real_rows: list[dict[str, float]],
    others: list[Lesion],
    rows: list[dict[str, float]],
    **judged: int,
) -> dict[str, Any]:
    """The classifier on every set of features, and what each feature alone gives away.

    ``judged`` goes to `classify`: seed and permutations.
    """
    every = FEATURES["intensity"] + FEATURES["texture"] + FEATURES["edge"]
    sets = {
        "all but shape": every,
        "all": every + FEATURES["shape"],
        "intensity": FEATURES["intensity"],
        "texture": FEATURES["texture"],
        "edge": FEATURES["edge"],
    }
    out: dict[str, Any] = {
        name: classify(table(real_rows, names), table(rows, names), **judged)
        for name, names in sets.items()
    }
    found = [probes(each.hu, each.tumor, each.organ) for each in real]
    balls = [row for some in found for row in some]
    whose = np.repeat(np.arange(len(found)), [len(some) for some in found])
    theirs = [probes(each.hu, each.tumor, each.organ, most=1) for each in others]
    single = [row for some in theirs for row in some]
    out["inside, balls of 3 mm radius"] = classify(
        table(balls, PROBE_FEATURES), table(single, PROBE_FEATURES), whose, **judged
    )
    names = (*every, *FEATURES["shape"])
    out["single features"] = tell_tales(table(real_rows, names), table(rows, names), names)
    return out


def markdown(results: dict[str, Any]) -> str:
    """The table and the classifier as Markdown: median (5 to 95 %)."""
    lines = ["| | count | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name, entry in results["table"].items():
        cells = []
        for column in COLUMNS:
            low, middle, high = entry.get(column, [None] * 3)
            cells.append("" if middle is None else f"{middle:g} ({low:g} to {high:g})")
        lines.append(f"| {name} | {entry['count']} | " + " | ".join(cells) + " |")
    lines += ["", "| | size | count | " + " | ".join(BY_SIZE) + " |", "|---" * 6 + "|"]
    for name, sizes in results["by_size"].items():
        for size, entry in sizes.items():
            cells = [f"{entry[key]:.3g}" if key in entry else "" for key in ("count", *BY_SIZE)]
            lines.append(f"| {name} | {size} | " + " | ".join(cells) + " |")
    places = list(range(-8, 5))
    lines += ["", "| HU by mm from the outline | " + " | ".join(map(str, places)) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for name, found in results["profile_hu"].items():
        lines.append(f"| {name} | " + " | ".join(str(found.get(p, "")) for p in places) + " |")
    lines += [
        "",
        "| real against | features | AUC (5 to 95 %) | chance 5 to 95 % |",
        "|---" * 4 + "|",
    ]
    for name, sets in results["classifier"].items():
        for features, entry in sets.items():
            if features == "single features":
                continue
            if entry["auc"] is None:
                lines.append(f"| {name} | {features} | {entry['reason']} | |")
                continue
            low, high = entry["auc_p5_p95"]
            least, _, most = entry["chance_p5_p50_p95"]
            lines.append(
                f"| {name} | {features} | {entry['auc']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{least:.2f} to {most:.2f} |"
            )
    for name, sets in results["classifier"].items():
        worst = ", ".join(
            f"{e['feature']} {e['auc']:.2f} ({e['real_median']:g} / {e['synthetic_median']:g})"
            for e in sets["single features"][:6]
        )
        lines += ["", f"{name}, single features, AUC (median real / {name}): {worst}"]
    return "\n".join(lines)


# -- the run --------------------------------------------------------------------------------------


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path, metavar="CASES.npz")
    parser.add_argument("--real", type=Path, help="a pack to take the real tumours from")
    parser.add_argument(
        "--generator", action="append", required=True, help="NAME or FOLDER, or LABEL=FOLDER"
    )
    parser.add_argument("--organ-label", type=int, nargs="+", default=[1])
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size-mm", type=float, nargs=2, default=[8.0, 20.0])
    parser.add_argument("--contrast-hu", type=float, nargs=2, help="asked of the generators")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--permutations", type=int, default=200, help="of the chance level")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="a folder; mind the scans' licence")
    return parser.parse_args(args)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    cases = load_pack(args.cases)
    real_cases = load_pack(args.real) if args.real else cases
    organ_labels, tumor_label = args.organ_label, args.tumor_label
    groups = {"real": real_lesions(real_cases, organ_labels, tumor_label)}
    options: dict[str, Any] = {"size_mm": tuple(args.size_mm)}
    if args.contrast_hu:
        options["contrast_hu"] = tuple(args.contrast_hu)
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    runs = {}
    for k, text in enumerate(args.generator):
        label, _, source = text.rpartition("=")
        name = label or Path(source).name
        if name in groups:
            raise SystemExit(f"two rows would be called {name}; pass --generator LABEL={source}")
        groups[name], sham, runs[name] = synthetic_lesions(
            source, cases, organ_labels, tumor_label, args.count, args.seed, **options
        )
        print(f"{name}: {len(groups[name])} tumours, {runs[name]}", flush=True)
        if k == 0:
            first_sham = sham
    groups["sham"] = first_sham

    rows = {name: rows_of(lesions) for name, lesions in groups.items()}
    judged = {"seed": args.seed, "permutations": args.permutations}
    results = {
        "question": "How like real tumours are synthetic ones?",
        "cases": [case.name for case in cases if case.label is not None],
        "real_cases": [case.name for case in real_cases if case.label is not None],
        "organ_labels": organ_labels,
        "tumor_label": tumor_label,
        "options": options,
        "seed": args.seed,
        "runs": runs,
        "table": {name: percentiles(some) for name, some in rows.items()},
        "by_size": {name: by_size(some) for name, some in rows.items()},
        "profile_hu": {name: profile(lesions) for name, lesions in groups.items()},
        "classifier": {
            name: compare(groups["real"], rows["real"], lesions, rows[name], **judged)
            for name, lesions in groups.items()
            if name != "real"
        },
    }
    print(markdown(results))
    results["lesions"] = {
        name: [
            {**each.about, **{key: _plain(value) for key, value in row.items()}}
            for each, row in zip(lesions, rows[name], strict=True)
        ]
        for name, lesions in groups.items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_json({"environment": environment(), **results}))
    print(args.out)
    if args.pictures:
        sheets(groups, args.pictures, args.seed)
    return results


def as_json(results: dict[str, Any]) -> str:
    """Indented JSON, but a line for each lesion."""
    head = json.dumps({k: v for k, v in results.items() if k != "lesions"}, indent=2)
    groups = (
        f"    {json.dumps(name)}: [\n"
        + ",\n".join(f"      {json.dumps(r)}" for r in rows)
        + "\n    ]"
        for name, rows in results["lesions"].items()
    )
    return head[:-2] + ',\n  "lesions": {\n' + ",\n".join(groups) + "\n  }\n}\n"


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 3) if np.isfinite(value) else None


if __name__ == "__main__":
    main()
