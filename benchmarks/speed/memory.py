"""How much memory does a call hold beyond its input?

    python -m benchmarks.speed.memory [--device cuda]

A scan of 512 x 512 x 400 with 10 tumours (goal on a CPU: 1.5 times its float32 size, of which 1.25
are the image and the label that come back), and a patch of 96^3 with one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import tumorsynth as ts
from benchmarks.common import arguments, parse, picture, write
from tumorsynth.commands.timing import patch_and_label, peak_mib


def scan(device: torch.device, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of organ in air, voxels of 0.8 x 0.8 x 1 mm."""
    image = torch.full((1, *shape), -1000.0, device=device)
    label = torch.zeros((1, *shape), dtype=torch.uint8, device=device)
    organ = (0, slice(120, 360), slice(150, 360), slice(150, 330))
    image[organ], label[organ] = 110.0, 1
    return image, label


def main() -> None:
    args = parse(arguments(__doc__, "memory"))
    rows: list[dict[str, Any]] = []
    for name in ("hu2023", "liver-early"):
        for what, count in (("patch of 96^3", 1), ("scan of 512 x 512 x 400", 10)):
            if what.startswith("patch"):
                (image, label), where = patch_and_label(96, device=args.device), 1.0
            else:
                (image, label), where = scan(args.device, (512, 512, 400)), (0.8, 0.8, 1.0)
            synth = ts.SynthesizeTumor(name, count=count, size_mm=(8, 20))
            synth(image[..., :320, :320, :320], label[..., :320, :320, :320], spacing=where, seed=1)
            peak = peak_mib(partial(synth, image, label, spacing=where, seed=0), args.device)
            size = image.numel() * 4 / 2**20
            rows.append(
                {
                    "generator": name,
                    "what": what,
                    "tumours": sum(record["applied"] for record in synth.report),
                    "image_mib": round(size, 1),
                    "peak_mib": peak,
                    "peak_by_image": None if peak is None else round(peak / size, 2),
                }
            )
            print(rows[-1], flush=True)
    write(args.output, {"threads_used": args.threads, "rows": rows})

    def draw(axes: Any) -> None:
        for name in ("hu2023", "liver-early"):
            mine = [row for row in rows if row["generator"] == name]
            axes.plot(
                [r["image_mib"] for r in mine], [r["peak_mib"] or 0 for r in mine], "o-", label=name
            )
        axes.plot([0, 400], [0, 600], "k:", label="1.5 times the image")
        axes.set(xlabel="image, MiB", ylabel="peak beyond it, MiB")
        axes.legend()

    picture(args.output, draw)


if __name__ == "__main__":
    main()
