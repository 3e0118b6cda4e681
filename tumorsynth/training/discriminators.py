"""The adversaries of stage 1 (paper 3.1): patch discriminators of slices and of volumes."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Map (B, 1, H, W) or (B, 1, D, H, W) to logits per patch and the features of every layer.

    ``layers`` convolutions of kernel 4 and stride 2, one of kernel 3 and stride 1, then the logits.
    GroupNorm shares no statistics within a batch, so that the logits of a sample do not depend on
    the rest of the batch or on the number of processes. The first layer has no norm, because it
    has to see the strength of the noise.

    Args:
        dims: 2 for slices, 3 for volumes.
        width: channels of the first layer, doubled at each up to 8 * width.
        layers: convolutions of stride 2.

    Raises:
        ValueError: for other dims, or fewer than one channel or layer.
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

    On a CPU they run in float32: with torch 2.13 the gradients of bfloat16 convolutions are NaN for
    layers of 2^3 voxels and one channel.
    """

    def __init__(self, width: int):
        super().__init__()
        self.slices = PatchDiscriminator(2, width)
        self.volumes = PatchDiscriminator(3, width)

    def forward(self, slices: Tensor, volumes: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        on_cpu = volumes.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            return [self.slices(slices.float()), self.volumes(volumes.float())]


def random_slices(
    *volumes: Tensor, count: int = 1, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Take the same random slices of the three planes from each of the volumes.

    Args:
        volumes: (B, 1, S, S, S), all of one shape, such as a scan and its reconstruction.
        count: slices of each plane and sample.
        generator: source of the slice numbers, by default the global random state. They are sampled
            on the CPU: the same for every device.

    Returns:
        For each volume (3 * count * B, 1, S, S), sorted by plane, then draw, then sample.

    Raises:
        ValueError: for volumes that are no cubes or differ in shape.
    """
    shape = volumes[0].shape
    if len(shape) != 5 or len(set(shape[2:])) != 1 or any(v.shape != shape for v in volumes):
        raise ValueError(
            "slices must come from cubes (B, 1, S, S, S) of one shape, got "
            f"{', '.join(str(tuple(v.shape)) for v in volumes)}"
        )
    batch, side = shape[0], shape[2]
    numbers = torch.randint(side, (3, count, batch), generator=generator).to(volumes[0].device)
    samples = torch.arange(batch, device=numbers.device)

    def take(volume: Tensor) -> Tensor:
        slices = []
        for axis, draws in zip((2, 3, 4), numbers, strict=True):
            plane = volume.movedim(axis, 1)  # (B, S, 1, S, S)
            slices += [plane[samples, draw] for draw in draws]
        return torch.cat(slices)

    return [take(volume) for volume in volumes]
