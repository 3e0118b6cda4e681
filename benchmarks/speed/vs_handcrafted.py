"""What does a hand-crafted tumour cost: "hu2023" beside the original's code, which it reimplements?

    python -m benchmarks.speed.vs_handcrafted [--original DIR] [--device cuda]

DIR is the reader's own checkout of github.com/MrGiovanni/SyntheticTumors (Hu et al., CVPR 2023),
whose ``SynthesisTumor`` is called as it is, on the CPU, where alone it runs. Two things are changed
while it runs: packages that only its masks need are replaced by empty ones where they are not
installed, and ``get_fixed_geo`` returns the masks that ours has drawn, so that ours draws them
within the time measured and the original does not. Its ten textures of 420 x 300 x 320 are made
before (apart, one is timed). Without DIR ours is timed alone.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

import tumorsynth as ts
from benchmarks.common import arguments, parse, picture, spreads, write
from tumorsynth.commands.timing import peak_mib, times
from tumorsynth.phantom import LABELS

COUNTS = (1, 3, 10)


def load(checkout: Path) -> Any:
    for name in ("cv2", "elasticdeform"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    sys.path.insert(0, str(checkout))
    return importlib.import_module("TumorGenerated.utils")


def main() -> None:
    parser = arguments(__doc__, "vs_handcrafted", repeats=3)
    parser.add_argument("--original", type=Path, metavar="DIR")
    args = parse(parser)
    ct = ts.make_phantom(shape=(220, 200, 140), seed=0)
    organ = (ct.label == LABELS["liver"]).to(torch.uint8)
    image, label = ct.image.to(args.device), organ.to(args.device)
    results: dict[str, Any] = {"shape": list(image.shape), "threads_used": args.threads}
    theirs, texture = None, None
    if args.original:
        theirs = load(args.original)
        start = time.process_time()
        texture = theirs.get_predefined_texture((420, 300, 320), 6, 4)
        results["one_of_ten_textures"] = {
            "cpu_seconds": round(time.process_time() - start, 1),
            "mib": round(texture.nbytes / 2**20, 1),
        }
    rows = []
    for count in COUNTS:
        synth = ts.SynthesizeTumor("hu2023", count=count, size_mm=(8, 20))

        def ours(synth: ts.SynthesizeTumor = synth) -> Any:
            return synth(image, label, spacing=1.0, seed=0)

        row: dict[str, Any] = {
            "tumours": count,
            "ours": spreads(times(ours, args.device, args.repeats)),
        }
        row["ours"]["peak_mib"] = peak_mib(ours, args.device)
        if theirs is not None:
            mask = (ours()[1] == 2)[0].cpu().numpy()
            volume, liver = ct.image[0].numpy(), organ[0].numpy().astype(np.int64)

            def original(mask: Any = mask, volume: Any = volume, liver: Any = liver) -> Any:
                inner = theirs.get_fixed_geo
                box = [np.where(liver.any(axis=a))[0][[0, -1]] for a in ((1, 2), (0, 2), (0, 1))]
                cut = tuple(
                    slice(max(0, a + 1), min(n, b - 1))
                    for (a, b), n in zip(box, liver.shape, strict=True)
                )
                theirs.get_fixed_geo = lambda *_: mask[cut]
                try:
                    return theirs.SynthesisTumor(volume.copy(), liver.copy(), "small", texture)
                finally:
                    theirs.get_fixed_geo = inner

            cpu = torch.device("cpu")
            row["original"] = spreads(times(original, cpu, args.repeats))
            row["original"]["peak_mib"] = peak_mib(original, cpu)
        rows.append(row)
        print(row, flush=True)
    results["rows"] = rows
    write(args.output, results)

    def draw(axes: Any) -> None:
        for who in ("ours", "original"):
            if who in rows[0]:
                y = [r[who]["cpu_ms"]["median"] for r in rows]
                axes.plot(COUNTS, y, "o-", label=who)
        axes.set(xlabel="tumours in a call", ylabel="ms of CPU time", ylim=0)
        axes.legend()

    picture(args.output, draw)


if __name__ == "__main__":
    main()
