"""Does one process that synthesises for hours keep its memory, its speed and its results?

    python -m benchmarks.reliability.soak [--calls 10000] [--minutes 10]

--calls applications with hu2023, then as many as fit in --minutes with liver-early, one thread, on
patches of twelve shapes, spacings, orientations and dtypes. Memory is the resident set after each
twentieth call (Linux). Its slope is a regression over the calls after the first tenth, in which
caches fill. The first calls are made once more at the end: their voxels must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tumorsynth as ts
from benchmarks.common import spread, write

SHAPES = [(32, 32, 32), (40, 32, 20), (24, 36, 28), (24, 24, 24)]
SPACINGS = [(1.0, 1.0, 1.0), (0.8, 0.8, 1.5), (1.5, 1.0, 1.2), (2.0, 2.0, 2.0)]
DTYPES = [torch.float32, torch.float64, torch.float16]
AGAIN = 50  # calls repeated at the end


def patches() -> list[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """Image, label (1, X, Y, Z) and affine: a noisy organ that fills most of the patch."""
    found = []
    for k in range(12):
        shape, dtype = SHAPES[k % 4], DTYPES[k % 3]
        grids = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
        organ = sum(g.square() for g in grids) < 0.9
        noise = 12 * torch.randn(shape, generator=torch.Generator().manual_seed(k))
        image = torch.where(organ, 110.0, -100.0) + noise
        signs = [-1.0 if k >> axis & 1 else 1.0 for axis in range(3)]
        affine = np.diag([*(s * d for s, d in zip(signs, SPACINGS[k // 3], strict=True)), 1.0])
        found.append((image.to(dtype)[None], organ.to(torch.uint8)[None], affine))
    return found


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(generator: str, go_on: Callable[[int], bool]) -> dict[str, Any]:
    """Calls with seed 0, 1, ... for as long as ``go_on(calls made)``."""
    synth = ts.SynthesizeTumor(generator=generator, size_mm=(4, 10), count=(1, 2))
    scans = patches()

    def call(k: int) -> str:
        image, label, affine = scans[k % len(scans)]
        made = synth(image, label, affine=affine, seed=k)
        digest = hashlib.sha256()
        for part in made:
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    call(0)  # loads the generator
    first: list[str] = []
    times, memory, tumours, skips = [], [], 0, 0
    began, k = time.monotonic(), 0
    while go_on(k):
        start = time.process_time()
        digest = call(k)
        times.append(1000 * (time.process_time() - start))
        tumours += sum(r["applied"] for r in synth.report)
        skips += sum(not r["applied"] for r in synth.report)
        if k < AGAIN:
            first.append(digest)
        if k % 20 == 0:
            memory.append((k, resident_mib()))
        k += 1
    seconds = time.monotonic() - began
    changed = sum(call(n) != digest for n, digest in enumerate(first))

    settled = np.array([pair for pair in memory if pair[0] >= k / 10])
    slope = float(np.polyfit(settled[:, 0] / 1000, settled[:, 1], 1)[0])
    tenth = max(1, k // 10)
    return {
        "calls": k,
        "minutes": round(seconds / 60, 1),
        "tumours": tumours,
        "skipped": skips,
        "cpu_ms_per_call": {
            "all": spread(times),
            "first_tenth": spread(times[:tenth]),
            "last_tenth": spread(times[-tenth:]),
        },
        "resident_mib": {
            "after_a_tenth": round(float(settled[0, 1]), 1),
            "end": round(float(settled[-1, 1]), 1),
            "most": round(max(m for _, m in memory), 1),
            "slope_per_1000_calls": round(slope, 3),
        },
        "first_calls_repeated": len(first),
        "of_these_other_voxels": changed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {"hu2023": soak("hu2023", lambda k: k < given.calls)}
    print(results["hu2023"])
    end = time.monotonic() + 60 * given.minutes
    results["liver-early"] = soak("liver-early", lambda k: time.monotonic() < end)
    print(results["liver-early"])
    write("soak", results)


if __name__ == "__main__":
    main()
