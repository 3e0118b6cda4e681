"""How fast is the fused search of the codes, and with which blocks?

    python benchmarks/gpu/search.py [--device cuda]
    python benchmarks/gpu/search.py --compile-for 90    # registers on sm_90; needs triton, no GPU

The published codebook, 16,384 codes of 8 channels, for the latents of one and of eight crops of
96^3: the kernel with several blocks, and the search by tables of distances. On a CPU the latter
alone, for a smaller latent.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from benchmarks.common import arguments, parse, spreads, write
from tumorsynth.commands.timing import peak_mib, times
from tumorsynth.models.codebook import Codebook

# voxels, codes, warps
BLOCKS = ((16, 64, 4), (16, 32, 4), (32, 32, 4), (32, 64, 4), (32, 64, 8), (64, 32, 4))


def compiled_for(capability: int) -> list[dict[str, Any]]:
    """What triton makes of the kernel for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tumorsynth.models import nearest_triton

    tensors = {"latent": "*fp32", "codes": "*fp32", "half_norm": "*fp32", "nearest": "*i64"}
    numbers = {"voxels": "i32", "size": "i32"}
    reader, rows = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", []
    for voxels, codes, warps in BLOCKS:
        fixed = {"channels": 8, "block_voxels": voxels, "block_codes": codes}
        source = ASTSource(
            fn=nearest_triton._search,
            signature={**tensors, **numbers, **dict.fromkeys(fixed, "constexpr")},
            constexprs=fixed,
            attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)},
        )
        options = {"num_warps": warps, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            told = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True)
        usage = {key: int(number) for key, number in re.findall(r"(REG|STACK):(\d+)", told.stdout)}
        ptx = made.asm["ptx"]
        rows.append(
            {
                "blocks": [voxels, codes, warps],
                "registers": usage["REG"],
                "spilled_bytes": usage["STACK"],
                "multiply_adds": ptx.count("fma.rn.f32"),
                "tf32": "tf32" in ptx,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__, "search", repeats=20)
    parser.add_argument("--compile-for", type=int, metavar="CAPABILITY")
    args = parse(parser)
    if args.compile_for is not None:
        write(f"search_sm{args.compile_for}", {"rows": compiled_for(args.compile_for)})
        return
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
