"""Run the autoencoder's layers slab by slab on a CPU, and the last ones near the tumour only.

Intermediate tensors of a large decoder do not fit the processor's cache, and writing them to fresh
memory costs as much time as computing them. A slab of a few planes stays in the cache between two
convolutions, and only two tensors of each level are as large as the crop.

Results differ from those of the layers by rounding only: GroupNorm statistics cover the whole crop,
and each slab is convolved together with the planes next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.conv import (
    calls_onednn,
    channel_sums,
    cpu_autocast,
    cpu_layout,
    emulates_bfloat16,
)
from tumorsynth.models.layers import Conv, ResidualBlock, UpConv

MAX_SLAB_VALUES = 3 * 2**19  # of a layer's input or output; with all intermediates, 20 MB
MAX_CACHED_BYTES = 2**24  # smaller tensors stay in the cache and are faster whole

Near = tuple[slice, slice, slice]


def run_layers(layers: Iterable[nn.Module], x: Tensor, near: Near | None = None) -> Tensor:
    """Run layers of this package one after the other.

    Args:
        layers: `Conv`, `UpConv`, `ResidualBlock`, or sequences of them.
        x: (B, C, D, H, W).
        near: slices of the output's voxels to return; None returns all. If the layers end with a
            residual block and a convolution, the second half of that block and the convolution are
            computed there only. Earlier layers must be whole, as GroupNorm needs its whole input.

    Returns:
        The output, or its part ``near``.
    """
    flat = list(_flat(layers))
    tail = flat[-2:] if near is not None and _cropping_pays(flat, x, near) else []
    flat = flat[: len(flat) - len(tail)]
    dtype = cpu_autocast() or x.dtype
    inner = torch.float32 if emulates_bfloat16(x) else dtype
    if (
        calls_onednn(x)
        and inner in (torch.float32, torch.bfloat16)
        and _exceeds_cache(flat, x, inner)
    ):
        with torch.autocast("cpu", enabled=False):
            outputs = [_Slabs(volume, inner).run(flat, tail) for volume in x]
        x, half, sums = (_stack(parts) for parts in zip(*outputs, strict=True))
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
        return _run_tail(tail[0], tail[1], x, half, sums, near)  # type: ignore[arg-type]
    return x if near is None else x[..., near[0], near[1], near[2]]


def _run_tail(
    block: ResidualBlock, last: Conv, x: Tensor, half: Tensor, sums: Tensor, near: Near
) -> Tensor:
    """Return the last convolution's output near the tumour.

    Args:
        block: the last residual block.
        last: the convolution after it.
        x: the block's input.
        half: output of the block's first convolution.
        sums: `channel_sums` of ``half``, for each sample.
        near: slices of the voxels to return.
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
    return out[..., inner[0], inner[1], inner[2]]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """`torch.stack` that does not copy a single part."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _flat(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def _cropping_pays(layers: Sequence[nn.Module], x: Tensor, near: Near) -> bool:
    """Whether the layers end as `_run_tail` needs, and less than half of the output is needed."""
    if len(layers) < 2 or not isinstance(layers[-2], ResidualBlock):
        return False
    sides: Sequence[int] = x.shape[2:]
    for layer in layers:
        sides = _sides(layer, sides) if isinstance(layer, Conv | UpConv) else sides
    # on a GPU, launching the extra kernels costs more than a small tail
    if x.device.type != "cpu" and not _exceeds_cache(layers, x, x.dtype):
        return False
    needed = np.prod([n.stop - n.start for n in near])
    return isinstance(layers[-1], Conv) and bool(needed < np.prod(sides) / 2)


def _exceeds_cache(layers: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> bool:
    """Whether any layer's output is larger than a CPU's cache."""
    sides: Sequence[int] = x.shape[2:]
    most = 0
    for layer in layers:
        if isinstance(layer, Conv | UpConv):
            sides = _sides(layer, sides)
            channels = (layer.convt if isinstance(layer, UpConv) else layer.conv).out_channels
            most = max(most, channels * int(np.prod(sides)))
    return most * dtype.itemsize > MAX_CACHED_BYTES


def _sides(layer: Conv | UpConv, sides: Sequence[int]) -> Sequence[int]:
    """Return the sides of the layer's output for an input of these sides."""
    if isinstance(layer, UpConv):
        return [2 * n for n in sides]
    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    return [(n + 2 * layer.padding - kernel) // stride + 1 for n in sides]


class _Slabs:
    """One volume on its way through the layers; tensors inside are (D, H, W, C).

    Args:
        volume: (C, D, H, W).
        dtype: to compute in.
    """

    def __init__(self, volume: Tensor, dtype: torch.dtype) -> None:
        x = volume.permute(1, 2, 3, 0)
        self.scratch = _Scratch()
        self.x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.sums: Tensor | None = None  # of x, if the next layer needs them

    def run(
        self, layers: Sequence[nn.Module], tail: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layers, and the first half of the tail's residual block.

        Returns:
            Output of the layers, output of the half block, and the sums of that; the last two are
            empty without a tail.
        """
        spare = None  # a tensor of x's shape to reuse
        for layer, following in zip(layers, [*layers[1:], *tail[:1], None], strict=False):
            summed = isinstance(following, ResidualBlock)
            if isinstance(layer, ResidualBlock):
                half, sums = self._half(layer, spare)
                norm = layer.norm2.scale_and_shift(sums, self.x[..., 0].numel())
                self.x, self.sums = _convolve(
                    layer.conv2, half, self.scratch, norm, self.x, True, summed
                )
                spare = half
            else:
                assert isinstance(layer, Conv | UpConv)
                self.x, self.sums = _convolve(layer, self.x, self.scratch, summed=summed)
                spare = None
        if not tail:
            return self._channels_first(self.x), torch.empty(0), torch.empty(0)
        assert isinstance(tail[0], ResidualBlock)
        half, sums = self._half(tail[0], spare)
        return self._channels_first(self.x), self._channels_first(half), sums

    def _half(self, block: ResidualBlock, spare: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output of a block's first convolution, and its sums."""
        sums = channel_sums(self.x) if self.sums is None else self.sums
        norm = block.norm1.scale_and_shift(sums, self.x[..., 0].numel())
        half, sums = _convolve(block.conv1, self.x, self.scratch, norm, spare)
        return half, sums

    @staticmethod
    def _channels_first(x: Tensor) -> Tensor:
        return x.permute(3, 0, 1, 2)


def _convolve(
    layer: Conv | UpConv,
    x: Tensor,
    scratch: _Scratch,
    norm: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    add: bool = False,
    summed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run a convolution slab by slab.

    Args:
        layer: the convolution.
        x: (D, H, W, C).
        scratch: memory to reuse.
        norm: scale and shift of x's channels, applied with SiLU before the convolution; None
            convolves x as it is.
        out: where the output goes; None allocates it.
        add: whether to add to ``out`` instead of overwriting it.
        summed: whether to compute the sums.

    Returns:
        The output, and its `channel_sums` if ``summed``.
    """
    up = isinstance(layer, UpConv)
    conv = layer.convt if isinstance(layer, UpConv) else layer.conv
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    weight = conv.weight.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    if out is None:
        out = _allocate((*_sides(layer, x.shape[:3]), conv.out_channels), x.dtype)
    window = _Window(x, layer.padding, layer.replicate, norm, scratch)
    count = len(x) if up else len(out)
    plane = 2 * out[0].numel() if up else max(stride * x[0].numel(), out[0].numel())
    step = max(1, MAX_SLAB_VALUES // plane)
    sums = torch.zeros(2, conv.out_channels, dtype=torch.float64)
    for a in range(0, count, step):
        b = min(a + step, count)
        if up:
            slab = torch.conv_transpose3d(window[a, b + 2], weight, bias, 2, 3)
            part = out[2 * a : 2 * b]
        else:
            source = window[a * stride, (b - 1) * stride + kernel]
            slab = torch.mkldnn_convolution(
                source, weight, bias, (0, 0, 0), conv.stride, (1, 1, 1), 1
            )
            part = out[a:b]
        slab = slab[0].permute(1, 2, 3, 0)
        part = part.add_(slab) if add else part.copy_(slab)
        if summed:
            sums += channel_sums(part, scratch.tensor("sums", part.shape, torch.float32))
    return out, sums


class _Window:
    """Planes of a volume for a convolution, padded and, with ``norm``, normalised.

    ``window[a, b]`` returns planes a to b - 1, counted with the padding, as (1, C, b - a,
    H + 2 pad, W + 2 pad), channels last. Each call reuses the memory of the last.

    Args:
        x: (D, H, W, C).
        pad: voxels of padding on each side.
        replicate: whether to pad by replication instead of zeros.
        norm: scale and shift of x's channels, applied with SiLU; None applies nothing.
        scratch: memory to reuse.
    """

    def __init__(
        self,
        x: Tensor,
        pad: int,
        replicate: bool,
        norm: tuple[Tensor, Tensor] | None,
        scratch: _Scratch,
    ) -> None:
        self.x, self.pad, self.replicate, self.scratch = x, pad, replicate, scratch
        # repeated for a row of voxels, since operations on single voxels are too short
        self.rows = None if norm is None else [v.repeat(x.shape[2]) for v in norm]
        self.planes = torch.zeros(0)

    def __getitem__(self, ends: tuple[int, int]) -> Tensor:
        (first, last), pad, x = ends, self.pad, self.x
        depth, height, width, channels = x.shape
        if len(self.planes) < last - first:
            shape = (last - first, height + 2 * pad, width + 2 * pad, channels)
            self.planes = self.scratch.tensor("planes", shape, x.dtype).zero_()
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
        # in float32, which is faster than bfloat16 and rounds once
        wide = self.scratch.tensor("wide", x.shape, torch.float32).copy_(x)
        part.copy_(F.silu(torch.addcmul(shift, wide, scale, out=wide), inplace=True))


class _Scratch:
    """Memory that is kept for reuse, since the system clears large blocks after every release."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the memory of this name."""
        count = int(np.prod(shape)) * dtype.itemsize
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = _allocate((count,), torch.uint8)
        return self.kept[name][:count].view(dtype).view(*shape)


def _allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor. NumPy asks the system for large pages, which are faster."""
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.empty(count, np.uint8)).view(dtype).view(shape)
