"""The layers that the autoencoder's encoder and decoder are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.conv import Conv3d, ConvTranspose3d, GroupNorm, pad_replicate


class Conv(nn.Module):
    """3-D convolution, kernel k, stride s, padded to keep (or halve) the size.

    The published network pads by replication with (before, after) = (p // 2 + p % 2, p // 2),
    p = k - s: equal on both sides for all kernels used here.
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
    """Transposed convolution, kernel 4, stride 2: doubles the size.

    With replication the published network pads its input by one voxel and then crops k - 1; with
    zeros the usual padding of 1 gives the same size.
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
    """GroupNorm, SiLU, 3x3x3 convolution, twice, plus the input."""

    def __init__(self, width: int, groups: int, padding: str):
        super().__init__()
        self.norm1 = GroupNorm(groups, width, eps=1e-6)
        self.conv1 = Conv(width, width, 3, 1, padding)
        self.norm2 = GroupNorm(groups, width, eps=1e-6)
        self.conv2 = Conv(width, width, 3, 1, padding)

    def forward(self, x: Tensor) -> Tensor:
        # in place: at 96^3 it takes the system longer to find fresh memory than to compute
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(x)
