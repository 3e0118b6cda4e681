"""What does a tumour cost, stage by stage, and what a call: over batch, size and steps?

    python benchmarks/speed/latency.py [--device cuda] [--scan CT LABEL] [--no-published]

Needs torch alone (nibabel for --scan, matplotlib for the picture). Every time is given by two
clocks: wall time, and the CPU time of the process, which on one thread is the wall time of an
idle machine and holds on a shared one. A GPU is synchronised before and after
(`tumorsynth.commands.timing`).

--scan: a CT in HU and an organ mask (label 1) in NIfTI, for calls on a whole scan, and for how far
bfloat16 moves the HU of its tumours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tumorsynth as ts
from benchmarks.common import arguments, parse, picture, spread, spreads, write
from benchmarks.speed.steps import with_steps
from tumorsynth.commands.timing import (
    call_times,
    crop_and_mask,
    pass_times,
    patch_and_label,
    peak_mib,
    reference_times,
    times,
)
from tumorsynth.generators.diffusion import Generator
from tumorsynth.models import conv, kernels
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.models.unet import FactorizedUNet

BATCHES, SIDES, STEPS = (1, 2, 4, 8, 16), (64, 96, 128), (4, 50)


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """PyTorch's own choice of convolution kernel on a CPU."""
    fast = conv.Conv3d._conv_forward
    conv.Conv3d._conv_forward = nn.Conv3d._conv_forward
    try:
        yield
    finally:
        conv.Conv3d._conv_forward = fast


def variants(name: str, generator: Generator, repeats: int) -> list[dict[str, Any]]:
    """The same networks as PyTorch runs them, in float32, and in bfloat16 where that is fast."""
    on_cpu = generator.device.type == "cpu"
    kinds = [("float32", True), ("float32", False), ("bfloat16", False)]
    if on_cpu and not kernels.cpu_computes_bfloat16():
        kinds.pop()
    rows = []
    for generator.precision, plain in kinds if on_cpu else [k for k in kinds if not k[1]]:
        with plain_convolutions() if plain else nullcontext():
            found = pass_times(generator, repeats=repeats)
            change = one(generator)
            rows.append(
                {
                    "generator": name,
                    "crop": generator.crop_size,
                    "precision": generator.precision,
                    "plain_torch": plain,
                    "ms": {key: spreads(clocks) for key, clocks in found.items()},
                    "change_peak_mib": peak_mib(change, generator.device),
                }
            )
        print(rows[-1], flush=True)
    generator.precision = "auto"
    return rows


def one(generator: Generator, side: int | None = None, batch: int = 1) -> partial[Tensor]:
    """One change of a batch of crops."""
    crop, mask = crop_and_mask(side or generator.crop_size, batch, generator.device)
    return partial(generator.change, crop, mask, seed=0)


def over(generator: Generator, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """`change` over the batch (ms of the whole batch), the crop's side and the steps."""
    device = generator.device
    if device.type == "cpu":
        repeats = min(repeats, 2)
    rows: dict[str, list[dict[str, Any]]] = {"batch": [], "side": [], "steps": []}
    for batch in BATCHES:
        found = spreads(times(one(generator, batch=batch), device, repeats))
        each = round(found["wall_ms"]["median"] / batch, 2)
        rows["batch"].append({"batch": batch, **found, "wall_ms_a_tumour": each})
    for side in SIDES:
        rows["side"].append({"side": side, **spreads(times(one(generator, side), device, repeats))})
    for steps in STEPS:
        run = one(with_steps(generator, steps))
        rows["steps"].append({"steps": steps, **spreads(times(run, device, repeats))})
    print(rows, flush=True)
    return rows


def calls(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A training patch of 96^3 that is all organ, and the path that does nothing."""
    image, label = patch_and_label(96, device=device)
    rows: list[dict[str, Any]] = []
    for name, count in (("liver-early", 1), ("liver-early", 8), ("hu2023", 1)):
        size = (15, 20) if count == 1 else 12.0
        synth = ts.SynthesizeTumor(name, count=count, size_mm=size)
        found = call_times(synth, image, label, repeats, spacing=1.0)
        rows.append(
            {
                "what": "patch of 96^3, 1 mm",
                "generator": name,
                "tumours": sum(record["applied"] for record in synth.report),
                "ms": {key: spreads(clocks) for key, clocks in found.items()},
                "peak_mib": peak_mib(partial(synth, image, label, spacing=1.0, seed=0), device),
            }
        )
        print(rows[-1], flush=True)
    idle = ts.SynthesizeTumor(p=0.0)

    def thousand() -> None:
        for _ in range(1000):
            idle(image, label, spacing=1.0)

    rows.append({"what": "p = 0", "microseconds": spreads(times(thousand, device, repeats))})
    return rows


def crops_of(
    synth: ts.SynthesizeTumor, image: Tensor, label: Tensor, **where: Any
) -> list[tuple[Tensor, Tensor]]:
    """The crops and masks that a call gives to the generator."""
    generator, crops = synth.handle.get(image.device), []
    inner = generator.change

    def change(crop: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        crops.append((crop, mask))
        return inner(crop, mask, **kwargs)

    generator.change = change
    try:
        synth(image, label, seed=2, **where)
    finally:
        del generator.change
    return crops


def precision_difference(
    generator: Generator, crops: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """HU inside the tumours by which bfloat16 changes what float32 makes of the same seeds."""
    low, high = generator.window
    rms, mean, contrast = [], [], []
    for seed, (crop, mask) in enumerate(crops):
        made = {}
        for generator.precision in ("float32", "bfloat16"):
            made[generator.precision] = generator.change(crop, mask, seed=seed)[mask] * (high - low)
        hu = made["bfloat16"] - made["float32"]
        rms.append(float(hu.square().mean().sqrt()))
        mean.append(abs(float(hu.mean())))
        contrast.append(float(made["float32"].mean()))
    generator.precision = "auto"
    row = {"tumours": sum(len(c) for c, _ in crops), "rms_hu": spread(rms), "mean_hu": spread(mean)}
    row.update(worst_rms_hu=round(max(rms), 2), worst_mean_hu=round(max(mean), 2))
    return {**row, "float32_change_hu": spread(contrast)}


def whole_scan(ct: Path, mask: Path, device: torch.device) -> dict[str, Any]:
    """1, 3 and 10 tumours in a whole scan, and 10 in it mirrored up to 400 slices."""
    import nibabel as nib
    import numpy as np

    scan = nib.load(ct)
    image = torch.from_numpy(np.asarray(scan.dataobj, dtype=np.float32))[None].to(device)
    label = torch.from_numpy(np.asarray(nib.load(mask).dataobj).astype(np.uint8))[None].to(device)
    label = (label == 1).to(torch.uint8)
    spacing = [float(s) for s in scan.header.get_zooms()[:3]]
    rows = []

    def add(count: int, repeats: int) -> ts.SynthesizeTumor:
        synth = ts.SynthesizeTumor(count=count, size_mm=(8, 20))
        found = call_times(synth, image, label, repeats, spacing=spacing)
        mib = image.numel() * 4 / 2**20
        peak = peak_mib(partial(synth, image, label, spacing=spacing, seed=0), device)
        rows.append(
            {
                "shape": list(image.shape),
                "tumours": sum(record["applied"] for record in synth.report),
                "ms": {key: spreads(clocks) for key, clocks in found.items()},
                "image_mib": round(mib, 1),
                "peak_mib": peak,
                "peak_by_image": None if peak is None else round(peak / mib, 2),
            }
        )
        print(rows[-1], flush=True)
        return synth

    for count in (1, 3, 10):
        synth = add(count, 2)
    found = crops_of(synth, image, label, spacing=spacing)
    difference = precision_difference(synth.handle.get(device), found)
    print(difference, flush=True)
    repeat = -(-400 // image.shape[3])
    image, label = (
        torch.cat([v.flip(3) if i % 2 else v for i in range(repeat)], 3)[..., :400].contiguous()
        for v in (image, label)
    )
    add(10, 1)
    return {"bfloat16": difference, "calls": rows}


def import_seconds() -> float:
    """CPU seconds of importing it beyond torch, numpy and einops: median of five processes."""
    program = "import torch, numpy, einops, time; s = time.process_time(); import tumorsynth; "
    program += "tumorsynth.SynthesizeTumor; "  # loaded on first use
    program += "print(time.process_time() - s)"
    seconds = sorted(
        float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
        for _ in range(5)
    )
    return round(seconds[2], 3)


def main() -> None:
    parser = arguments(__doc__, "latency", repeats=3)
    parser.add_argument("--scan", nargs=2, type=Path, metavar=("CT", "LABEL"))
    parser.add_argument("--no-published", action="store_true", help="they take minutes on a CPU")
    args = parse(parser)
    device, n = args.device, args.repeats
    results: dict[str, Any] = {
        "threads_used": args.threads,
        "four_float32_convolutions": spreads(reference_times(device, n)),
        "import_seconds": import_seconds(),
        "calls": calls(device, n),
    }
    shipped = ts.load_generator("liver-early", device)
    results["networks"] = variants("liver-early", shipped, n)
    results["change"] = over(shipped, n)
    if args.scan:
        results["scan"] = whole_scan(*args.scan, device)
    write(args.output, results)  # what comes now takes longer
    if not args.no_published:
        torch.manual_seed(0)
        published = Generator(Autoencoder(), FactorizedUNet()).to(device)
        repeats = 1 if device.type == "cpu" else n
        results["networks"] += variants("published sizes, random weights", published, repeats)
        write(args.output, results)

    def draw(axes: Any) -> None:
        for panel, kind in zip(axes, ("batch", "side", "steps"), strict=True):
            rows = results["change"][kind]
            panel.plot([r[kind] for r in rows], [r["wall_ms"]["median"] for r in rows], "o-")
            panel.set(xlabel=kind, ylabel="ms a change", ylim=0)

    picture(args.output, draw, panels=3)


if __name__ == "__main__":
    main()
