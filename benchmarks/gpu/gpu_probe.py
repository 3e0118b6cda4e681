"""What do the smallest pieces of a call cost: operators, synchronisations, copies, convolutions?

    python -m benchmarks.gpu.gpu_probe [--device cuda] [--tiny]

Each row is one question, printed and written as soon as it has an answer:

- microseconds per operator, until PyTorch returns (``issued``) and until the device is done;
- microseconds per host-device synchronisation;
- a copy of 64 kB, 0.65 MB and 5 MB, pageable and pinned, in both directions;
- one 3x3x3 convolution in TF32, full float32 and bfloat16, contiguous and channels last;
- ``nanmedian(1)`` of 64^3 voxels, which the contrast of a tumour is measured with;
- one call, mask to blended label, of one patch and of eight under PyTorch's profiler: how many
  operators, kernel launches and synchronisations, and its table.

Needs torch alone. Without a GPU the script answers what a CPU can answer.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tumorsynth as ts
from benchmarks.common import arguments, parse, spread, spreads, write
from benchmarks.gpu import ways
from tumorsynth.commands.timing import patch_and_label, synchronise, times
from tumorsynth.devices import full_float32

COPY_BYTES = (64_000, 650_000, 5_000_000)
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}
TABLE_ROWS = 40

Row = dict[str, Any]


def issued_and_done(
    run: Callable[[], object], device: torch.device, count: int, repeats: int
) -> Row:
    """Microseconds per call, until the last of ``count`` calls returns and until all are done."""
    issued, done = [], []
    for number in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        returned = time.perf_counter()
        synchronise(device)
        if number:  # the first round loads kernels
            issued.append((returned - start) / count * 1e6)
            done.append((time.perf_counter() - start) / count * 1e6)
    return {"issued_us": spread(issued), "done_us": spread(done)}


def operators(device: torch.device, repeats: int, count: int = 500) -> Iterator[Row]:
    few, volume = torch.zeros(8, device=device), torch.zeros(1, 8, 8, 8, 8, device=device)
    convolve = nn.Conv3d(8, 8, 3, padding=1).to(device).requires_grad_(False)
    normalise = nn.GroupNorm(4, 8).to(device).requires_grad_(False)
    runs: dict[str, Callable[[], object]] = {
        "add_ in place, 8 numbers": lambda: few.add_(1),
        "add, 8 numbers": lambda: few + 1,
        "where, 8 numbers": lambda: torch.where(few > 0, few, few),
        "group norm, 8 channels of 8^3": lambda: normalise(volume),
        "3x3x3 convolution, 8 channels of 8^3": lambda: convolve(volume),
    }
    for name, run in runs.items():
        yield {"what": "operator", "name": name, **issued_and_done(run, device, count, repeats)}


def synchronisations(device: torch.device, repeats: int, count: int = 200) -> Iterator[Row]:
    one, mask = torch.ones((), device=device), torch.ones(64, device=device, dtype=torch.bool)
    runs: dict[str, Callable[[], object]] = {
        "synchronize, idle": lambda: synchronise(device),
        "item": one.item,
        "add_ and item": lambda: one.add_(1).item(),
        "nonzero, 64 voxels": mask.nonzero,
    }
    for name, run in runs.items():
        found = issued_and_done(run, device, count, repeats)
        yield {"what": "synchronisation", "name": name, "us": found["done_us"]}


def copies(device: torch.device, repeats: int, count: int = 20) -> Iterator[Row]:
    pinned_too = (False, True) if device.type == "cuda" else (False,)
    for size in COPY_BYTES:
        there = torch.zeros(size, dtype=torch.uint8, device=device)
        for pinned in pinned_too:
            here = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
            runs: dict[str, Callable[[], object]] = {
                "to the device": lambda here=here, there=there: there.copy_(here),
                "to the device, non_blocking": lambda here=here, there=there: there.copy_(
                    here, non_blocking=True
                ),
                "to the host": lambda here=here, there=there: here.copy_(there),
            }
            for way, run in runs.items():
                memory = "pinned" if pinned else "pageable"
                found = issued_and_done(run, device, count, repeats)
                yield {"what": "copy", "way": way, "bytes": size, "memory": memory, **found}


def convolutions(device: torch.device, repeats: int, tiny: bool) -> Iterator[Row]:
    shapes = [(1, 8, 16)] if tiny else [(1, 32, 96), (8, 32, 96), (1, 64, 48), (8, 64, 48)]
    kinds = [("TF32", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
    for batch, channels, side in shapes:
        for kind, dtype in kinds:
            if kind == "TF32" and device.type != "cuda":
                continue
            for layout, memory_format in FORMATS.items():
                like: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
                layer = nn.Conv3d(channels, channels, 3, padding=1).to(device, **like)
                x = torch.randn(batch, channels, side, side, side, device=device).to(**like)
                row: Row = {"what": "convolution", "batch": batch, "channels": channels}
                row |= {"side": side, "format": kind, "layout": layout}
                with torch.no_grad(), full_float32(device.type if kind == "float32" else "none"):
                    yield {**row, **spreads(times(partial(layer, x), device, repeats))}


def nanmedians(device: torch.device, repeats: int) -> Iterator[Row]:
    for batch in (1, 8):
        x = torch.randn(batch, 64**3, generator=torch.Generator().manual_seed(0)).to(device)
        x[x > 0.5] = torch.nan
        found = spreads(times(lambda x=x: x.nanmedian(1), device, repeats))
        yield {"what": "nanmedian(1)", "batch": batch, "voxels": 64**3, **found}


def profiles(device: torch.device, tiny: bool) -> Iterator[Row]:
    generator = ways.load("tiny" if tiny else "liver-early", device)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=8.0 if tiny else 18.0)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for batch in (1, 8):
        image, label = patch_and_label(48 if tiny else 96, batch, device)
        call = partial(synth, image, label, spacing=1.0, seed=0)
        for _ in range(3):
            call()
        with profile(activities=activities) as profiler:
            call()
            synchronise(device)
        events = profiler.key_averages()
        by = f"self_{device.type}_time_total"
        table = events.table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=70)
        driver = {e.key: e.count for e in events if e.key.startswith(("cuda", "cuLaunch"))}
        yield {
            "what": "profile of a call",
            "batch": batch,
            "operators": sum(e.count for e in events if e.key.startswith("aten::")),
            "driver_calls": driver,
            "table": table.splitlines(),
        }


def main() -> None:
    parser = arguments(__doc__, "gpu_probe", repeats=10)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    args = parse(parser)
    device, repeats = args.device, args.repeats
    questions = [
        operators(device, repeats),
        synchronisations(device, repeats),
        copies(device, repeats),
        convolutions(device, repeats, args.tiny),
        nanmedians(device, repeats),
        profiles(device, args.tiny),
    ]
    rows: list[Row] = []
    failed = 0
    for answers in questions:
        try:
            for row in answers:
                rows.append(row)
                print({key: value for key, value in row.items() if key != "table"}, flush=True)
                write(args.output, {"device": str(device), "rows": rows})
        except Exception:  # the next question may have an answer
            failed += 1
            traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
