"""Layers that choose the fastest kernel, memory layout and number format on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.devices import asks_for_full_float32, cudnn_flags_without_tf32
from tumorsynth.models.kernels import (
    cpu_computes_bfloat16,
    onednn_convolves,
    onednn_has_linear,
    uses_onednn,
)


def cpu_layout(x: Tensor) -> Tensor:
    """Return x (B, C, D, H, W) in the memory layout that suits the following layers.

    On a CPU that is channels last without gradients, for oneDNN, and contiguous with gradients.
    Elsewhere x is returned as it is.
    """
    if x.device.type != "cpu":
        return x
    last = calls_onednn(x)
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with the same parameters, and more exact sums on a CPU.

    For channels last, PyTorch sums float32 naively, which costs large decoders visible accuracy.
    """

    def forward(self, input: Tensor) -> Tensor:
        last = input.ndim == 5 and input.is_contiguous(memory_format=torch.channels_last_3d)
        if not (last and _are_float32(input, self.weight) and calls_onednn(input)):
            return super().forward(input)
        out = torch.empty_like(input)
        for x, into in zip(input, out, strict=True):
            x, into = x.movedim(0, -1), into.movedim(0, -1)
            scale, shift = self.scale_and_shift(channel_sums(x), x[..., 0].numel())
            torch.addcmul(shift, x, scale, out=into)
        return out

    def scale_and_shift(self, sums: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
        """Return the scale and shift of each channel that this layer amounts to.

        Args:
            sums: `channel_sums` of one sample.
            voxels: of that sample.

        Returns:
            Two float32 tensors (C,).
        """
        size = self.num_channels // self.num_groups
        mean, square = sums.unflatten(1, (-1, size)).sum(2) / (voxels * size)
        rstd = ((square - mean.square()).clamp(min=0) + self.eps).rsqrt()
        scale = self.weight * rstd.repeat_interleave(size)
        return scale.float(), (self.bias - mean.repeat_interleave(size) * scale).float()


def channel_sums(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Return sum and sum of squares of each channel.

    Squares are summed about the mean of a chunk, so that channels far from 0 keep their digits.

    Args:
        x: (D, H, W, C).
        scratch: float32 memory of x's shape; None allocates some.

    Returns:
        (2, C), float64.
    """
    planes = len(x) if x.device.type != "cpu" else max(1, 2**20 // max(1, x[0].numel()))
    sums = torch.zeros(2, x.shape[-1], dtype=torch.float64, device=x.device)
    if scratch is None:
        shape = x[:planes].shape  # of a chunk, to save memory
        scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
    for part in x.split(planes):
        wide, count = scratch[: len(part)], part[..., 0].numel()
        if part.dtype != torch.float32:
            part = wide.copy_(part)
        total = part.sum((0, 1, 2))
        centred = torch.sub(part, total / count, out=wide).square_().sum((0, 1, 2)).double()
        total = total.double()
        sums += torch.stack([total, centred + total.square() / count])
    return sums


def pad_replicate(x: Tensor, by: int) -> Tensor:
    """Pad x (B, C, D, H, W) by repeating its faces, keeping its dtype and memory layout.

    `F.pad` gives the same values, but on a CPU it loses channels last, and autocast runs it in
    float32.

    Args:
        x: the volume.
        by: voxels to add on each side.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return F.pad(x, (by,) * 6, mode="replicate")
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    layout = torch.channels_last_3d if last else torch.contiguous_format
    sides = [side + 2 * by for side in x.shape[2:]]
    out = torch.empty(*x.shape[:2], *sides, dtype=x.dtype, memory_format=layout)
    inner = slice(by, -by)
    out[:, :, inner, inner, inner] = x
    for axis, side in zip(
        (4, 3, 2), sides[::-1], strict=True
    ):  # the last axis also fills edges and corners
        out.narrow(axis, 0, by).copy_(out.narrow(axis, by, 1))
        out.narrow(axis, side - by, by).copy_(out.narrow(axis, side - by - 1, 1))
    return out


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` with the same parameters, faster on a CPU.

    On one thread PyTorch runs small float32 convolutions in a slow kernel; without gradients this
    layer calls oneDNN instead. Where the CPU only emulates bfloat16, the layer computes in float32
    and rounds once.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if emulates_bfloat16(input):
            return in_float32(self._conv_forward, input, weight, bias)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        if _avoids_tf32(input):
            return _convolve_without_tf32(self, input, weight, bias, (0, 0, 0))
        if not _are_float32(input, weight) or not calls_onednn(input):
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, in float32 where the CPU only emulates bfloat16."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None and emulates_bfloat16(input):
            return in_float32(self._plain, input, self.weight, self.bias)
        if output_size is None and _avoids_tf32(input):
            padding = self.output_padding
            return _convolve_without_tf32(self, input, self.weight, self.bias, padding)
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
    """`torch.nn.Linear` with the same parameters, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear` by oneDNN where possible.

    PyTorch uses MKL for float32 matrix products, which is slower on processors of other makers than
    Intel.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,); None adds nothing.

    Returns:
        (..., outputs).
    """
    if emulates_bfloat16(x):
        return in_float32(linear, x, weight, bias)
    if not (_are_float32(x, weight) and calls_onednn(x) and onednn_has_linear()):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def calls_onednn(x: Tensor) -> bool:
    """Whether layers call oneDNN directly for x: on a CPU, without gradients."""
    return bool(
        not torch.compiler.is_dynamo_compiling()
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and uses_onednn()
        and onednn_convolves()
    )


def emulates_bfloat16(x: Tensor) -> bool:
    """Whether a layer would compute x in bfloat16 on a CPU that only emulates it.

    That is so if x is in bfloat16, or if the caller's autocast would round it.
    """
    if torch.compiler.is_dynamo_compiling() or x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    return (cpu_autocast() or x.dtype) == torch.bfloat16 and not cpu_computes_bfloat16()


def in_float32(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Call ``function`` in float32 on the CPU and round its result to bfloat16."""
    with torch.autocast("cpu", enabled=False):
        return function(*(t if t is None else t.float() for t in tensors)).bfloat16()


def _avoids_tf32(x: Tensor) -> bool:
    """Whether a convolution of x must ask for full float32 by itself."""
    return (
        x.device.type != "cpu"
        and not torch.compiler.is_dynamo_compiling()
        and asks_for_full_float32()
    )


def _convolve_without_tf32(
    layer: nn.Conv3d | nn.ConvTranspose3d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: Sequence[int],
) -> Tensor:
    """Call a layer's convolution as PyTorch does, with TF32 off for this call alone."""
    assert not isinstance(layer.padding, str)
    return torch._convolution(
        x,
        weight,
        bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.transposed,
        output_padding,
        layer.groups,
        *cudnn_flags_without_tf32(),
    )


def _are_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer computes in float32: both tensors are, and autocast is off."""
    return x.dtype == weight.dtype == torch.float32 and not cpu_autocast()


def cpu_autocast() -> torch.dtype | None:
    """Return the dtype of the CPU's autocast; None if it is off."""
    try:
        on = torch.is_autocast_enabled("cpu")
        return torch.get_autocast_dtype("cpu") if on else None
    except TypeError:  # before torch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
