"""What makes a call longer: the volume, the number of tumours, the patch?

    python -m benchmarks.speed.scaling [--generator hu2023 liver-early] [--device cuda]

The volumes are phantoms of 2 mm and parts of them; the calls are of one seed each. Time should grow
with the tumours, and with the volume by the copy and the look at the label alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import tumorsynth as ts
from benchmarks.common import arguments, clock, parse, picture, spreads, write
from tumorsynth.commands.timing import patch_and_label, times
from tumorsynth.phantom import LABELS

VOLUMES = ((96, 96, 64), (160, 130, 80), (256, 256, 160), (512, 512, 200))
COUNTS = (1, 2, 4, 8, 16)
SIDES = (64, 96, 128, 160)


def main() -> None:
    parser = arguments(__doc__, "scaling", repeats=3)
    parser.add_argument("--generator", nargs="+", default=["hu2023", "liver-early"])
    args = parse(parser)
    liver = LABELS["liver"]
    big = ts.make_phantom((2.0, 2.0, 2.0), (160, 130, 80), seed=0)
    rows: dict[str, list[dict[str, Any]]] = {"volume": [], "tumours": [], "patch": []}

    def add(kind: str, name: str, x: Any, count: int, image: Any, label: Any, **where: Any) -> None:
        organ = 1 if kind == "patch" else liver
        synth = ts.SynthesizeTumor(name, organ, 99, count=count, size_mm=10.0)
        run = partial(synth, image, label, seed=0, **where)
        row = {
            "generator": name,
            kind: x,
            **spreads(times(run, args.device, args.repeats)),
        }
        row["made"] = sum(record["applied"] for record in synth.report)
        rows[kind].append(row)
        print(row, flush=True)

    for name in args.generator:
        for shape in VOLUMES:  # the phantom in a larger, empty field of view, or a part of it
            part = tuple(
                slice(0, min(a, b)) for a, b in zip(shape, big.image.shape[1:], strict=True)
            )
            image = torch.full((1, *shape), -1000.0)
            label = torch.zeros((1, *shape), dtype=torch.uint8)
            image[(0, *part)], label[(0, *part)] = big.image[(0, *part)], big.label[(0, *part)]
            image, label = image.to(args.device), label.to(args.device)
            voxels = shape[0] * shape[1] * shape[2] / 1e6
            add("volume", name, round(voxels, 2), 1, image, label, spacing=2.0)
        image, label = big.image.to(args.device), big.label.to(args.device)
        for count in COUNTS:
            add("tumours", name, count, count, image, label, spacing=2.0)
        for side in SIDES:
            add("patch", name, side, 1, *patch_and_label(side, device=args.device), spacing=1.0)
    write(args.output, {"threads_used": args.threads, **rows})

    ms, words = clock(args.device)

    def draw(axes: Any) -> None:
        titles = {"volume": "million voxels", "tumours": "tumours asked for", "patch": "patch side"}
        for panel, (kind, title) in zip(axes, titles.items(), strict=True):
            for name in args.generator:
                mine = [row for row in rows[kind] if row["generator"] == name]
                y = [row[ms]["median"] for row in mine]
                panel.plot([row[kind] for row in mine], y, "o-", label=name)
            panel.set(xlabel=title, ylabel=f"ms of {words} a call", ylim=0)
        axes[0].legend()

    picture(args.output, draw, panels=3)


if __name__ == "__main__":
    main()
