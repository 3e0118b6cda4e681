"""What does the transform add to a training step of a small MONAI U-Net?

    python -m benchmarks.speed.pipeline_overhead [--p 0.5] [--steps 20] [--device cuda]

A step is forward, loss, backward and optimiser on a batch of patches on the device, in turn with
and without ``SynthesizeTumor`` on that batch before it. Everything runs in one process on the
device, one after the other: with workers of a loader the transform would run beside the step and
cost it less. Steps are taken in turn; the tumour is drawn with probability ``p`` in each patch.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

import tumorsynth as ts
from benchmarks.common import arguments, clock, parse, picture, spread, write
from tumorsynth.commands.timing import patch_and_label, synchronise


def main() -> None:
    parser = arguments(__doc__, "pipeline_overhead")
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    args = parse(parser)
    torch.manual_seed(0)
    device = args.device
    network = UNet(3, 1, 3, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2).to(device)
    optimiser = torch.optim.AdamW(network.parameters())
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    image, label = patch_and_label(args.side, args.batch, device)
    synths: dict[str, ts.SynthesizeTumor | None] = {
        "without": None,
        "hu2023": ts.SynthesizeTumor("hu2023", p=args.p, count=1, size_mm=(5, 20)),
        "liver-early": ts.SynthesizeTumor("liver-early", p=args.p, count=1, size_mm=(5, 20)),
    }

    def step(synth: ts.SynthesizeTumor | None, seed: int) -> tuple[float, float]:
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        x, y = (image, label) if synth is None else synth(image, label, spacing=1.0, seed=seed)
        optimiser.zero_grad(set_to_none=True)
        loss_of(network(x / 200), y).backward()
        optimiser.step()
        synchronise(device)
        return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in synths}
    for number in range(args.steps + 1):
        for name, synth in synths.items():
            lap = step(synth, 2 * args.batch * number)
            if number:  # the first one loads and warms up
                found[name].append(lap)
    mean = {
        name: [sum(x) / len(laps) for x in zip(*laps, strict=True)] for name, laps in found.items()
    }
    rows = {
        name: {
            "wall_ms": {**spread([a for a, _ in laps]), "mean": round(mean[name][0], 1)},
            "cpu_ms": {**spread([b for _, b in laps]), "mean": round(mean[name][1], 1)},
            "slower_by_percent": [
                round(100 * (m / plain - 1), 1)
                for m, plain in zip(mean[name], mean["without"], strict=True)
            ],
        }
        for name, laps in found.items()
    }
    results = {
        "p": args.p,
        "batch": args.batch,
        "side": args.side,
        "steps": args.steps,
        "threads_used": args.threads,
        "of_means": "slower_by_percent is of the means (wall, CPU): p makes some steps longer",
        "rows": rows,
    }
    write(args.output, results)
    print(rows)

    ms, words = clock(device)

    def draw(axes: Any) -> None:
        axes.bar(list(rows), [row[ms]["mean"] for row in rows.values()])
        axes.set(ylabel=f"ms of {words} a training step, mean")

    picture(args.output, draw)


if __name__ == "__main__":
    main()
