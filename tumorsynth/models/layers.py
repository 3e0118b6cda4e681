"""Layers of the autoencoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.conv import Conv3d, ConvTranspose3d, GroupNorm, pad_replicate


class Conv(nn.Module):
    """3-D convolution that keeps the size with stride 1 and halves it with stride 2.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel; ``kernel - stride`` is even.
        stride: 1 or 2.
        padding: "replicate" or "zeros".
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: str):
        super().__init__()
        self.padding = (kernel - stride) // 2
        self.replicate = padding == "replicate" and self.padding > 0
        self.conv = Conv3d(
            inputs, outputs, kernel, stride, padding=0 if self.replicate else self.padding
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.replicate:
            x = pad_replicate(x, self.padding)
        return self.conv(x)


class UpConv(nn.Module):
    """Transposed convolution with kernel 4 and stride 2, which doubles the size.

    With replication the input is padded by one voxel and the output cropped by three, as in the
    published network.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        padding: "replicate" or "zeros".
    """

    def __init__(self, inputs: int, outputs: int, padding: str):
        super().__init__()
        self.padding = 1
        self.replicate = padding == "replicate"
        self.convt = ConvTranspose3d(inputs, outputs, 4, 2, padding=3 if self.replicate else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.replicate:
            x = pad_replicate(x, 1)
        return self.convt(x)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3x3 convolution, twice, plus the input.

    Args:
        width: channels.
        groups: groups of the GroupNorms.
        padding: "replicate" or "zeros".
    """

    def __init__(self, width: int, groups: int, padding: str):
        super().__init__()
        self.norm1 = GroupNorm(groups, width, eps=1e-6)
        self.conv1 = Conv(width, width, 3, 1, padding)
        self.norm2 = GroupNorm(groups, width, eps=1e-6)
        self.conv2 = Conv(width, width, 3, 1, padding)

    def forward(self, x: Tensor) -> Tensor:
        # in place: on large crops, fresh memory costs more time than the computation
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(x)
