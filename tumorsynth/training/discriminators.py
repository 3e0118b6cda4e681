"""The adversaries of stage 1 (paper 3.1): patch discriminators of slices and of volumes."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(B, 1, H, W) or (B, 1, D, H, W) -> logits per patch, and the features of every layer.

    ``layers`` convolutions (kernel 4, stride 2: ``width`` channels, doubled at each up to 8 width),
    then one with kernel 3 and stride 1, then the logits. GroupNorm (none in the first layer, which
    has to see how strong the noise is): no statistics are shared in a batch, so a sample's logits
    do not depend on its batch-mates, on the batch size or on the number of processes, and nothing
    but the weights has to be saved.
    """

    def __init__(self, dims: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"dims must be 2 (slices) or 3 (volumes), got {dims}")
        if width < 1 or layers < 1:
            raise ValueError(f"width and layers must be at least 1, got {width} and {layers}")
        self.dims, self.factor = dims, 2**layers
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.layers = nn.ModuleList()
        inputs = 1
        for k in range(layers + 1):
            outputs = width * min(2**k, 8)
            kernel, stride = (4, 2) if k < layers else (3, 1)
            norm = [nn.GroupNorm(math.gcd(8, outputs), outputs)] if k else []
            self.layers.append(
                nn.Sequential(
                    conv(inputs, outputs, kernel, stride, padding=1), *norm, nn.LeakyReLU(0.2)
                )
            )
            inputs = outputs
        self.head = conv(inputs, 1, 3, 1, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if x.ndim != self.dims + 2 or x.shape[1] != 1 or min(x.shape[2:]) < self.factor:
            raise ValueError(
                f"a {self.dims}-D discriminator takes (B, 1{', side' * self.dims}) with sides of "
                f"at least {self.factor}, got {tuple(x.shape)}; use larger patches or fewer layers"
            )
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.head(x), features


class Adversaries(nn.Module):
    """The two discriminators: of slices (b, 1, S, S) and of volumes (b, 1, S, S, S).

    In float32 on a CPU: the gradient of its bfloat16 convolutions is NaN for layers of 2^3 voxels
    and one channel (seen with torch 2.13).
    """

    def __init__(self, width: int):
        super().__init__()
        self.slices = PatchDiscriminator(2, width)
        self.volumes = PatchDiscriminator(3, width)

    def forward(self, slices: Tensor, volumes: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        plain = volumes.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if plain else nullcontext():
            return [self.slices(slices.float()), self.volumes(volumes.float())]


def random_slices(
    *volumes: Tensor, count: int = 1, generator: torch.Generator | None = None
) -> list[Tensor]:
    """The same ``count`` random slices of each of the three planes from each of the volumes.

    volumes: (B, 1, S, S, S), all of one shape: a scan and its reconstruction. Each gives
    (3 count B, 1, S, S), sorted by plane, then draw, then sample; every sample has slices of its
    own. The places are drawn on the CPU (from ``generator``, else the global random state): the
    same on every device.
    """
    shape = volumes[0].shape
    if len(shape) != 5 or len(set(shape[2:])) != 1 or any(v.shape != shape for v in volumes):
        raise ValueError(
            "slices are drawn from cubes (B, 1, S, S, S) of one shape, got "
            f"{', '.join(str(tuple(v.shape)) for v in volumes)}"
        )
    batch, side = shape[0], shape[2]
    where = torch.randint(side, (3, count, batch), generator=generator).to(volumes[0].device)
    every = torch.arange(batch, device=where.device)

    def drawn(volume: Tensor) -> Tensor:
        slices = []
        for axis, draws in zip((2, 3, 4), where, strict=True):
            plane = volume.movedim(axis, 1)  # (B, S, 1, S, S)
            slices += [plane[every, draw] for draw in draws]
        return torch.cat(slices)

    return [drawn(volume) for volume in volumes]
