"""Stage 1: train an autoencoder on unannotated CT (paper 3.1), first version.

    python -m tumorsynth.training.autoencoder pack.npz -o RUN/ae --steps 4000

Reconstruction loss (L1) alone, for the light architecture with a continuous latent.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tumorsynth.models.autoencoder import LIGHT, Autoencoder
from tumorsynth.training.data import Case, augment, load_pack, random_patch, to_unit


def sample_batch(
    cases: list[Case], weights: np.ndarray, side: int, batch: int, rng: np.random.Generator
) -> Tensor:
    """(B, 1, side, side, side) in [-1, 1], axes (z, x, y), contrast and offset jittered."""
    crops = []
    for _ in range(batch):
        case = cases[int(rng.choice(len(cases), p=weights))]
        patch = augment(random_patch(case, side, rng)[None], rng)
        gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-15, 15)
        crops.append(to_unit((patch * gain + offset).clamp(-175, 250)))
    return (torch.stack(crops) * 2 - 1).permute(0, 1, 4, 2, 3).contiguous()


def train(
    cases: list[Case],
    output: Path,
    *,
    steps: int,
    side: int = 48,
    batch: int = 4,
    lr: float = 2e-3,
    latent_weight: float = 1e-4,
    init: Path | None = None,
    seed: int = 0,
    minutes: float | None = None,
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Autoencoder(LIGHT).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if init is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(init / "autoencoder.safetensors"))
    # annotated scans are the organ at hand: drawn as often as all others together
    size = np.array([case.hu.numel() ** 0.5 for case in cases])
    annotated = np.array([case.label is not None for case in cases])
    weights = size / size.sum()
    if annotated.any() and not annotated.all():
        weights = np.where(annotated, size / size[annotated].sum(), size / size[~annotated].sum())
        weights /= weights.sum()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    start = time.time()
    running = None
    output.mkdir(parents=True, exist_ok=True)
    step, progress = 0, 0.0
    while progress < 1:
        warm = min(1.0, (step + 1) / 100)
        rate = lr * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = sample_batch(cases, weights, side, batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encode(x)
            recon = model.decode(latent)
        error = (recon.float() - x).abs().mean()
        loss = error + latent_weight * latent.float().square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower --lr")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running = error.item() if running is None else 0.98 * running + 0.02 * error.item()
        step += 1
        elapsed = time.time() - start
        progress = step / steps if minutes is None else elapsed / 60 / minutes
        if step % 100 == 0:
            print(
                f"step {step} L1 {running * 212.5:.2f} HU {elapsed:.0f} s {progress:.0%}",
                flush=True,
            )
    _measure_range(model, cases, weights, side, rng)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        output / "autoencoder.safetensors",
    )
    (output / "autoencoder.json").write_text(
        json.dumps(
            {
                "config": asdict(LIGHT),
                "steps": step,
                "side": side,
                "batch": batch,
                "scans": [c.name for c in cases],
                "seconds": round(time.time() - start),
            },
            indent=2,
        )
    )


@torch.no_grad()
def _measure_range(
    model: Autoencoder, cases: list[Case], weights: np.ndarray, side: int, rng: np.random.Generator
) -> None:
    """Scale of the continuous latent: the 0.1 and 99.9 percentiles over all channels."""
    latents = [model.encode(sample_batch(cases, weights, side, 4, rng)) for _ in range(16)]
    flat = torch.cat([z.flatten() for z in latents]).float()
    low, high = np.percentile(flat.numpy(), [0.1, 99.9])
    model.latent_low.fill_(float(low))
    model.latent_high.fill_(float(high))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="a time budget instead of steps")
    parser.add_argument("--patch-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--init", type=Path, help="a trained folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(
        load_pack(args.pack),
        args.output,
        steps=args.steps,
        side=args.patch_size,
        batch=args.batch_size,
        lr=args.lr,
        init=args.init,
        seed=args.seed,
        minutes=args.minutes,
    )


if __name__ == "__main__":
    main()
