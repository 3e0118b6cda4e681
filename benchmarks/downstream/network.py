"""The U-Net that every arm trains: plain PyTorch, one logit of tumour a voxel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(channels_in: int, channels: int) -> nn.Sequential:
    """Two convolutions, with instance normalisation."""
    layers: list[nn.Module] = []
    for k in range(2):
        layers += [
            nn.Conv3d(channels if k else channels_in, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels, channels),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net whose first level has half the resolution in the plane.

    Each voxel of that level predicts four of the image. Sides must be multiples of 16, 16 and 8.

    Args:
        channels: of the first level; they double with each of the four levels.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        widths = [channels * 2**k for k in range(4)]
        self.stem = nn.Conv3d(1, channels, (4, 4, 3), stride=(2, 2, 1), padding=1, bias=False)
        self.down = nn.ModuleList(
            block(widths[max(0, k - 1)], width) for k, width in enumerate(widths)
        )
        self.pool = nn.MaxPool3d(2)
        self.grow = nn.ModuleList(
            nn.ConvTranspose3d(widths[k + 1], widths[k], 2, stride=2) for k in range(3)
        )
        self.up = nn.ModuleList(block(2 * widths[k], widths[k]) for k in range(3))
        self.last = nn.ConvTranspose3d(channels, 1, (2, 2, 1), stride=(2, 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, 1, X, Y, Z) of an image (B, 1, X, Y, Z) in [-1, 1]."""
        x, skipped = self.stem(image), []
        for k, down in enumerate(self.down):
            x = down(self.pool(x) if k else x)
            skipped.append(x)
        for k in reversed(range(3)):
            x = self.up[k](torch.cat([self.grow[k](x), skipped[k]], 1))
        logits: Tensor = self.last(x)
        return logits
