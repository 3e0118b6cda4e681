"""How many training steps a second: the denoiser, the autoencoder and a user's U-Net?

    python -m benchmarks.gpu.gpu_training [--device cuda] [--seconds 5] [--tiny]

The denoiser and the autoencoder train as ``tumorsynth train`` does, in the presets "light" (what
ships) and "base" (the published sizes, with discriminators), on random scans that lie in memory;
threads draw the crops meanwhile. The denoiser's pool of crops is small here, so that it is full
after a few steps, and one crop in eight steps is new, as later in a real run.

The U-Net takes a batch of two patches of 96^3, in turn without the transform, with it at p = 0 and
with it at p = 0.5. It is MONAI's where MONAI is installed, else a plain one of the same widths.

Needs torch alone. Each row is printed and written as soon as it is measured.
"""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tumorsynth as ts
from benchmarks.common import arguments, parse, spread, write
from benchmarks.gpu import ways
from tumorsynth.commands.timing import patch_and_label, synchronise
from tumorsynth.generators.diffusion import Generator
from tumorsynth.training.autoencoder import CROP_STREAM, AutoencoderStage
from tumorsynth.training.config import (
    PRESETS,
    AutoencoderTraining,
    DenoiserTraining,
    configured,
)
from tumorsynth.training.crop_pool import TumorCrops
from tumorsynth.training.crops import contrast_range
from tumorsynth.training.data import Case, find_tumors
from tumorsynth.training.denoiser import DenoiserStage
from tumorsynth.training.engine import learning_rate
from tumorsynth.training.launch import SingleProcess
from tumorsynth.training.networks import sampler_config, starting_autoencoder, starting_denoiser

WORKERS = 2  # threads that draw crops, as `tumorsynth train` has by default
WARM_UP_STEPS = 8
TUMORS = (((40, 40, 40), 9), ((88, 80, 72), 7))  # centre and radius in voxels of a scan of 128^3

Row = dict[str, Any]


def make_cases(side: int = 128) -> list[Case]:
    """One annotated scan: a noisy organ (label 1) with two dark tumours (label 2)."""
    rng, scale = np.random.default_rng(0), side / 128
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).astype(np.float32)
    label = np.ones((side,) * 3, np.uint8)
    for centre, radius in TUMORS:
        far = np.linalg.norm(grid - np.array(centre, np.float32) * scale, axis=-1)
        label[far < max(5, radius * scale)] = 2
    hu = np.where(label == 2, 60, 100) + rng.normal(0, 10, label.shape)
    return [Case("random", torch.from_numpy(hu).round().short(), torch.from_numpy(label))]


def denoiser_stage(preset: str, device: torch.device, cases: list[Case]) -> DenoiserStage:
    config = configured(DenoiserTraining, PRESETS["denoiser"][preset], {})
    config = replace(config, pool=4 * config.batch_size)
    if preset == "light":
        autoencoder = ts.load_generator("liver-early").autoencoder
    else:  # random weights
        autoencoder = ways.load("published" if preset == "base" else "tiny", device).autoencoder
    autoencoder = copy.deepcopy(autoencoder)
    network, multiple, _ = starting_denoiser(config, autoencoder, None)
    tumors = find_tumors(cases, 2)
    asked = contrast_range(cases, tumors, 2, config) if config.contrast == "on" else None
    sampler = sampler_config(config, multiple, asked)
    generator = Generator(autoencoder, copy.deepcopy(network), sampler)
    crops = TumorCrops(cases, tumors, 2, config, generator.window)
    return DenoiserStage(
        SingleProcess(device.type, config.precision), network, generator, crops, WORKERS
    )


def autoencoder_stage(preset: str, device: torch.device, cases: list[Case]) -> AutoencoderStage:
    config = configured(AutoencoderTraining, PRESETS["autoencoder"][preset], {})
    model, _ = starting_autoencoder(config, None)
    return AutoencoderStage(
        SingleProcess(device.type, config.precision), model, cases, config, WORKERS
    )


def steps_a_second(
    step: Callable[[int], object], first: int, device: torch.device, seconds: float
) -> Row:
    """Steps within ``seconds`` after a warm-up, in one go: the device is waited for at the end."""
    for number in range(first, first + WARM_UP_STEPS):
        step(number)
    synchronise(device)
    start, number = time.perf_counter(), first + WARM_UP_STEPS
    while time.perf_counter() - start < seconds:
        step(number)
        number += 1
    synchronise(device)
    took, steps = time.perf_counter() - start, number - first - WARM_UP_STEPS
    return {"steps": steps, "steps_a_second": round(steps / took, 3)}


def stage_row(stage: Any, what: str, preset: str, device: torch.device, seconds: float) -> Row:
    config = stage.config
    # discriminators join late: past that step they are in the figure
    first = config.steps // 2 if getattr(config, "adversarial_weight", 0.0) else 0

    def step(number: int) -> float:
        losses = stage.step(number, learning_rate(config, number))
        return float(losses["loss"])  # `train_loop` reads the losses of each step too

    found = steps_a_second(step, first, device, seconds)
    start = time.perf_counter()
    if isinstance(stage, DenoiserStage):
        stage.crops.sample([(place, 10_000) for place in range(4)])
    else:
        for place in range(4):
            stage._cube(CROP_STREAM, 10_000, place)
    crop_ms = round((time.perf_counter() - start) / 4 * 1e3, 1)
    return {
        "what": what,
        "preset": preset,
        "patch": config.patch_size,
        "batch": config.batch_size,
        "precision": config.precision,
        **found,
        "ms_to_draw_a_crop_on_the_cpu": crop_ms,
    }


class PlainUNet(nn.Module):
    """A residual U-Net of MONAI's widths, for machines without MONAI; its times are its own."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()

        def block(before: int, after: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(
                nn.Conv3d(before, after, 3, stride, 1),
                nn.InstanceNorm3d(after),
                nn.PReLU(),
                nn.Conv3d(after, after, 3, 1, 1),
                nn.InstanceNorm3d(after),
                nn.PReLU(),
            )

        pairs = list(zip((1, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList(block(a, b, 2 if i else 1) for i, (a, b) in enumerate(pairs))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(b, a, 2, 2) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.merge = nn.ModuleList(block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for down in self.down:
            x = down(x)
            kept.append(x)
        for level in reversed(range(len(self.up))):
            x = self.merge[level](torch.cat([self.up[level](x), kept[level]], 1))
        return self.head(x)


def segmentation(
    device: torch.device, widths: tuple[int, ...]
) -> tuple[str, nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The name of a U-Net for three classes, the network, and its loss."""
    torch.manual_seed(0)
    try:
        from monai.losses import DiceCELoss
        from monai.networks.nets import UNet
    except ImportError as error:
        print(f"MONAI's U-Net: not measured ({error}); a plain one instead", flush=True)
        cross_entropy = nn.CrossEntropyLoss()

        def loss_of(logits: Tensor, label: Tensor) -> Tensor:
            return cross_entropy(logits, label[:, 0].long())

        return "plain torch U-Net", PlainUNet(widths, 3).to(device), loss_of
    strides = (2,) * (len(widths) - 1)
    network = UNet(3, 1, 3, widths, strides, num_res_units=2).to(device)
    return "MONAI UNet", network, DiceCELoss(to_onehot_y=True, softmax=True)


def segmentation_rows(device: torch.device, seconds: float, tiny: bool) -> Iterator[Row]:
    """A step without the transform, at p = 0 and at p = 0.5, in turn."""
    side, batch, widths = (32, 1, (4, 8)) if tiny else (96, 2, (16, 32, 64, 128, 256))
    name, network, loss_of = segmentation(device, widths)
    optimiser = torch.optim.AdamW(network.parameters())
    image, label = patch_and_label(side, batch, device)
    generator = ways.load("tiny" if tiny else "liver-early", device)
    size_mm = (5, 8) if tiny else (5, 20)
    synths = {
        p: None if p is None else ts.SynthesizeTumor(generator, p=p, count=1, size_mm=size_mm)
        for p in (None, 0.0, 0.5)
    }

    def step(synth: ts.SynthesizeTumor | None, seed: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        x, y = (image, label) if synth is None else synth(image, label, spacing=1.0, seed=seed)
        optimiser.zero_grad(set_to_none=True)
        loss_of(network(x / 200), y).backward()
        optimiser.step()
        synchronise(device)
        return (time.perf_counter() - start) * 1e3

    laps: dict[float | None, list[float]] = {p: [] for p in synths}
    number, end = 0, float("inf")
    while number < 2 * WARM_UP_STEPS or time.perf_counter() < end:
        if number == WARM_UP_STEPS:
            end = time.perf_counter() + 3 * seconds
        for p, synth in synths.items():
            lap = step(synth, 2 * batch * number)
            if number >= WARM_UP_STEPS:
                laps[p].append(lap)
        number += 1
    without = float(np.mean(laps[None]))
    for p, found in laps.items():
        mean = float(np.mean(found))  # p makes some steps longer, which a median hides
        yield {
            "what": "segmentation",
            "network": name,
            "patch": side,
            "batch": batch,
            "p": p,
            "steps": len(found),
            "steps_a_second": round(1e3 / mean, 3),
            "wall_ms": {**spread(found), "mean": round(mean, 2)},
            "slower_by_percent": round(100 * (mean / without - 1), 1),
        }


def main() -> None:
    parser = arguments(__doc__, "gpu_training")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
    args = parse(parser)
    device, seconds = args.device, args.seconds
    cases = make_cases(48 if args.tiny else 128)
    makers: dict[str, Callable[..., Any]] = {
        "denoiser": denoiser_stage,
        "autoencoder": autoencoder_stage,
    }

    def stage(what: str, preset: str) -> Iterator[Row]:
        yield stage_row(makers[what](preset, device, cases), what, preset, device, seconds)

    small, *large = ("tiny",) if args.tiny else ("light", "base")
    parts = [stage(what, small) for what in makers]
    parts.append(segmentation_rows(device, seconds, args.tiny))
    parts += [stage(what, preset) for preset in large for what in makers]
    rows: list[Row] = []
    failed = 0
    for part in parts:
        try:
            for row in part:
                rows.append(row)
                print(row, flush=True)
                write(args.output, {"device": str(device), "rows": rows})
        except Exception:  # the next row may be had
            failed += 1
            traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
