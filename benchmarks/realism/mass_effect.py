"""What does the mass effect do to a scan, and what do it and real masks' shapes cost?

    python -m benchmarks.realism.mass_effect [--picture docs/pictures/mass_effect.png]

On the phantom's liver, hand-crafted tumours, one thread, CPU time. Per size: what the push alone
takes and what a call takes with and without it; the largest displacement; the least determinant of
the map's Jacobian (above 0: nothing folds); and the noise of displaced liver over that of the same
liver before, from second differences.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

import tumorsynth as ts
from benchmarks.common import spread, write
from tumorsynth.appearance.mass_effect import displacement, push_aside
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import TumorParams
from tumorsynth.placement.user_shapes import outline_of

SHARE = 0.5
SPACING = (1.0, 1.0, 2.0)


def synthesizer(size: float, share: float) -> ts.SynthesizeTumor:
    return ts.SynthesizeTumor(
        "hu2023", organ_labels=1, tumor_label=20, count=1, size_mm=size, mass_effect=share
    )


def milliseconds(work) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return 1e3 * (time.process_time() - start), result


def noise(values: torch.Tensor, where: torch.Tensor) -> float:
    second = values[:-2] - 2 * values[1:-1] + values[2:]
    fits = where[:-2] & where[1:-1] & where[2:]
    return 1.4826 / math.sqrt(6) * float(second[fits].abs().median())


def least_determinant(source: torch.Tensor) -> float:
    u = source.double().numpy()
    jacobian = np.stack([np.stack(np.gradient(part, *SPACING)) for part in u])
    return float(np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)) + np.eye(3)).min())


def measure(ct: ts.Phantom, size: float, draws: int) -> dict:
    rows: dict[str, list[float]] = {}
    pushing, plain = synthesizer(size, SHARE), synthesizer(size, 0)
    image, label = ct.image[0], ct.label[0]
    for seed in range(draws):
        cost, _ = milliseconds(lambda s=seed: plain(ct.image, ct.label, ct.spacing, seed=s))
        more, _ = milliseconds(lambda s=seed: pushing(ct.image, ct.label, ct.spacing, seed=s))
        (record,) = pushing.report
        if not record["applied"]:
            continue
        params = TumorParams.from_dict(pushing.params[0]["tumors"][0])
        alone, pushed = milliseconds(
            lambda p=params: push_aside(image, label, p, ct.spacing, (1,), 20, ts.HU())
        )
        _, source = displacement(params, image.shape, ct.spacing)
        where = pushed.region.slices
        moved = (label[where] == 1) & (pushed.image != image[where])
        found = {
            "push_ms": alone,
            "call_ms": cost,
            "call_with_push_ms": more,
            "largest_displacement_mm": pushed.largest_mm,
            "least_determinant": least_determinant(source),
            "noise_ratio": noise(pushed.image, moved) / noise(image[where], moved),
        }
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    return {"tumours": len(rows["push_ms"]), **{k: spread(v) for k, v in rows.items()}}


def shapes_cost(ct: ts.Phantom, draws: int) -> dict:
    """A 24 mm tumour placed with the prior's shape, with a mask's, and reading a mask."""
    x, y, z = torch.meshgrid(*[torch.arange(40.0) - 20] * 3, indexing="ij")
    mask = (x / 14) ** 2 + (y / 10) ** 2 + (z / 8) ** 2 < 1
    reading = [milliseconds(lambda: outline_of(mask, (1, 1, 1)))[0] for _ in range(draws)]
    outline = outline_of(mask, (1, 1, 1))
    region = OrganRegion.of_label(ct.label[0], 1)

    def placed(seed: int, outlines: list[str]) -> float:
        rng = torch.Generator().manual_seed(seed)
        settings = PlacementSettings(size_mm=24, outlines=outlines)
        return milliseconds(lambda: place(region, ct.spacing, settings, rng))[0]

    return {
        "read_a_mask_ms": spread(reading),
        "place_ms": spread([placed(k, []) for k in range(draws)]),
        "place_with_outline_ms": spread([placed(k, [outline]) for k in range(draws)]),
    }


def picture(ct: ts.Phantom, path: Path) -> None:
    """A tumour of 32 mm without and with the push, and what the push alone changed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, seed = 32.0, 7
    off, on = synthesizer(size, 0), synthesizer(size, SHARE)
    plain = off(ct.image, ct.label, ct.spacing, seed=seed)
    pushed = on(ct.image, ct.label, ct.spacing, seed=seed)
    x, y, z = on.report[0]["centre_voxel"]
    half = [round(45 / s) for s in ct.spacing]
    where = slice(max(0, x - half[0]), x + half[0]), slice(max(0, y - half[1]), y + half[1])
    fig, axes = plt.subplots(1, 4, figsize=(12, 3.3))
    shown = [
        ("scan", ct.image, ct.label),
        ("tumour in the place of tissue", *plain),
        (f"mass effect {SHARE}", *pushed),
    ]
    for axis, (title, image, label) in zip(axes, shown, strict=False):
        axis.imshow(image[0][where][..., z].T, cmap="gray", vmin=-100, vmax=220)
        for value, colour in ((1, "tab:cyan"), (20, "tab:red")):
            inside = (label[0][where][..., z] == value).T.float()
            if inside.any():
                axis.contour(inside, [0.5], colors=colour, linewidths=0.7)
        axis.set_title(title, fontsize=9)
    change = pushed[0] - plain[0]
    axes[3].imshow(change[0][where][..., z].T, cmap="gray", vmin=-100, vmax=100)
    axes[3].set_title("third less second", fontsize=9)
    for axis in axes:
        axis.axis("off")
    fig.tight_layout(pad=0.3)
    fig.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ct = ts.make_phantom(spacing=SPACING, seed=0)
    results: dict = {"share": SHARE, "spacing_mm": SPACING, "shape": list(ct.image.shape[1:])}
    for size in (24.0, 40.0):
        results[f"{size:g}_mm"] = measure(ct, size, args.draws)
        print(size, results[f"{size:g}_mm"], flush=True)
    results["shapes"] = shapes_cost(ct, args.draws)
    print(results["shapes"], flush=True)
    write("mass_effect", results)
    if args.picture:
        picture(ct, args.picture)


if __name__ == "__main__":
    main()
