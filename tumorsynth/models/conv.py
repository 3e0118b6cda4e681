"""What makes networks fast on CPUs: the right kernel, memory layout and number format."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.kernels import (
    cpu_computes_bfloat16,
    onednn_convolves,
    onednn_has_linear,
    uses_onednn,
)


def cpu_layout(x: Tensor) -> Tensor:
    """x (B, C, D, H, W) in the memory layout for the layers to come, which keep it.

    Channels last on a CPU without gradients, where oneDNN's convolutions are twice as fast; with
    them contiguous, whatever it was; elsewhere as it is.
    """
    if x.device.type != "cpu":
        return x
    last = asks_onednn(x)
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, with the same parameters and the same numbers to rounding.

    PyTorch's own sums float32 input with channels last so plainly on a CPU that a decoder of the
    published size is off by 2e-4, against 1e-6 (torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        last = input.ndim == 5 and input.is_contiguous(memory_format=torch.channels_last_3d)
        if not (last and _float32(input, self.weight) and asks_onednn(input)):
            return super().forward(input)
        out = torch.empty_like(input)
        for x, into in zip(input, out, strict=True):
            x, into = x.movedim(0, -1), into.movedim(0, -1)
            scale, shift = self.scale_and_shift(channel_sums(x), x[..., 0].numel())
            torch.addcmul(shift, x, scale, out=into)
        return out

    def scale_and_shift(self, sums: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel that are this layer, for a sample of these sums."""
        size = self.num_channels // self.num_groups
        mean, square = sums.unflatten(1, (-1, size)).sum(2) / (voxels * size)
        rstd = ((square - mean.square()).clamp(min=0) + self.eps).rsqrt()
        scale = self.weight * rstd.repeat_interleave(size)
        return scale.float(), (self.bias - mean.repeat_interleave(size) * scale).float()


def channel_sums(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Sum and sum of squares of each channel of x (D, H, W, C): (2, C), float64.

    Squares are summed about the mean of a part, or a channel far from 0 would lose its digits.
    scratch: float32 memory of x's shape, which saves making some.
    """
    few = len(x) if x.device.type != "cpu" else max(1, 2**20 // max(1, x[0].numel()))
    sums = torch.zeros(2, x.shape[-1], dtype=torch.float64, device=x.device)
    if scratch is None:
        shape = x[:few].shape  # not another tensor as large as x
        scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
    for part in x.split(few):
        wide, count = scratch[: len(part)], part[..., 0].numel()
        if part.dtype != torch.float32:
            part = wide.copy_(part)
        total = part.sum((0, 1, 2))
        about = torch.sub(part, total / count, out=wide).square_().sum((0, 1, 2)).double()
        total = total.double()
        sums += torch.stack([total, about + total.square() / count])
    return sums


def pad_replicate(x: Tensor, by: int) -> Tensor:
    """x (B, C, D, H, W) with its faces repeated ``by`` times on each side, in x's number format.

    The same as `F.pad`, which autocast on a CPU runs in float32 and which loses channels last:
    that took more of a bfloat16 decode than its convolutions did.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.pad(x, (by,) * 6, mode="replicate")
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    layout = torch.channels_last_3d if last else torch.contiguous_format
    sides = [side + 2 * by for side in x.shape[2:]]
    out = torch.empty(*x.shape[:2], *sides, dtype=x.dtype, memory_format=layout)
    inner = slice(by, -by)
    out[:, :, inner, inner, inner] = x
    for axis, side in zip((4, 3, 2), sides[::-1], strict=True):  # edges and corners come last
        out.narrow(axis, 0, by).copy_(out.narrow(axis, by, 1))
        out.narrow(axis, side - by, by).copy_(out.narrow(axis, side - by - 1, 1))
    return out


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`, with the same parameters and the same numbers to rounding.

    On one thread PyTorch gives small float32 convolutions to slow_conv3d, which unfolds the input
    first and takes up to eight times as long as oneDNN. Without gradients oneDNN is asked directly.
    Where the CPU emulates bfloat16, the layer computes in float32 and rounds once.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if emulates_bfloat16(input):
            return in_float32(self._conv_forward, input, weight, bias)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        if not _float32(input, weight) or not asks_onednn(input):
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`; in float32, rounded once, where the CPU emulates bfloat16."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None and emulates_bfloat16(input):
            return in_float32(self._plain, input, self.weight, self.bias)
        return super().forward(input, output_size)

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose3d(
            input,
            weight,
            bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.output_padding,  # type: ignore[arg-type]
            self.groups,
            self.dilation,  # type: ignore[arg-type]
        )


class Linear(nn.Linear):
    """`torch.nn.Linear`, with the same parameters, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` (..., inputs) -> (..., outputs), by oneDNN where it can.

    PyTorch gives float32 matrix products to MKL, which on processors not of Intel's keeps to
    narrower vectors: oneDNN takes half the time there.
    """
    if emulates_bfloat16(x):
        return in_float32(linear, x, weight, bias)
    if not (_float32(x, weight) and asks_onednn(x) and onednn_has_linear()):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def asks_onednn(x: Tensor) -> bool:
    """Whether layers ask oneDNN directly, past PyTorch's choice: on a CPU, without gradients."""
    return bool(
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and uses_onednn()
        and onednn_convolves()
    )


def emulates_bfloat16(x: Tensor) -> bool:
    """Whether a layer would compute x in bfloat16 on a CPU whose libraries only emulate it.

    x is in bfloat16, or the caller's autocast would round it.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    return (cpu_autocast() or x.dtype) == torch.bfloat16 and not cpu_computes_bfloat16()


def in_float32(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Call ``function`` in float32 on the CPU and round its result to bfloat16."""
    with torch.autocast("cpu", enabled=False):
        return function(*(t if t is None else t.float() for t in tensors)).bfloat16()


def _float32(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.float32 and not cpu_autocast()


def cpu_autocast() -> torch.dtype | None:
    """The format that autocast computes in on the CPU; None where it is off."""
    try:
        on = torch.is_autocast_enabled("cpu")
        return torch.get_autocast_dtype("cpu") if on else None
    except TypeError:  # before torch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
