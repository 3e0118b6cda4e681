"""In which organs does each shipped generator paint, and what comes of it?

    python -m benchmarks.reliability.tissue [--data ../shared/data/ct] [--sources phantom ...]

Each organ of the phantom and of every annotated scan in ``--data`` (those of its README) gets one
tumour of 6 to 18 mm for each seed and generator. A row counts the tumours made and skipped, their
change and what their voxels were before; ``brighter`` counts tumours that a generator of dark ones
made brighter than their tissue by more than 10 HU, ``bone`` those of more than 250 HU made of less,
``gas`` those that hold voxels below -250 HU in an organ of the abdomen (padding, gas, air),
``faint`` those skipped since the scan's noise would hide them.

``places`` counts, over more seeds and without painting, how many tumours of each organ find their
first place unsuited, and how many find no other and are skipped. With sources named, the other rows
of results/tissue.json stay. ``--table tissue_before`` prints a table beside the same rows of an
earlier version, which were made with ``--places 0``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import HERE, spread, write
from tumorsynth.geometry import Box
from tumorsynth.phantom.landmarks import LABELS
from tumorsynth.placement.organ import organ_box
from tumorsynth.scans.volume_files import read_pair

GENERATORS = ("liver-early", "hu2023", "lung")
SCANS: dict[str, dict[str, int]] = {
    "ircadb_p01": {
        "liver": 1,
        "left kidney": 3,
        "right kidney": 4,
        "spleen": 5,
        "lungs": 6,
        "bone": 7,
        "portal vein": 8,
        "vena cava": 9,
    },
    "totalseg_example": {
        "liver": 1,
        "pancreas": 2,
        "left kidney": 3,
        "right kidney": 4,
        "spleen": 5,
        "stomach": 6,
        "gallbladder": 7,
        "aorta": 8,
        "vena cava": 9,
        "colon": 10,
        "duodenum": 11,
    },
    "lung1_003": {"lungs": 1},
} | {
    scan: {"liver": 1}
    for scan in (
        "chaos_set3",
        "lits000",
        "radcttace_0697_eqp",
        "radcttace_0745_ap",
        "radcttace_0745_eqp",
        "radcttace_1720_eqp",
        "radcttace_2144_eqp",
        "radcttace_2144_pp",
        "crlm_1100_lowres",
    )
}
GROUPS = {  # of the table: organs by the words in their names
    "livers": ("liver",),
    "kidneys": ("kidney",),
    "spleens": ("spleen",),
    "pancreases": ("pancreas",),
    "gallbladders": ("gallbladder",),
    "stomachs and bowels": ("stomach", "colon", "duodenum", "bowel"),
    "large vessels": ("aorta", "cava", "vein"),
    "spine, ribs, bone": ("spine", "ribs", "bone"),
    "lungs": ("lungs",),
}
MARGIN_VOXELS = 24  # around an organ, so that no scan is copied whole for each tumour
TUMOR_LABEL = 99
BRIGHTER_HU, BONE_HU, GAS_HU = 10.0, 250.0, -250.0


def organs(source: str, data: Path) -> Iterator[tuple[str, Tensor, Tensor, int, Any]]:
    """Yield name, image, label, value and spacing of each organ of a source."""
    if source == "phantom":
        ct = ts.make_phantom(spacing=(1.5, 1.5, 1.5))
        image, label, spacing, values = ct.image[0], ct.label[0], ct.spacing, LABELS
    else:
        scan, labels = read_pair(*(data / f"{source}_{kind}.nii.gz" for kind in ("ct", "label")))
        image, label = torch.from_numpy(scan.values()), torch.from_numpy(labels.integers())
        spacing, values = np.linalg.norm(scan.affine[:3, :3], axis=0).tolist(), SCANS[source]
    for name, value in values.items():
        box = organ_box(label, value)
        if box is not None:
            box = box.grown([MARGIN_VOXELS] * 3).within(Box.whole(label.shape))
            yield (
                name,
                image[box.slices].float()[None],
                label[box.slices].to(torch.uint8)[None],
                value,
                spacing,
            )


def row(generator: str, image: Tensor, label: Tensor, value: int, spacing: Any, seeds: int) -> Any:
    """Make one tumour for each seed and count what came of them."""
    synth = ts.SynthesizeTumor(
        generator, organ_labels=value, tumor_label=TUMOR_LABEL, count=1, size_mm=(6, 18)
    )
    codes, changes, found = Counter[str](), [], Counter[str]()
    for seed in range(seeds):
        new, out = synth(image, label, spacing=spacing, seed=seed)
        (record,) = synth.report
        codes["applied" if record["applied"] else record["code"]] += 1
        if not record["applied"]:
            continue
        inside = out == TUMOR_LABEL
        before, after = image[inside], new[inside]
        changes.append(record["hu_change"])
        found["brighter"] += generator != "lung" and record["hu_change"] > BRIGHTER_HU
        found["bone"] += bool(before.mean() < BONE_HU < after.mean())
        found["gas"] += generator != "lung" and bool((before < GAS_HU).any())
    return {
        **codes,
        **{kind: count for kind, count in found.items() if count},
        "hu_change": spread(changes) if changes else None,
        "hu_change_range": np.round([min(changes), max(changes)]).tolist() if changes else None,
    }


def places(generator: str, image: Tensor, label: Tensor, value: int, spacing: Any, seeds: int):
    """Count the tumours whose first place is unsuited, and those that find no other."""
    from tumorsynth.fetching import run_alone
    from tumorsynth.geometry import frame_from_spacing
    from tumorsynth.pipeline.place_batch import organ_region
    from tumorsynth.pipeline.records import split_batch
    from tumorsynth.pipeline.tissue_check import TissueCheck
    from tumorsynth.placement.place import place

    synth = ts.SynthesizeTumor(generator, organ_labels=value, tumor_label=TUMOR_LABEL, count=1)
    settings = synth.settings
    check = TissueCheck.of(settings, synth.handle.get("cpu"))
    (sample,) = split_batch(image, label, [frame_from_spacing(spacing)])
    region = run_alone(organ_region(settings, sample, check))
    objections = []

    def objection(tumor: Any) -> Any:
        objections.append((yield from check.objection(sample, tumor)))
        return objections[-1]

    moved, codes = 0, Counter[str]()
    for seed in range(seeds):
        objections.clear()
        rng = torch.Generator().manual_seed(seed)
        (found,) = place(region, sample.frame.spacing, settings.placement, rng, objection=objection)
        moved += bool(objections and objections[0])
        codes[getattr(found, "code", "placed")] += 1
    skipped = codes["tissue"]
    return {"seeds": seeds, "first_place_unsuited": moved, "skipped": skipped}


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return both files' rows by groups of organs, as Markdown."""
    heads = [f"`{generator}` {time}" for generator in GENERATORS for time in ("before", "after")]
    lines = ["| | " + " | ".join(heads) + " |", "|" + " --- |" * (len(heads) + 1)]
    for group, words in GROUPS.items():
        names = [name for name in after if any(word in name.split(": ")[1] for word in words)]
        cells = [
            _cell([rows[name][generator] for name in names])
            for generator in GENERATORS
            for rows in (before, after)
        ]
        lines.append(f"| {len(names)} {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    """Tumours made, the range of their change, how many went wrong, and how many were too faint."""
    made, faint = (sum(row.get(code, 0) for row in rows) for code in ("applied", "faint"))
    skipped = [f"{faint} faint"] if faint else []
    if not made:
        return ", ".join(["none", *skipped])
    ends = np.array([row["hu_change_range"] for row in rows if row["hu_change_range"]])
    wrong = {kind: sum(row.get(kind, 0) for row in rows) for kind in ("brighter", "bone", "gas")}
    words = [f"**{count} {kind}**" for kind, count in wrong.items() if count]
    return ", ".join(
        [f"{made}: {ends[:, 0].min():+.0f} to {ends[:, 1].max():+.0f} HU", *words, *skipped]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data/ct")
    parser.add_argument("--sources", nargs="*", default=["phantom", *SCANS])
    parser.add_argument("--generators", nargs="*", default=GENERATORS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--places", type=int, default=200, help="seeds; 0 counts none")
    parser.add_argument("-o", "--output", default="tissue")
    parser.add_argument("--table", metavar="BEFORE", help="print the table with this file's rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results" / f"{args.output}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    if args.table:
        before = json.loads((HERE / "results" / f"{args.table}.json").read_text())["rows"]
        print(table(before, rows))
        return
    for source in args.sources:
        for name, *organ in organs(source, args.data):
            entry = rows.setdefault(f"{source}: {name}", {})
            for generator in args.generators:
                found = row(generator, *organ, args.seeds)
                if args.places and found.get("applied"):
                    found["places"] = places(generator, *organ, args.places)
                entry[generator] = found
                print(f"{source}: {name}: {generator}", found, flush=True)
            write(args.output, {"seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    main()
