"""Attention of the factorised U-Net: along depth, within slices, and the positions for depth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tumorsynth.models.conv import Linear, cpu_autocast

CHUNK_BYTES = 2**21  # of q, k and v of the sequences that a CPU computes at once
MAX_BMM_TOKENS = 48  # longer sequences use PyTorch's fused attention on a CPU
ROTARY_BASE = 10000.0  # Su et al. 2021, section 3.2.2


class Rotary(nn.Module):
    """Rotary position embedding over neighbouring channel pairs (Su et al. 2021, eq. 34).

    Args:
        dim: channels to rotate.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = [ROTARY_BASE ** (-i / dim) for i in range(0, dim, 2)]
        self.register_buffer("frequencies", torch.tensor(frequencies))

    def table(self, length: int) -> Tensor:
        """Return cosine and sine of the angles at all positions, (length, dim / 2, 2)."""
        positions = torch.arange(length, device=self.frequencies.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies.float()
        if torch.compiler.is_dynamo_compiling():  # torch.compile does not support complex numbers
            return torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first channels of x (..., length, channels) by a `Rotary.table`."""
    rotated, rest = x.split([2 * len(table[0]), x.shape[-1] - 2 * len(table[0])], dim=-1)
    pairs = rotated.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_dynamo_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    rotated = pairs.flatten(-2).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


class RelativePositionBias(nn.Module):
    """Learned bias for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    Args:
        buckets: number of buckets, for keys before and after the query together.
        heads: of the attention.
        max_distance: in slices; larger distances share a bucket.
    """

    def __init__(self, buckets: int, heads: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.embedding = nn.Embedding(buckets, heads)

    def buckets(self, length: int, device: torch.device) -> Tensor:
        """Return (length, length): the bucket of key j seen from query i.

        Half of the buckets are for keys up to the query, half for keys after it. In each half, the
        first half of the buckets hold one distance each, and the others grow logarithmically.
        """
        per_side = self.embedding.num_embeddings // 2
        exact = per_side // 2
        position = torch.arange(length, device=device)
        offset = position[None, :] - position[:, None]
        distance = offset.abs()
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (per_side - exact)).long()).clamp(max=per_side - 1)
        return torch.where(distance < exact, distance, far) + per_side * (offset > 0)

    def forward(self, length: int) -> Tensor:
        """Return (1, heads, length, length), to be added to the attention logits."""
        bias = self.embedding(self.buckets(length, self.embedding.weight.device))
        return rearrange(bias, "i j heads -> 1 heads i j").contiguous()


def attend_in_chunks(attend: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """Return attend(x) for independent sequences; on a CPU, chunk by chunk.

    Intermediate results of a chunk stay in the CPU's cache; those of the whole would need fresh
    memory from the system every time.

    Args:
        attend: the attention, (N, n, dim) -> (N, n, dim).
        x: (N, n, dim), N sequences.
        width: numbers that ``attend`` holds for a token.
    """
    chunk = max(1, CHUNK_BYTES // (x.shape[1] * width * (cpu_autocast() or x.dtype).itemsize))
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(x) <= chunk:
        return attend(x)
    return torch.cat([attend(part) for part in x.split(chunk)])


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax in at least float32, as under CUDA's autocast; bfloat16 is slower on a CPU."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim, dtype=wide).to(logits.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute softmax attention, of short sequences on a CPU by plain matrix products.

    PyTorch's fused attention is made for long sequences and slower on short ones.

    Args:
        q: (B, heads, n, channels).
        k: same shape.
        v: same shape.
        bias: added to the logits; None adds nothing.

    Returns:
        Same shape as ``q``.
    """
    heads, n, channels = q.shape[-3:]
    if q.device.type != "cpu" or torch.is_grad_enabled() or n > MAX_BMM_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (part.reshape(-1, n, channels) for part in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (-1, heads)).mul_(channels**-0.5)
    if bias is not None:
        logits += bias
    return torch.bmm(softmax(logits, -1).flatten(0, 1), v).unflatten(0, (-1, heads))


class Attention(nn.Module):
    """Softmax attention over layer-normalised tokens (N, n, dim); returns the residual.

    Args:
        dim: channels of a token.
        heads: number of heads.
        head_dim: channels of a head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=False)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        width = self.to_qkv.out_features
        return attend_in_chunks(lambda part: self._attend(part, bias, table), x, width)

    def _attend(self, x: Tensor, bias: Tensor | None, table: Tensor | None) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (qkv h c) -> qkv b h n c", qkv=3, h=self.heads
        )
        if table is not None:
            # The published model scales q before the rotation. A rotation is linear, so scaling
            # inside the attention gives the same logits.
            q, k = rotate(q, table), rotate(k, table)
        out = softmax_attention(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.to_out(rearrange(out, "b h n c -> b n (h c)"))


class DepthAttention(Attention):
    """Attention along depth, separately for each (h, w): (B, dim, d, h, w) -> same shape."""

    def forward(self, x: Tensor, bias: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        b, _, _, h, w = x.shape
        out = super().forward(rearrange(x, "b c d h w -> (b h w) d c"), bias, table)
        return x + rearrange(out, "(b h w) d c -> b c d h w", b=b, h=h, w=w)


class SpatialAttention(Attention):
    """Attention within each slice, without positions: (B, dim, d, h, w) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, _, _, h, w = x.shape
        out = super().forward(rearrange(x, "b c d h w -> (b d) (h w) c"))
        return x + rearrange(out, "(b d) (h w) c -> b c d h w", b=b, h=h, w=w)


class SpatialLinearAttention(nn.Module):
    """Linear attention within each slice (Shen et al. 2021, eq. 3).

    q is normalised over channels and k over positions, so that k^T v is a small matrix for each
    head and the cost is linear in h w.

    Args:
        dim: channels of a token.
        heads: number of heads.
        head_dim: channels of a head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.scale = head_dim**-0.5
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=False)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, h, w = x.shape
        tokens = rearrange(x, "b c d h w -> (b d) (h w) c")
        out = attend_in_chunks(self._attend, tokens, self.to_qkv.out_features)
        return x + rearrange(out, "(b d) (h w) c -> b c d h w", b=b, h=h, w=w)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (qkv h c) -> qkv b h n c", qkv=3, h=self.heads
        )
        context = softmax(k, -2).transpose(-1, -2) @ v
        out = softmax(q, -1) @ (self.scale * context)
        return self.to_out(rearrange(out, "b h n c -> b n (h c)"))
