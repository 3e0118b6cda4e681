"""The autoencoder's layers in turn: on a CPU by slabs, the last ones near the tumour alone.

A decoder of the published size makes some twenty tensors of a hundred megabytes for one crop. Going
to memory for them takes as long as computing what is in them, above all because the system hands
out memory that was never used in small pages. A slab of a few planes, and all that lies between two
convolutions of it, stays in the processor's cache; what is as large as the crop is two tensors a
level.

The numbers are those of the layers themselves to rounding: statistics of a GroupNorm are of the
whole crop, a slab is convolved with the planes next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.conv import (
    asks_onednn,
    channel_sums,
    cpu_autocast,
    cpu_layout,
    emulates_bfloat16,
)
from tumorsynth.models.layers import Conv, ResidualBlock, UpConv

SLAB = 3 * 2**19  # numbers of a layer's input or output that go together: with all between, 20 MB
LARGE = 2**24  # bytes of a tensor that a cache does not hold; smaller ones are faster as a whole

Near = tuple[slice, slice, slice]


def through(layers: Iterable[nn.Module], x: Tensor, near: Near | None = None) -> Tensor:
    """x (B, C, D, H, W) through layers of this package, one after the other.

    near: the voxels of the output that are wanted, and returned. Where the layers end with a
    residual block and a convolution, the second half of that block and the convolution are computed
    around them alone: that saves a fifth of a published decoder. All before has to be whole, as
    each GroupNorm needs all of its input.
    """
    flat = list(_flat(layers))
    tail = flat[-2:] if near is not None and _worth_it(flat, x, near) else []
    flat = flat[: len(flat) - len(tail)]
    dtype = cpu_autocast() or x.dtype
    inner = torch.float32 if emulates_bfloat16(x) else dtype
    if asks_onednn(x) and inner in (torch.float32, torch.bfloat16) and _large(flat, x, inner):
        with torch.autocast("cpu", enabled=False):
            run = [_Slabs(volume, inner).through(flat, tail) for volume in x]
        x, half, sums = (_batch(parts) for parts in zip(*run, strict=True))
        x, half = x.to(dtype), half.to(dtype)
    else:
        x = cpu_layout(x)
        for layer in flat:
            x = layer(x)
        if tail:
            half = tail[0].conv1(F.silu(tail[0].norm1(x)))  # type: ignore[operator, union-attr]
            sums = torch.stack([channel_sums(sample.movedim(0, -1)) for sample in half])
    if tail:
        assert near is not None
        return _end(tail[0], tail[1], x, half, sums, near)  # type: ignore[arg-type]
    return x if near is None else x[(..., *near)]


def _end(
    block: ResidualBlock, last: Conv, x: Tensor, half: Tensor, sums: Tensor, near: Near
) -> Tensor:
    """The last convolution's output near the tumour.

    x: the residual block's input. half: what its first convolution made of that, with these sums.
    """
    reach = block.conv2.padding + last.padding
    box = [slice(max(0, n.start - reach), n.stop + reach) for n in near]
    here = (..., box[0], box[1], box[2])
    voxels = half[0, 0].numel()
    pairs = [block.norm2.scale_and_shift(one, voxels) for one in sums]
    scale, shift = (torch.stack(v)[:, :, None, None, None] for v in zip(*pairs, strict=True))
    normed = F.silu(torch.addcmul(shift, half[here].float(), scale)).to(half.dtype)
    out = last(block.conv2(normed) + x[here])
    inner = [slice(n.start - b.start, n.stop - b.start) for n, b in zip(near, box, strict=True)]
    return out[(..., *inner)]


def _batch(parts: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, but one part is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _flat(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def _worth_it(layers: Sequence[nn.Module], x: Tensor, near: Near) -> bool:
    """Whether the layers have such an end, and what is wanted is less than half of it."""
    if len(layers) < 2 or not isinstance(layers[-2], ResidualBlock):
        return False
    sides: Sequence[int] = x.shape[2:]
    for layer in layers:
        sides = _sides(layer, sides) if isinstance(layer, Conv | UpConv) else sides
    # a GPU computes a small end sooner than it is told the thirty steps of the way around it
    if x.device.type != "cpu" and not _large(layers, x, x.dtype):
        return False
    wanted = np.prod([n.stop - n.start for n in near])
    return isinstance(layers[-1], Conv) and bool(wanted < np.prod(sides) / 2)


def _large(layers: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> bool:
    """Whether any layer makes more than a cache holds."""
    sides: Sequence[int] = x.shape[2:]
    most = 0
    for layer in layers:
        if isinstance(layer, Conv | UpConv):
            sides = _sides(layer, sides)
            channels = (layer.convt if isinstance(layer, UpConv) else layer.conv).out_channels
            most = max(most, channels * int(np.prod(sides)))
    return most * dtype.itemsize > LARGE


def _sides(layer: Conv | UpConv, sides: Sequence[int]) -> Sequence[int]:
    """Of what the layer makes of a volume with these."""
    if isinstance(layer, UpConv):
        return [2 * n for n in sides]
    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    return [(n + 2 * layer.padding - kernel) // stride + 1 for n in sides]


class _Slabs:
    """One volume (C, D, H, W) on its way; within, tensors are (D, H, W, C)."""

    def __init__(self, volume: Tensor, dtype: torch.dtype) -> None:
        x = volume.permute(1, 2, 3, 0)
        self.memory = _Memory()
        self.x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.sums: Tensor | None = None  # of x, where the next layer needs them

    def through(
        self, layers: Sequence[nn.Module], tail: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The volume after these layers; and the first half of the tail's block, with its sums."""
        spare = None  # a tensor like x, of an earlier block
        for layer, following in zip(layers, [*layers[1:], *tail[:1], None], strict=False):
            summed = isinstance(following, ResidualBlock)
            if isinstance(layer, ResidualBlock):
                half, sums = self._half(layer, spare)
                norm = layer.norm2.scale_and_shift(sums, self.x[..., 0].numel())
                self.x, self.sums = _convolved(
                    layer.conv2, half, self.memory, norm, self.x, True, summed
                )
                spare = half
            else:
                assert isinstance(layer, Conv | UpConv)
                self.x, self.sums = _convolved(layer, self.x, self.memory, summed=summed)
                spare = None
        if not tail:
            return self._back(self.x), torch.empty(0), torch.empty(0)
        assert isinstance(tail[0], ResidualBlock)
        half, sums = self._half(tail[0], spare)
        return self._back(self.x), self._back(half), sums

    def _half(self, block: ResidualBlock, spare: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a block's first convolution makes of x, and its sums."""
        sums = channel_sums(self.x) if self.sums is None else self.sums
        norm = block.norm1.scale_and_shift(sums, self.x[..., 0].numel())
        half, sums = _convolved(block.conv1, self.x, self.memory, norm, spare)
        return half, sums

    @staticmethod
    def _back(x: Tensor) -> Tensor:
        return x.permute(3, 0, 1, 2)


def _convolved(
    layer: Conv | UpConv,
    x: Tensor,
    memory: _Memory,
    norm: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    add: bool = False,
    summed: bool = True,
) -> tuple[Tensor, Tensor]:
    """The layer's output for x (D, H, W, C), and its `channel_sums` if ``summed``.

    norm: scale and shift of x's channels, before it is put through SiLU and convolved. out: where
    the output goes; with ``add`` it is added to what is there.
    """
    up = isinstance(layer, UpConv)
    conv = layer.convt if isinstance(layer, UpConv) else layer.conv
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    weight = conv.weight.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    if out is None:
        out = _fresh((*_sides(layer, x.shape[:3]), conv.out_channels), x.dtype)
    window = _Window(x, layer.padding, layer.replicate, norm, memory)
    count = len(x) if up else len(out)
    plane = 2 * out[0].numel() if up else max(stride * x[0].numel(), out[0].numel())
    step = max(1, SLAB // plane)
    sums = torch.zeros(2, conv.out_channels, dtype=torch.float64)
    for a in range(0, count, step):
        b = min(a + step, count)
        if up:
            made = torch.conv_transpose3d(window[a, b + 2], weight, bias, 2, 3)
            part = out[2 * a : 2 * b]
        else:
            source = window[a * stride, (b - 1) * stride + kernel]
            made = torch.mkldnn_convolution(
                source, weight, bias, (0, 0, 0), conv.stride, (1, 1, 1), 1
            )
            part = out[a:b]
        made = made[0].permute(1, 2, 3, 0)
        part = part.add_(made) if add else part.copy_(made)
        if summed:
            sums += channel_sums(part, memory.of("sums", part.shape, torch.float32))
    return out, sums


class _Window:
    """Planes of x (D, H, W, C) for a convolution: padded, and normalised where asked.

    [a, b] gives planes a to b - 1, counted with the padding, as (1, C, b - a, H + 2 pad,
    W + 2 pad), channels last. It is the same memory every time.
    """

    def __init__(
        self,
        x: Tensor,
        pad: int,
        replicate: bool,
        norm: tuple[Tensor, Tensor] | None,
        memory: _Memory,
    ) -> None:
        self.x, self.pad, self.replicate, self.memory = x, pad, replicate, memory
        # for a row of voxels at once: one vector operation each would be too short
        self.rows = None if norm is None else [v.repeat(x.shape[2]) for v in norm]
        self.planes = torch.zeros(0)

    def __getitem__(self, ends: tuple[int, int]) -> Tensor:
        (first, last), pad, x = ends, self.pad, self.x
        depth, height, width, channels = x.shape
        if len(self.planes) < last - first:
            shape = (last - first, height + 2 * pad, width + 2 * pad, channels)
            self.planes = self.memory.of("planes", shape, x.dtype).zero_()
        planes = self.planes[: last - first]
        a, b = max(first - pad, 0), min(last - pad, depth)
        before, after = a - (first - pad), (last - pad) - b
        inner = planes[before : len(planes) - after]
        self._fill(inner[:, pad : pad + height, pad : pad + width], x[a:b])
        if self.replicate:
            for axis, side in ((2, width), (1, height)):
                for at, edge in ((0, pad), (pad + side, pad + side - 1)):
                    inner.narrow(axis, at, pad).copy_(inner.narrow(axis, edge, 1))
            planes[:before], planes[len(planes) - after :] = inner[:1], inner[-1:]
        else:
            planes[:before], planes[len(planes) - after :] = 0, 0
        return planes.permute(3, 0, 1, 2)[None]

    def _fill(self, part: Tensor, x: Tensor) -> None:
        if self.rows is None:
            part.copy_(x)
            return
        scale, shift = self.rows
        x, part = x.flatten(2), part.flatten(2)
        if x.dtype == torch.float32:
            F.silu(torch.addcmul(shift, x, scale, out=part), inplace=True)
            return
        # faster than in bfloat16, and rounded once
        wide = self.memory.of("wide", x.shape, torch.float32).copy_(x)
        part.copy_(F.silu(torch.addcmul(shift, wide, scale, out=wide), inplace=True))


class _Memory:
    """Scratch that is used again and again: what is freed after each use comes back from the system
    as if new, if it is some MB."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the memory of this name, with whatever is in it."""
        count = int(np.prod(shape)) * dtype.itemsize
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = _fresh((count,), torch.uint8)
        return self.kept[name][:count].view(dtype).view(*shape)


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that was not used before. NumPy asks the system for large pages, torch does not: a
    hundred megabytes in small ones take a third as long as the convolution that fills them."""
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.empty(count, np.uint8)).view(dtype).view(shape)
