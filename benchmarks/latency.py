"""What does a tumour cost, stage by stage, and what a call; how much memory does a whole scan take?

    python benchmarks/latency.py [--scan CT LABEL] [--original HOOK.py] [--repeats 5] [-o NAME]

Needs torch alone (nibabel for --scan). Runs on the CPU with as many threads as torch is given
(OMP_NUM_THREADS). Times are of the process's CPU clock, in ms, summed over its threads: on one
thread that is the wall time of an idle machine, and it holds on a shared one. Memory is the peak
of the resident set above what was there before the call.

--scan: a CT in HU and an organ mask (label 1) in NIfTI, for calls on a whole scan.
--original: a Python file with ``load(AutoencoderConfig, UNetConfig) -> run``, where
``run(crop, tumor_mask)`` paints one (1, 1, 96, 96, 96) crop with the original's own code, which is
not part of this project; it runs in turn with ours.
"""

from __future__ import annotations

import argparse
import ctypes
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from common import spread, write
from torch import Tensor, nn

import tumorsynth as ts
from tumorsynth.generator import Generator
from tumorsynth.models import conv
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.unet import FactorizedUNet, UNetConfig

PAGE = 4096


def milliseconds(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and quartiles of the CPU time of ``run()``, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1e3)
    return spread(times)


def peak_mib(run: Callable[[], object]) -> float | None:
    """Peak of the resident memory above that before, in MiB, sampled every ms; Linux with glibc.

    What earlier calls freed goes back to the system first, or it would hide what this one takes.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None

    ctypes.CDLL(None).malloc_trim(0)

    def resident() -> int:
        return int(statm.read_text().split()[1]) * PAGE

    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return round((max(peak[0], before) - before) / 2**20, 1)


@contextmanager
def plain_convolutions():
    """PyTorch's own choice of convolution kernel, as before models/conv.py was there."""
    fast = conv.Conv3d._conv_forward
    conv.Conv3d._conv_forward = nn.Conv3d._conv_forward
    try:
        yield
    finally:
        conv.Conv3d._conv_forward = fast


def crop_and_mask(side: int) -> tuple[Tensor, Tensor]:
    """A noisy crop in [0, 1] and a ball of 18 mm in its middle, (1, 1, side, side, side)."""
    rng = torch.Generator().manual_seed(0)
    crop = (0.65 + 0.03 * torch.randn(1, 1, side, side, side, generator=rng)).clamp(0, 1)
    axis = torch.arange(side) - side // 2
    far = sum(g.square() for g in torch.meshgrid(axis, axis, axis, indexing="ij"))
    return crop, (far <= 81)[None, None]


def stages(generator: Generator, side: int, repeats: int) -> dict[str, object]:
    """One tumour in one crop: each network pass, and ``change`` as a whole."""
    crop, mask = crop_and_mask(side)
    aim = generator._aim(crop, mask, [0], None)
    cond, volume = generator._condition(crop, mask, None if aim is None else aim[2])
    noise = generator._noise(cond, [0], None)
    latent = generator.sample(cond, noise)
    raw = generator.autoencoder.denormalize(latent)
    rows = {
        "encode": milliseconds(lambda: generator._encode(volume), repeats),
        "denoise": milliseconds(lambda: generator.sample(cond, noise), repeats),
        "quantise": milliseconds(lambda: generator.autoencoder.quantize(raw), repeats),
        "decode": milliseconds(lambda: generator._decode(raw), repeats),
        "change": milliseconds(lambda: generator.change(crop, mask, seed=0), repeats),
    }
    return {
        "repeats": repeats,
        "ms": rows,
        "change_peak_mib": peak_mib(lambda: generator.change(crop, mask, seed=0)),
    }


def variants(name: str, generator: Generator, side: int, repeats: int) -> list[dict[str, object]]:
    """The same networks as PyTorch runs them, in float32, and in bfloat16 where that is fast."""
    rows = []
    precisions = ["float32", "bfloat16"] if conv.cpu_computes_bfloat16() else ["float32"]
    for precision, plain in [("float32", True), *((p, False) for p in precisions)]:
        generator.precision = precision
        row = {"generator": name, "crop": side, "precision": precision, "plain_torch": plain}
        if plain:
            with plain_convolutions():
                row.update(stages(generator, side, repeats))
        else:
            row.update(stages(generator, side, repeats))
        rows.append(row)
        print(row, flush=True)
    generator.precision = "auto"
    return rows


def precision_difference(
    generator: Generator, what: str, crops: list[tuple[Tensor, Tensor]]
) -> dict[str, object]:
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
    row = {"crops": what, "tumours": len(crops), "rms_hu": spread(rms), "mean_hu": spread(mean)}
    row.update(worst_rms_hu=round(max(rms), 2), worst_mean_hu=round(max(mean), 2))
    return {**row, "float32_change_hu": spread(contrast)}


def crops_of(
    synth: ts.SynthesizeTumor, image: Tensor, label: Tensor, **where: object
) -> list[tuple[Tensor, Tensor]]:
    """The crops and masks that a call gives to the generator."""
    generator, crops = synth.handle.get(torch.device("cpu")), []
    inner = generator.change

    def change(crop: Tensor, mask: Tensor, **kwargs: object) -> Tensor:
        crops.append((crop, mask))
        return inner(crop, mask, **kwargs)

    generator.change = change
    try:
        synth(image, label, seed=2, **where)
    finally:
        del generator.change
    return crops


def published_sizes() -> Generator:
    """The published layer sizes with random weights: the time is the same, the tumours are not."""
    torch.manual_seed(0)
    return Generator(Autoencoder(AutoencoderConfig()), FactorizedUNet(UNetConfig()))


def timed_call(
    synth: ts.SynthesizeTumor, image: Tensor, label: Tensor, repeats: int, **where: object
) -> dict[str, object]:
    """One call and its parts, each timed inside the same calls."""
    parts = {"_masks": "masks", "_crop": "crop", "_draft": "blend", "_write": "blend"}
    generator = synth.handle.get(torch.device("cpu"))
    spent: dict[str, float] = {}

    def timed(owner: object, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def run(*args, **kwargs):
            start = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[key] = spent.get(key, 0.0) + (time.process_time() - start) * 1e3

        setattr(owner, name, run)

    for part, key in parts.items():
        timed(synth, part, key)
    timed(generator, "change", "networks")
    runs: list[dict[str, float]] = []
    try:
        for _ in range(repeats + 1):
            spent.clear()
            start = time.process_time()
            synth(image, label, seed=1, **where)
            whole = (time.process_time() - start) * 1e3
            runs.append({**spent, "rest": whole - sum(spent.values()), "whole_call": whole})
        made = sum(record["applied"] for record in synth.report)
        peak = peak_mib(lambda: synth(image, label, seed=1, **where))
    finally:
        for part in parts:
            delattr(synth, part)
        del generator.change
    return {
        "shape": list(image.shape),
        "tumours": made,
        "ms": {key: spread([run.get(key, 0.0) for run in runs[1:]]) for key in runs[0]},
        "image_mib": round(image.numel() * 4 / 2**20, 1),
        "peak_mib": peak,
    }


def calls(repeats: int) -> list[dict[str, object]]:
    """A training patch of 96^3 that is all organ, and the path that does nothing."""
    image = torch.full((1, 96, 96, 96), 110.0)
    image += 12 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    label = torch.ones(image.shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor(count=1, size_mm=(15, 20))
    row = {"what": "patch of 96^3, 1 mm", **timed_call(synth, image, label, repeats, spacing=1.0)}
    idle = ts.SynthesizeTumor(p=0.0)

    def thousand() -> None:
        for _ in range(1000):
            idle(image, label, spacing=1.0)

    return [row, {"what": "p = 0", "microseconds": milliseconds(thousand, repeats)}]


def whole_scan(ct: Path, mask: Path) -> dict[str, object]:
    """1, 3 and 10 tumours in a whole scan, and 10 in it mirrored up to 400 slices."""
    import nibabel as nib
    import numpy as np

    scan = nib.load(ct)
    image = torch.from_numpy(np.asarray(scan.dataobj, dtype=np.float32))[None]
    label = torch.from_numpy(np.asarray(nib.load(mask).dataobj).astype(np.uint8))[None]
    label = (label == 1).to(torch.uint8)
    spacing = [float(s) for s in scan.header.get_zooms()[:3]]
    rows = []
    for count in (1, 3, 10):
        synth = ts.SynthesizeTumor(count=count, size_mm=(8, 20))
        rows.append(timed_call(synth, image, label, 2, spacing=spacing))
        print(rows[-1], flush=True)
    shipped = synth.handle.get(torch.device("cpu"))
    found = crops_of(synth, image, label, spacing=spacing)
    difference = precision_difference(shipped, "of the scan", found)
    print(difference, flush=True)
    times = -(-400 // image.shape[3])
    image, label = (
        torch.cat([v.flip(3) if i % 2 else v for i in range(times)], 3)[..., :400].contiguous()
        for v in (image, label)
    )
    synth = ts.SynthesizeTumor(count=10, size_mm=(8, 20))
    rows.append(timed_call(synth, image, label, 1, spacing=spacing))
    print(rows[-1], flush=True)
    return {"bfloat16": difference, "calls": rows}


def yardstick(repeats: int) -> dict[str, float]:
    """Four float32 convolutions, 3x3x3, 32 channels, 96^3: the goals are shares of it."""
    layer, x = nn.Conv3d(32, 32, 3, padding=1), torch.randn(1, 32, 96, 96, 96)
    with torch.no_grad():
        return milliseconds(lambda: [layer(x) for _ in range(4)], repeats)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", nargs=2, type=Path, metavar=("CT", "LABEL"))
    parser.add_argument("--original", type=Path, metavar="HOOK.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", default="latency_cpu", metavar="NAME")
    args = parser.parse_args()
    n = args.repeats
    results: dict[str, object] = {
        "clock": "CPU time of the process, ms",
        "four_float32_convolutions_ms": yardstick(n),
        "import_seconds": import_seconds(),
    }
    shipped = ts.load_generator("liver-early")
    published = published_sizes()
    results["calls"] = calls(n)
    print(results, flush=True)
    results["networks"] = variants("liver-early", shipped, shipped.crop_size, n)
    if args.scan:
        results["scan"] = whole_scan(*args.scan)
    write(args.output, results)  # what comes now takes minutes
    results["networks"] += variants(
        "published sizes, random weights", published, 96, max(1, n // 2)
    )
    if args.original:
        run, (crop, mask) = (
            runpy.run_path(str(args.original))["load"](AutoencoderConfig, UNetConfig),
            crop_and_mask(96),
        )
        ours, theirs = [], []
        for _ in range(n):
            ours.append(milliseconds(lambda: published.inpaint(crop, mask, seed=0), 1)["median"])
            theirs.append(milliseconds(lambda: run(crop, mask), 1)["median"])
        results["original"] = {"ours_ms": spread(ours), "original_ms": spread(theirs)}
    write(args.output, results)


if __name__ == "__main__":
    main()
