"""What does the quality gate measure, whom does it turn away, and what does it cost?

    python -m benchmarks.realism.gate CT LABEL [--draws 12] [--generator hu2023 ...]

CT and LABEL are NIfTI, with tumours. The scores are taken of the real tumours, of synthetic ones,
and of drawn outlines on the untouched scan ("nothing"), which a gate should turn away. The organs
are liver=1 (its real tumours apart), left kidney=3.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

import tumorsynth as ts
from benchmarks.common import spread, write
from tumorsynth.appearance.gate import LIMITS, Gate, measure
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import Skip

OPEN = Gate(**dict.fromkeys(LIMITS))


def summary(scores: list[dict[str, float | None]]) -> dict[str, Any]:
    """Medians and quartiles, and how many the default gate would turn away at the first try."""
    found: dict[str, Any] = {"tumours": len(scores)}
    for name in LIMITS:
        values = [s[name] for s in scores if s[name] is not None]
        found[name] = spread(values) if values else None
    reasons = [Gate().objection(s) for s in scores]
    found["turned_away"] = sum(r is not None for r in reasons)
    found["because"] = sorted({r.split()[0] for r in reasons if r})
    return found


def around(box: tuple[slice, ...], spacing: tuple[float, ...]) -> tuple[slice, ...]:
    margin = [math.ceil(8 / s) for s in spacing]
    return tuple(slice(max(0, b.start - m), b.stop + m) for b, m in zip(box, margin, strict=True))


def real(hu: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...]) -> list[dict]:
    parts, count = ndimage.label(label.numpy() == 2)
    found = []
    for box, index in zip(ndimage.find_objects(parts), range(1, count + 1), strict=True):
        part = around(box, spacing)
        mask = torch.from_numpy(parts[part] == index)
        if float(mask.sum()) * math.prod(spacing) > 400:
            found.append(measure(hu[part], mask, label[part] == 1, spacing))
    return found


def nothing(
    hu: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...], organ: int, draws: int
) -> tuple[list[dict], list[float]]:
    """Scores of outlines without a tumour, and the ms of one core that each took."""
    region, settings = OrganRegion.of_label(label, organ), PlacementSettings(size_mm=(8, 20))
    found, times = [], []
    for seed in range(draws):
        rng = torch.Generator().manual_seed(seed)
        (tumor,) = place(region, spacing, settings, rng)
        if isinstance(tumor, Skip):
            continue
        part = around(tumor.slices, spacing)
        whole = torch.zeros(label.shape, dtype=torch.bool)
        whole[tumor.slices] = tumor.mask
        start = time.process_time()
        found.append(measure(hu[part], whole[part], label[part] == organ, spacing))
        times.append((time.process_time() - start) * 1e3)
    return found, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--generator", nargs="+", default=["hu2023"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    scan = nib.load(args.ct)
    spacing = tuple(float(s) for s in scan.header.get_zooms()[:3])
    hu = torch.from_numpy(np.asarray(scan.dataobj).astype(np.float32))
    label = torch.from_numpy(np.asarray(nib.load(args.label).dataobj).astype(np.int16))
    results: dict[str, Any] = {"spacing_mm": spacing, "limits": {}}
    results["limits"] = {n: [str(v) for v in getattr(Gate(), n) or ()] for n in LIMITS}
    results["real"] = summary(real(hu, label, spacing))
    for name, organ in (("liver", 1), ("kidney", 3)):
        found, times = nothing(hu, label, spacing, organ, 40)
        results[f"nothing_{name}"] = {**summary(found), "ms_per_tumour": spread(times)}
        for generator in args.generator:
            synth = ts.SynthesizeTumor(generator, organ, 20, count=1, size_mm=(8, 20), gate=OPEN)
            scores = []
            for seed in range(args.draws):
                synth(hu[None], label[None], spacing=spacing, seed=seed)
                scores += [r["scores"] for r in synth.report if "scores" in r]
            results[f"{Path(generator).name}_{name}"] = summary(scores)
        print(name, {k: v for k, v in results.items() if k.endswith(name)}, flush=True)
    write("gate", results)


if __name__ == "__main__":
    main()
