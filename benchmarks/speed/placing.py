"""What does it cost to place tumours and to draw their masks, before any painting?

    python -m benchmarks.speed.placing [--organs ORGAN_MASK_DIR] [--repeats 100]

`place` on a CPU, once the organ's box is known: tumours in a ball of 72 mm in a patch of
96^3, alone and together, and with --organs of 5 to 20 mm in real organs (label 1). "stage" is all
that `SynthesizeTumor` does until a sample's masks are there: it looks for the organ and for tumours
that are there already, whether the image is finite, and where fat is that a tumour may bulge into.
CPU time of a call, over seeds: a tumour that finds its place late is part of the spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import arguments, parse, spread, write
from tumorsynth.fetching import run_alone
from tumorsynth.geometry import frame_from_spacing
from tumorsynth.pipeline.place_batch import place_sample
from tumorsynth.pipeline.records import Sample
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask

ISO = (1.0, 1.0, 1.0)
PATCH, RADIUS = 96, 36.0
WARM = 5  # calls that are not counted


def ball() -> Tensor:
    line = (torch.arange(PATCH) - (PATCH - 1) / 2).square()
    return (line[:, None, None] + line[:, None] + line < RADIUS**2).to(torch.uint8)


def measure(run: Callable[[int], list[Any]], tumours: int, repeats: int) -> dict[str, Any]:
    """CPU time of run(seed), ms a call, and how many of the tumours asked for it placed."""
    times, made = [], 0
    for seed in range(-WARM, repeats):
        start = time.process_time()
        results = run(seed % repeats)
        if seed >= 0:
            times.append((time.process_time() - start) * 1e3)
            made += sum(isinstance(r, LocalMask) for r in results)
    return {"cpu_ms": spread(times), "placed": made, "asked": tumours * repeats}


def placing(label: Tensor, spacing: Any, repeats: int, **options: Any) -> dict[str, Any]:
    region, settings = OrganRegion.of_label(label, 1), PlacementSettings(**options)

    def run(seed: int) -> list[Any]:
        rng = torch.Generator().manual_seed(seed)
        return place(region, spacing, settings, rng)

    return measure(run, options.get("count", 1), repeats)


def stage(label: Tensor, repeats: int, **options: Any) -> dict[str, Any]:
    """The whole of placing, as a call does it."""
    rng = torch.Generator().manual_seed(0)
    image = torch.where(label == 1, 110.0, -90.0) + 12 * torch.randn(label.shape, generator=rng)
    synth = ts.SynthesizeTumor("hu2023", tumor_label=2, count=1, **options)
    sample = Sample(0, image, label, frame_from_spacing(ISO))
    times, placed = [], 0
    for seed in range(-WARM, repeats):
        start = time.process_time()
        found = run_alone(place_sample(synth.settings, sample, seed % repeats, image.device))
        if seed >= 0:
            times.append((time.process_time() - start) * 1e3)
            placed += sum(isinstance(r, LocalMask) for r in found.results)
    return {"cpu_ms": spread(times), "placed": placed, "asked": repeats}


def main() -> None:
    parser = arguments(__doc__, "placing", repeats=100)
    parser.add_argument("--organs", type=Path, help="folder of NIfTI organ masks")
    args = parse(parser)
    label, n = ball(), args.repeats
    rows: dict[str, Any] = {}
    for size in (10.0, 18.0, 40.0):
        rows[f"{size:g} mm"] = placing(label, ISO, n, size_mm=size)
    for count in (3, 10):
        rows[f"{count} of 10 mm"] = placing(label, ISO, n, size_mm=10.0, count=count)
    rows["liver prior"] = placing(label, ISO, n, size_mm="liver")
    rows["stage, 10 mm"] = stage(label, n, size_mm=10.0)
    rows["stage, 18 mm, bulging by 0.3"] = stage(label, n, size_mm=18.0, bulge=0.3)
    for path in sorted(args.organs.glob("*.nii.gz")) if args.organs else []:
        scan = nib.load(path)
        organ = torch.from_numpy(np.asarray(scan.dataobj).astype(np.uint8))
        spacing = [float(s) for s in scan.header.get_zooms()[:3]]
        name = path.name.removesuffix(".nii.gz")
        rows[name] = placing(organ, spacing, n, size_mm=(5.0, 20.0))
    for name, row in rows.items():
        print(name, row)
    write(args.output, {"repeats": n, "rows": rows})


if __name__ == "__main__":
    main()
