"""What makes convolutions fast on CPUs: the right kernel, memory layout and number format."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


@cache
def cpu_computes_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (as Linux lists it; elsewhere False).

    PyTorch runs bfloat16 on any processor, but where it is emulated it is slower than float32.
    """
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return not BFLOAT16_FLAGS.isdisjoint(flags.split()) and torch.backends.mkldnn.is_available()


def cpu_layout(x: Tensor) -> Tensor:
    """x (B, C, D, H, W) in the memory layout for the layers to come, which keep it.

    On a CPU: channels last in bfloat16 without gradients, where oneDNN's large convolutions are
    faster, else contiguous, whatever it was: in float32 PyTorch's GroupNorm sums channels-last
    input so plainly that a decoder of the published size is off by 2e-4, against 1e-6 (torch 2.13).
    """
    if x.device.type != "cpu":
        return x
    last = _cpu_autocast() and not torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


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
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        direct = (
            not torch.compiler.is_compiling()
            and input.dtype == weight.dtype == torch.float32
            and input.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not _cpu_autocast()
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        )
        if not direct or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


def _cpu_autocast() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled()
