"""How fast is the fused search of the codes, and with which blocks?

    python benchmarks/search.py [--device cuda]

The published codebook, 16,384 codes of 8 channels, for the latents of one and of eight crops of
96^3: the kernel with several blocks, and the search by tables of distances. On a CPU the latter
alone, for a smaller latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, parse, spreads, write

from tumorsynth.measure import peak_mib, times
from tumorsynth.models.codebook import Codebook

# voxels, codes, warps
BLOCKS = ((16, 64, 4), (16, 32, 4), (32, 32, 4), (32, 64, 4), (32, 64, 8), (64, 32, 4))


def main() -> None:
    args = parse(arguments(__doc__, "search", repeats=20))
    device, rows = args.device, []
    rng = torch.Generator().manual_seed(0)
    book = Codebook(16384, 8).to(device)
    book.embeddings.copy_(torch.randn(16384, 8, generator=rng))
    for batch in (1, 8) if device.type == "cuda" else (1,):
        side = 24 if device.type == "cuda" else 8
        latent = torch.randn(batch, 8, side, side, side, generator=rng).to(device)
        ways: dict[str, Callable[[], Any]] = {
            f"tables of {tokens} voxels": partial(book.nearest, latent, tokens_per_chunk=tokens)
            for tokens in ((4096, 16384) if device.type == "cuda" else (32,))
        }
        if device.type == "cuda":
            from tumorsynth.models.nearest_triton import nearest

            for blocks in BLOCKS:
                ways[f"blocks {blocks}"] = partial(nearest, latent, book.embeddings, *blocks)
        for name, run in ways.items():
            found = spreads(times(run, device, args.repeats))
            row = {"way": name, "batch": batch, "latent": list(latent.shape[2:]), **found}
            rows.append({**row, "peak_mib": peak_mib(run, device)})
            print(rows[-1], flush=True)
            write(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
