"""Grids of grey tiles, three planes of a crop side by side, written without a plotting library.

The tiles are parts of the scans trained or measured on: the scans' terms hold for them too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 2  # pixels between tiles, and three times as many between groups of them
MAGNIFIED = 2
Pair = tuple[Tensor, Tensor, Sequence[int]]  # two cubes and the voxel to show them at


def planes(cube: Tensor, at: Sequence[int]) -> list[Tensor]:
    """The three slices of a cube (S, S, S) through a voxel."""
    return [cube[at[0]], cube[:, at[1]], cube[:, :, at[2]]]


def middle_of(mask: Tensor) -> list[int]:
    """The voxel of a mask (X, Y, Z) that is nearest to its centre of mass."""
    voxels = mask.nonzero()
    off = (voxels - voxels.float().mean(0)).square().sum(1)
    return voxels[int(off.argmin())].tolist()


def grid(path: Path, rows: list[list[list[Tensor]]]) -> None:
    """Write rows of groups of tiles (H, W) in [0, 1], grey, as PNG."""
    write_png(path, (mosaic(rows, MAGNIFIED) * 255).round().byte())


def mosaic(rows: list[list[list[Tensor]]], magnified: int) -> Tensor:
    """(H, W): rows of groups of tiles (h, w), with gaps between them, each pixel so many wide."""
    pictures = []
    for row in rows:
        height = max(tile.shape[0] for group in row for tile in group)
        tiles = [
            F.pad(tile.float().cpu(), (0, 3 * GAP if last else GAP, 0, height - len(tile) + GAP))
            for group in row
            for last, tile in zip([False] * (len(group) - 1) + [True], group, strict=True)
        ]
        pictures.append(torch.cat(tiles, 1))
    width = max(picture.shape[1] for picture in pictures)
    whole = torch.cat([F.pad(p, (0, width - p.shape[1])) for p in pictures])
    return whole.repeat_interleave(magnified, 0).repeat_interleave(magnified, 1)


def side_by_side(pairs: list[Pair]) -> Tensor:
    """(H, W): a row for each pair of cubes (S, S, S) in [0, 1], three slices of both through a
    voxel; small cubes are magnified to about 160 pixels."""
    rows = [
        [list(tiles) for tiles in zip(planes(one, at), planes(other, at), strict=True)]
        for one, other, at in pairs
    ]
    return mosaic(rows, max(1, 160 // pairs[0][0].shape[0]))


def sections(volume: Tensor, at: Sequence[int] | None = None) -> list[Tensor]:
    """Axial, coronal and sagittal slice of (X, Y, Z) RAS through a voxel, by default the middle,
    as radiologists have them: the patient's right on the left, anterior up (left in the sagittal
    one)."""
    x, y, z = at or [n // 2 for n in volume.shape]
    return [p.flip(0, 1).T for p in (volume[:, :, z], volume[:, y], volume[x])]


def shown(hu: Tensor, low: float, high: float) -> Tensor:
    """HU as grey: black at low, white at high."""
    return ((hu - low) / (high - low)).clamp(0, 1)


def outlined(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture (H, W) with the pixels just around a mask in white."""
    grown = F.max_pool2d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    return torch.where(grown & ~mask, 1.0, picture)


def write_png(path: Path, pixels: Tensor) -> None:
    """A grey picture (H, W) uint8, with the standard library alone."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
