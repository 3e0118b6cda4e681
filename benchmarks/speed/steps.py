"""How many denoising steps does a tumour need: time and quality over T = 1, 2, 4, 8, 50?

    python -m benchmarks.speed.steps [--generator liver-early] [--scan CT LABEL] [--draws 12]

The paper's figure 6 asks it of networks that were trained anew for each T. Here one network,
trained with its own T, is sampled in fewer steps, ``with_sampler(steps=n)``, and in more: these
have the noise levels of the cosine schedule of n steps, and the network is told the time at which
its own schedule has that level, ``T (k + 1) / n - 1``, at least 0.

--scan: a CT in HU and an organ mask (label 1) in NIfTI, in place of the phantom and its liver.

Scores are those of the quality gate (`tumorsynth.appearance.gate.measure`), the same masks and
seeds for all; "healthy" is what they say of the same outlines without a tumour. The difference to
the generator's own T is of the same seed: all start from the same noise.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import tumorsynth as ts
from benchmarks.common import arguments, clock, parse, picture, spread, spreads, write
from tumorsynth.appearance.gate import measure
from tumorsynth.commands.timing import crop_and_mask, times
from tumorsynth.generators.diffusion import Generator
from tumorsynth.phantom import LABELS
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import Skip
from tumorsynth.training.reading import Source, read_case

STEPS = (1, 2, 4, 8, 50)
SCORES = ("contrast_hu", "noise_ratio", "edge_mm")


class Retimed(nn.Module):
    """A denoiser of ``trained`` steps, told its own time of the levels of ``steps`` steps."""

    def __init__(self, inner: nn.Module, trained: int, steps: int) -> None:
        super().__init__()
        self.inner, self.rate = inner, trained / steps

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.inner(x_t, ((t + 1) * self.rate - 1).clamp(min=0), cond)


def with_steps(generator: Generator, steps: int) -> Generator:
    trained = generator.sampler.timesteps
    if steps <= trained:
        return generator.with_sampler(steps=steps)
    other = generator.with_sampler(timesteps=steps, steps=steps)
    other.denoiser = Retimed(generator.denoiser, trained, steps).eval()
    return other


def read_scan(ct: Path, mask: Path) -> Any:
    """A scan at 1 mm, as a phantom is: image and label (1, X, Y, Z), spacing, the organ 1."""
    case = read_case(Source("scan", ct, mask))
    assert case.label is not None
    return SimpleNamespace(
        image=case.hu.float()[None], label=case.label[None], spacing=(1.0, 1.0, 1.0)
    )


def drawn(
    ct: Any, device: torch.device, draws: int, generator: Generator
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """HU, tumour mask and organ of crops, (1, 1, side, side, side): one tumour in each."""
    label = ct.label[0]
    assert LABELS["liver"] == 1  # as in the scans
    region = OrganRegion.of_label(label, 1)
    settings = PlacementSettings(size_mm=(8, 20))
    found, seed = [], 0
    while len(found) < draws:
        rng = torch.Generator().manual_seed(seed)
        seed += 1
        (tumor,) = place(region, ct.spacing, settings, rng)
        if isinstance(tumor, Skip):
            continue
        side, where = generator.crop_size, []
        for start, length, n in zip(tumor.start, tumor.mask.shape, label.shape, strict=True):
            first = min(max(0, start + length // 2 - side // 2), n - side)
            where.append(slice(first, first + side))
        whole = torch.zeros(label.shape, dtype=torch.bool)
        whole[tumor.slices] = tumor.mask
        at = tuple(where)
        organ = label[at] == 1
        parts = ct.image[0][at], whole[at], organ
        found.append(tuple(part[None, None].to(device) for part in parts))
    return found


def scores_of(hu: Tensor, mask: Tensor, organ: Tensor) -> dict[str, float | None]:
    return measure(hu[0, 0].cpu(), mask[0, 0].cpu(), organ[0, 0].cpu(), (1.0, 1.0, 1.0))


def summary(rows: list[dict[str, float | None]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SCORES:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = spread(values) if values else None
    return found


def main() -> None:
    parser = arguments(__doc__, "steps", repeats=3)
    parser.add_argument("--generator", default="liver-early")
    parser.add_argument("--scan", nargs=2, type=Path, metavar=("CT", "LABEL"))
    parser.add_argument("--draws", type=int, default=12)
    args = parse(parser)
    generator = ts.load_generator(args.generator, args.device)
    low, high = generator.window
    ct = read_scan(*args.scan) if args.scan else ts.make_phantom(seed=0)
    cases = drawn(ct, args.device, args.draws, generator)
    own: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for steps in sorted(STEPS, key=lambda s: s != generator.sampler.timesteps):  # its own first
        other = with_steps(generator, steps)
        scores, away = [], []
        for seed, (hu, mask, organ) in enumerate(cases):
            crop = ((hu - low) / (high - low)).clamp(0, 1)
            made = hu + other.change(crop, mask, seed=seed) * (high - low)
            scores.append(scores_of(made, mask, organ))
            if len(own) < len(cases):
                own.append(made)
            away.append(float((made - own[seed])[mask].square().mean().sqrt()))
        crop, mask = crop_and_mask(generator.crop_size, device=args.device)

        def run(other: Generator = other, crop: Tensor = crop, mask: Tensor = mask) -> Tensor:
            return other.change(crop, mask, seed=0)

        rows.append(
            {
                "steps": steps,
                "change": spreads(times(run, args.device, args.repeats)),
                **summary(scores),
                "rms_hu_to_own": spread(away),
            }
        )
        print(rows[-1], flush=True)
    rows.sort(key=lambda row: row["steps"])
    results = {
        "generator": args.generator,
        "scan": args.scan[0].name if args.scan else "phantom",
        "trained_steps": generator.sampler.timesteps,
        "tumours": len(cases),
        "threads_used": args.threads,
        "healthy": summary([scores_of(*case) for case in cases]),
        "rows": rows,
    }
    write(args.output, results)

    ms, words = clock(args.device)

    def draw(axes: Any) -> None:
        x = [row["steps"] for row in rows]
        axes[0].plot(x, [row["change"][ms]["median"] for row in rows], "o-")
        axes[0].set(xscale="log", yscale="log", xlabel="steps", ylabel=f"ms of {words} a tumour")
        for name, unit in (("contrast_hu", "contrast, HU"), ("noise_ratio", "noise ratio")):
            index = 1 if name == "contrast_hu" else 2
            middle = [(row[name] or {"median": math.nan})["median"] for row in rows]
            bars = [
                [abs((row[name] or {}).get(q, math.nan) - m) for row, m in zip(rows, middle)]  # noqa: B905
                for q in ("q25", "q75")
            ]
            axes[index].errorbar(x, middle, yerr=bars, fmt="o-", capsize=3)
            axes[index].set(xscale="log", xlabel="steps", ylabel=unit)

    picture(args.output, draw, panels=3)


if __name__ == "__main__":
    main()
