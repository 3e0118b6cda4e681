"""Nearest-code search on a GPU as one Triton kernel, without storing all distances.

Each program holds some latent voxels and loops over the codes. `Codebook.nearest` imports this
module only if triton is installed and the latent is on CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_VOXELS, BLOCK_CODES, WARPS = 16, 64, 4  # largest without spilled registers on sm_90


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    latent,  # (B, channels, voxels), float32
    codes,  # (channels, size), float32: neighbouring codes lie side by side
    half_norm,  # (size,), float32
    nearest,  # (B, voxels), int64, written
    voxels,
    size,
    channels: tl.constexpr,
    block_voxels: tl.constexpr,
    block_codes: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    mine = tl.program_id(0) * block_voxels + tl.arange(0, block_voxels)
    here = mine < voxels
    lane = tl.arange(0, block_codes)
    of_sample = latent + sample * channels * voxels
    # Each lane keeps its best of the codes lane, lane + block_codes, ...; this saves a reduction in
    # the loop. Only a smaller value replaces it, so the lowest index wins among equals.
    best = tl.full((block_voxels, block_codes), float("inf"), tl.float32)
    index = tl.zeros((block_voxels, block_codes), tl.int32) + lane[None, :]
    for first in range(0, size, block_codes):
        column = first + lane
        there = column < size
        value = tl.zeros((block_voxels, block_codes), tl.float32)
        value += tl.load(half_norm + column, mask=there, other=float("inf"))[None, :]
        for channel in tl.static_range(channels):  # in float32: tl.dot would round to TF32
            z = tl.load(of_sample + channel * voxels + mine, mask=here, other=0.0)
            e = tl.load(codes + channel * size + column, mask=there, other=0.0)
            value -= z[:, None] * e[None, :]
        closer = value < best
        best = tl.where(closer, value, best)
        index = tl.where(closer, column[None, :], index)
    least = tl.min(best, axis=1)
    found = tl.min(tl.where(best == least[:, None], index, 2147483647), axis=1)
    # nothing equals NaN: take the first code, as argmin does
    found = tl.where(found < size, found, 0)
    tl.store(nearest + sample * voxels + mine, found.to(tl.int64), mask=here)


def nearest(
    latent: Tensor,
    embeddings: Tensor,
    block_voxels: int = BLOCK_VOXELS,
    block_codes: int = BLOCK_CODES,
    warps: int = WARPS,
    half_norm: Tensor | None = None,
) -> Tensor:
    """Find the nearest code of every latent voxel, in float32.

    Args:
        latent: (B, channels, d, h, w), on CUDA.
        embeddings: (size, channels), the codes.
        block_voxels: latent voxels of a program, a power of two.
        block_codes: codes in one step of the loop, a power of two.
        warps: of a program.
        half_norm: (size,), half of the codes' squared lengths; None computes them.

    Returns:
        Index of the code, (B, d, h, w) int64; the lowest of equally near ones.
    """
    batch, channels, *sides = latent.shape
    flat = latent.to(torch.float32).flatten(2).contiguous()
    embeddings = embeddings.to(torch.float32)
    if half_norm is None:
        half_norm = embeddings.square().sum(1) / 2
    codes = embeddings.T.contiguous()
    found = torch.empty(batch, flat.shape[2], dtype=torch.int64, device=latent.device)
    if found.numel():
        _search[(triton.cdiv(flat.shape[2], block_voxels), batch)](
            flat,
            codes,
            half_norm,
            found,
            flat.shape[2],
            len(embeddings),
            channels=channels,
            block_voxels=block_voxels,
            block_codes=block_codes,
            num_warps=warps,
            enable_fp_fusion=True,  # fused multiply-add: faster, and rounded once
        )
    return found.view(batch, *sides)
