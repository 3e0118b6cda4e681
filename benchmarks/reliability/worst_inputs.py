"""The inputs that take a call longest: does every one end, how soon, and in how much memory?

    python -m benchmarks.reliability.worst_inputs [--side 256]

One call each, in a process of its own, on a volume of side^3 voxels with hu2023 (the network of a
diffusion generator costs the same for any input of one tumour size). CPU time, one thread; peak
memory is the process's, the volume and its copy in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import tumorsynth as ts
from benchmarks.common import write

HUGE = {"count": 100, "size_mm": (200.0, 200.0)}
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    # what it is: the organ, the settings, the spacing in mm
    "organ of one voxel": ("voxel", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "no organ": ("none", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "checkerboard": ("checkerboard", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "single voxels, far apart": ("dots", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "single voxels, a prior's sizes": ("dots", {"count": 100, "size_mm": "liver"}, 1.0),
    "noise, a prior's sizes": ("noise", {"count": 100, "size_mm": "liver"}, 1.0),
    "one plane of 1 voxel": ("plane", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "a winding tube of 2 voxels": ("tube", {"count": 100, "size_mm": (5, 20)}, 1.0),
    "100 tumours of 20 mm": ("full", {"count": 100, "size_mm": 20.0}, 1.0),
    "100 tumours of 200 mm": ("full", HUGE, 1.0),
    "100 tumours of 200 mm, merging": ("full", {**HUGE, "merge": True}, 1.0),
    "200 mm in voxels of 0.01 mm": ("full", HUGE, 0.01),
    "200 mm in voxels of 0.01 x 1 x 25 mm": ("full", HUGE, (0.01, 1.0, 25.0)),
    "gap of 100 mm, 100 tumours": ("full", {"count": 100, "size_mm": 5.0, "gap_mm": 100}, 1.0),
    "mass effect, 20 tumours of 50 mm": (
        "full",
        {"count": 20, "size_mm": 50.0, "mass_effect": 0.9},
        1.0,
    ),
    "a gate that nothing passes, 100 tries": (
        "full",
        {"count": 1, "size_mm": 20.0, "gate": ts.Gate(tries=100, visibility=(1e9, 2e9))},
        1.0,
    ),
}


def organ(kind: str, side: int) -> torch.Tensor:
    label = torch.zeros((1, side, side, side), dtype=torch.uint8)
    if kind == "voxel":
        label[0, side // 2, side // 2, side // 2] = 1
    elif kind == "checkerboard":
        x, y, z = (torch.arange(side) % 2 for _ in range(3))
        label[0] = (x[:, None, None] ^ y[:, None] ^ z).to(torch.uint8)
    elif kind == "dots":
        label[:, ::2, ::2, ::2] = 1
    elif kind == "noise":
        rng = torch.Generator().manual_seed(0)
        label = torch.randint(2, label.shape, generator=rng, dtype=torch.uint8)
    elif kind == "plane":
        label[:, side // 2] = 1
    elif kind == "tube":  # rows joined at alternating ends
        label[0, side // 2 : side // 2 + 2, ::4] = label[0, side // 2 : side // 2 + 2, 1::4] = 1
        label[0, side // 2 : side // 2 + 2, :, -2:] = 1
    elif kind == "full":
        label[:] = 1
    return label


def call(name: str, side: int) -> dict[str, Any]:
    """CPU seconds, the process's peak memory, and how many tumours came of it."""
    kind, settings, spacing = CASES[name]
    label = organ(kind, side)
    image = torch.empty(label.shape).normal_(100, 12, generator=torch.Generator().manual_seed(0))
    synth = ts.SynthesizeTumor("hu2023", **settings)
    start = time.process_time()
    synth(image, label, spacing=spacing, seed=0)
    return {
        "cpu_s": round(time.process_time() - start, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "tumours": sum(record["applied"] for record in synth.report),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("-o", "--output", default="worst_inputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ts.load_generator("hu2023")
    found = {}
    for name in CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            found[name] = process.submit(call, name, args.side).result()
        print(name, found[name], flush=True)
        write(args.output, {"side": args.side, "calls": found})


if __name__ == "__main__":
    main()
