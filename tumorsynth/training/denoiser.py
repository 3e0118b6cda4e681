"""Stage 2: train a denoiser on annotated tumours over a frozen autoencoder (paper 3.2).

First version.

    python -m tumorsynth.training.denoiser pack.npz -o RUN/gen --autoencoder RUN/ae --tumor-label 2

T = 4 steps of the cosine schedule; the network predicts x0, which with so few steps and tumours
comes out closer to real contrast than predicting noise. RUN/gen is a generator folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tumorsynth.diffusion import cosine_schedule, q_sample, target
from tumorsynth.generator import Generator, SamplerConfig
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.training.data import Case, augment, load_pack, to_unit


@dataclass(frozen=True)
class Tumor:
    """One annotated tumour: its case and the box of its voxels."""

    case: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]


def find_tumors(cases: list[Case], tumor_label: int) -> list[Tumor]:
    """Connected tumours of at least 0.05 ml in the annotated cases."""
    from scipy import ndimage

    tumors = []
    for k, case in enumerate(cases):
        if case.label is None:
            continue
        components, _ = ndimage.label(case.label.numpy() == tumor_label, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())
        for index, box in enumerate(ndimage.find_objects(components), start=1):
            if sizes[index] >= 50:
                low = (box[0].start, box[1].start, box[2].start)
                high = (box[0].stop, box[1].stop, box[2].stop)
                tumors.append(Tumor(k, low, high))
    if not tumors:
        raise ValueError(
            f"no voxels of tumour label {tumor_label} in the annotated cases "
            f"({', '.join(c.name for c in cases if c.label is not None) or 'none'}); "
            "pass --tumor-label"
        )
    return tumors


def sample_crop(
    cases: list[Case],
    tumor: Tumor,
    tumor_label: int,
    side: int,
    rng: np.random.Generator,
    places: list[Tensor],
    transplanted: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """HU and tumour mask, (1, side, side, side) each, around a tumour, zoomed and jittered.

    places: :func:`even_tissue` of every case.
    transplanted: the share of crops in which the tumour is moved into even tissue elsewhere, in
    any of the cases. A few annotated tumours have few surroundings: without this a generator knows
    tumours only where it saw them.
    """
    case = cases[tumor.case]
    assert case.label is not None
    extent = max(h - lo for lo, h in zip(tumor.low, tumor.high, strict=True))
    # shrunk down to 0.4: large ones until they fit, all to the size of early ones, or a generator
    # trained on tumours of 20 mm paints those of 8 mm too faint
    most = min(1.15, 0.75 * side / extent)
    zoom = float(np.exp(rng.uniform(np.log(0.4), np.log(max(most, 0.5)))))
    source = round(side / zoom)
    centre = [
        (lo + h) / 2 + rng.uniform(-1, 1) * min(max(0.0, (source - (h - lo)) / 2 - 4), 0.2 * source)
        for lo, h in zip(tumor.low, tumor.high, strict=True)
    ]
    hu = _cut(case.hu, centre, source, side)
    # this tumour alone: others are surroundings, as tumours of the patient's own are later on
    box = tuple(slice(lo, h) for lo, h in zip(tumor.low, tumor.high, strict=True))
    own = torch.zeros_like(case.label, dtype=torch.bool)
    own[box] = case.label[box] == tumor_label
    mask = _cut(own, centre, source, side) > 0.5
    if rng.random() < transplanted:
        hu, mask = augment(torch.cat([hu, mask.float()]), rng).split(1)
        hu, mask = _transplant(cases, places, hu, mask > 0.5, tumor_label, zoom, rng)
    if rng.random() < 0.2:  # a generous contour has a rim of healthy tissue: soft edges are learned
        mask = F.max_pool3d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    both = augment(torch.cat([hu, mask.float()]), rng)
    gain, offset = rng.uniform(0.75, 1.2), rng.uniform(-30, 20)
    hu = 40 + (both[:1] - 40) * gain + offset
    if rng.random() < 0.4:
        hu = _thick_slices(hu, rng)
    return hu.clamp(-175, 250), both[1:] > 0.5


def _thick_slices(hu: Tensor, rng: np.random.Generator) -> Tensor:
    """(1, side, side, side) as if scanned in slices (or voxels) of 2 to 5 mm."""
    coarse = round(hu.shape[-1] / rng.uniform(2, 5))
    size = list(hu.shape[1:])
    if rng.random() < 0.2:
        size = [round(n / rng.uniform(1.5, 3)) for n in size]
    else:
        size[int(rng.integers(3))] = coarse
    thick = F.interpolate(hu[None], size=size, mode="area")
    return F.interpolate(thick, size=hu.shape[1:], mode="trilinear", align_corners=False)[0]


def even_tissue(case: Case) -> Tensor:
    """(N, 3) voxels amid at least 2 cm of even soft tissue: parenchyma, mostly."""
    coarse = F.avg_pool3d(case.hu.float()[None, None], 4)
    high = F.max_pool3d(coarse, 5, stride=1, padding=2)
    low = -F.max_pool3d(-coarse, 5, stride=1, padding=2)
    even = (low > 20) & (high < 200) & (high - low < 50)
    return even[0, 0].nonzero() * 4 + 2


def _cut(volume: Tensor, centre: list[float], source: int, side: int) -> Tensor:
    """A cube of ``source`` voxels around a centre, zoomed to (1, side, side, side), float."""
    index = [
        torch.arange(round(c - source / 2), round(c - source / 2) + source).clamp(0, n - 1)
        for c, n in zip(centre, volume.shape, strict=True)
    ]
    part = volume[index[0]][:, index[1]][:, :, index[2]].float()[None, None]
    return F.interpolate(part, size=(side,) * 3, mode="trilinear", align_corners=False)[0]


def _transplant(
    cases: list[Case],
    places: list[Tensor],
    hu: Tensor,
    mask: Tensor,
    tumor_label: int,
    zoom: float,
    rng: np.random.Generator,
    tries: int = 8,
) -> tuple[Tensor, Tensor]:
    """The tumour of one crop in even tissue of another; the crop as it was where none is found.

    Its contrast is scaled with the parenchyma's HU, within limits: an unenhanced liver shows less.
    """
    soft = F.avg_pool3d(mask.float()[None], 3, stride=1, padding=1)[0]
    shell = (F.max_pool3d(mask.float()[None], 11, stride=1, padding=5)[0] > 0) & ~(
        F.max_pool3d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    )
    own = hu[shell & (hu > 20) & (hu < 200)]
    if len(own) < 100:
        return hu, mask
    side = hu.shape[-1]
    for _ in range(tries):
        which = int(rng.integers(len(cases)))
        case = cases[which]
        if len(places[which]) == 0:
            continue
        centre = places[which][int(rng.integers(len(places[which])))].tolist()
        there = _cut(case.hu, centre, round(side / zoom), side)
        under = there[mask]
        level = float(under.median())
        smooth = F.avg_pool3d(there[None], 5, stride=1, padding=2)[0][mask]
        if not 30 < level < 190 or float(((smooth - level).abs() < 30).float().mean()) < 0.9:
            continue
        if case.label is not None:
            taken = _cut((case.label == tumor_label), centre, round(side / zoom), side)
            if bool((taken[shell | mask] > 0.1).any()):
                continue
        ratio = float(np.clip(level / float(own.median()), 0.7, 1.3))
        painted = level + (hu - float(own.median())) * ratio
        return there + soft * (painted - there), mask
    return hu, mask


def train(
    cases: list[Case],
    autoencoder: Autoencoder,
    output: Path,
    *,
    name: str,
    tumor_label: int,
    steps: int,
    minutes: float | None = None,
    side: int = 64,
    batch: int = 8,
    lr: float = 1e-3,
    inside_weight: float = 4.0,
    ema_decay: float = 0.995,
    pool_size: int = 256,
    config: ConvUNetConfig = ConvUNetConfig(),  # noqa: B008 (frozen)
    init: ConvUNet | None = None,
    seed: int = 0,
    card: dict | None = None,
) -> Generator:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tumors = find_tumors(cases, tumor_label)
    sampler = SamplerConfig(
        prediction="x0", clamp=1.5, mask_conditioning="area", crop_size=64, crop_multiple=8
    )
    schedule = cosine_schedule(sampler.timesteps)
    network = init if init is not None else ConvUNet(config)
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.train().requires_grad_(True)
    average = copy.deepcopy(network).requires_grad_(False)
    generator = Generator(autoencoder, average, sampler, {"name": name, **(card or {})})
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    print(f"{len(tumors)} tumours; {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M")

    @torch.no_grad()
    def encoded() -> tuple[Tensor, Tensor]:
        """Normalised latent of one augmented tumour crop, and its condition."""
        tumor = tumors[int(rng.integers(len(tumors)))]
        hu, mask = sample_crop(cases, tumor, tumor_label, side, rng, places)
        image = to_unit(hu[None])
        with torch.autocast("cpu", torch.bfloat16):
            volume = (image * 2 - 1).permute(0, 1, 4, 2, 3).contiguous()
            latent = autoencoder.normalize(autoencoder.encode(volume)).float()
            return latent, generator.condition(image, mask[None]).float()

    places = [even_tissue(case) for case in cases]
    pool: list[tuple[Tensor, Tensor]] = []
    start, running, step, progress = time.time(), None, 0, 0.0
    while progress < 1:
        rate = lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        # a pool of encoded crops, one new in every step: encoding costs as much as training
        while len(pool) < min(pool_size, batch + 4 * step) or step == 0 and len(pool) < batch:
            pool.append(encoded())
        pool[int(rng.integers(len(pool)))] = encoded()
        chosen = rng.choice(len(pool), batch, replace=False)
        x0 = torch.cat([pool[i][0] for i in chosen])
        cond = torch.cat([pool[i][1] for i in chosen])
        t = torch.randint(schedule.timesteps, (batch,))
        noise = torch.randn_like(x0)
        x_t = q_sample(schedule, x0, t, noise)
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(x_t, t, cond).float()
        wanted = target(schedule, x0, t, noise, sampler.prediction)
        # outside the hole the answer stands in the condition already
        weight = 1 + inside_weight * (cond[:, -1:] > -1).float()
        loss = (weight * (answer - wanted).square()).mean() / weight.mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower --lr")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        elapsed = time.time() - start
        progress = step / steps if minutes is None else elapsed / 60 / minutes
        if step % 50 == 0:
            print(f"step {step} loss {running:.5f} {elapsed:.0f} s {progress:.0%}", flush=True)
    generator.card["training"] = {
        **generator.card.get("training", {}),
        "denoiser_steps": step,
        "denoiser_batch": f"{batch} crops of {side}^3 mm",
        "denoiser_seconds": round(time.time() - start),
        "tumours": len(tumors),
    }
    generator.save(output)
    return generator


def load_autoencoder(folder: Path) -> Autoencoder:
    config = json.loads((folder / "autoencoder.json").read_text())["config"]
    autoencoder = Autoencoder(AutoencoderConfig(**config))
    autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    return autoencoder.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--name", default="unnamed")
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, help="a time budget instead of steps")
    parser.add_argument("--patch-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init", type=Path, help="a generator folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    init = None
    if args.init is not None:
        from tumorsynth.weights import read_folder

        init = read_folder(args.init).denoiser
    train(
        load_pack(args.pack),
        load_autoencoder(args.autoencoder),
        args.output,
        name=args.name,
        tumor_label=args.tumor_label,
        steps=args.steps,
        minutes=args.minutes,
        side=args.patch_size,
        batch=args.batch_size,
        lr=args.lr,
        init=init,  # type: ignore[arg-type]
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
