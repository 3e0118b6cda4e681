"""Are tumours visible over their scan's noise: real ones, outlines of nothing, synthetic ones?

    python -m benchmarks.realism.visibility FOLDER [--seeds 4] [--generator liver-early hu2023]

FOLDER holds NAME_ct.nii.gz and NAME_label.nii.gz (liver 1, its real tumours 2; scans without a
liver are left out, and so are annotated tumours of another organ). Visibility is that of
`tumorsynth.appearance.visibility`. "Before" leaves each generator its own contrast, "after" is the
default: a contrast that the noise would hide is raised, or the tumour skipped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import write
from benchmarks.realism.scans import LIVER, REAL, SYNTHETIC, liver_scans
from tumorsynth.appearance.gate import GATE_MARGIN_MM, measure
from tumorsynth.appearance.visibility import VISIBLE_FROM
from tumorsynth.geometry import Box, bounding_box
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask

MIN_REAL_MM3 = 50.0
SIZE_MM = (5, 20)

Spacing = tuple[float, float, float]


def in_scan(hu: Tensor, label: Tensor, mask: Tensor, spacing: Spacing) -> float | None:
    """Visibility of what a mask outlines in a scan."""
    box = bounding_box(mask, 0)
    assert box is not None
    box = box.grown([math.ceil(GATE_MARGIN_MM / s) for s in spacing])
    part = box.within(Box.whole(hu.shape)).slices
    return measure(hu[part], mask[part], label[part] == LIVER, spacing)["visibility"]


def real(hu: Tensor, label: Tensor, spacing: Spacing) -> list[float]:
    """Visibility of the annotated tumours."""
    parts, count = ndimage.label((label == REAL).numpy(), structure=np.ones((3, 3, 3)))
    found = []
    for index in range(1, count + 1):
        mask = torch.from_numpy(parts == index)
        if int(mask.sum()) * math.prod(spacing) >= MIN_REAL_MM3:
            found.append(in_scan(hu, label, mask, spacing))
    return [value for value in found if value is not None]


def nothing(hu: Tensor, label: Tensor, spacing: Spacing, draws: int) -> list[float]:
    """Visibility of outlines without a tumour."""
    region, settings = OrganRegion.of_label(label, LIVER), PlacementSettings(size_mm=SIZE_MM)
    found = []
    for seed in range(draws):
        (tumor,) = place(region, spacing, settings, torch.Generator().manual_seed(seed))
        if isinstance(tumor, LocalMask):
            mask = torch.zeros(label.shape, dtype=torch.bool)
            mask[tumor.slices] = tumor.mask
            found.append(in_scan(hu, label, mask, spacing))
    return [value for value in found if value is not None]


def synthetic(
    generator: str, hu: Tensor, label: Tensor, spacing: Spacing, seeds: int
) -> dict[str, Any]:
    """Visibility of default tumours before and after, and how many of them are skipped."""
    synth = ts.SynthesizeTumor(generator, LIVER, SYNTHETIC, count=3, size_mm=SIZE_MM)
    result: dict[str, Any] = {"before": [], "after": [], "raised": 0, "skipped": 0}
    for seed in range(seeds):
        with mock.patch.object(Settings, "keeps_visible", False):
            own = synth.synthesize(hu[None], label[None], spacing, seed=seed).report
        new = own
        if any(r["applied"] and (r["visibility"] or VISIBLE_FROM) < VISIBLE_FROM for r in own):
            new = synth.synthesize(hu[None], label[None], spacing, seed=seed).report
        result["before"] += [r["visibility"] for r in own if r["applied"]]
        result["after"] += [r["visibility"] for r in new if r["applied"]]
        result["raised"] += sum(r["applied"] and r["contrast_hu"] is not None for r in new)
        result["skipped"] += sum(r.get("code") == "faint" for r in new)
    return result


def figures(values: list[float]) -> dict[str, Any]:
    """How many, the share below the limit, and percentiles."""
    if not values:
        return {"tumours": 0}
    names = ("p5", "p10", "p25", "median", "p75")
    percentiles = np.percentile(values, [5, 10, 25, 50, 75]).round(1).tolist()
    below = float(np.mean(np.asarray(values) < VISIBLE_FROM))
    return {
        "tumours": len(values),
        "share_below": round(below, 3),
        **dict(zip(names, percentiles, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--draws", type=int, default=40, help="outlines of nothing in each scan")
    parser.add_argument("--generator", nargs="+", default=["liver-early", "hu2023"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    scans: dict[str, Any] = {}
    pooled: dict[str, list[float]] = {}
    for scan in liver_scans(args.folder, annotations=None):
        name, hu, label, spacing = scan.name, scan.hu, scan.label, scan.spacing
        values = {
            "real": real(hu, label, spacing),
            "nothing": nothing(hu, label, spacing, args.draws),
        }
        counts = {}
        for generator in args.generator:
            made = synthetic(generator, hu, label, spacing, args.seeds)
            counts[generator] = {key: made[key] for key in ("raised", "skipped")}
            values |= {f"{generator} {when}": made[when] for when in ("before", "after")}
        for key, numbers in values.items():
            pooled.setdefault(key, []).extend(numbers)
        scans[name] = {
            "spacing_mm": [round(s, 3) for s in spacing],
            "liver_hu": float(hu[label == LIVER].median()),
            **{key: figures(numbers) for key, numbers in values.items()},
            **counts,
        }
        print(name, scans[name], flush=True)
        everything = {key: figures(numbers) for key, numbers in pooled.items()}
        write("visibility", {"limit": VISIBLE_FROM, "all_scans": everything, "scans": scans})


if __name__ == "__main__":
    main()
