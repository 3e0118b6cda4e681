"""Grids of grey tiles with captions, written as PNG without a plotting library.

The tiles are parts of the scans trained or measured on: the terms of the scans apply to them too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.training.captions import GLYPH_HEIGHT, render_text, text_width

TILE_GAP = 2  # pixels between tiles, before magnification
GROUP_GAP = 3 * TILE_GAP  # pixels between groups of tiles
MAGNIFICATION = 2  # of pictures.png
STEP_TILE_PIXELS = 160  # side to which tiles of sample pictures are magnified, about
MAX_CAPTION_SCALE = 2
LINE_MARGIN = 2  # pixels above and below a line of captions
CAPTION_HEIGHT = GLYPH_HEIGHT + 2 * LINE_MARGIN

Group = list[Tensor]  # tiles (h, w) in [0, 1] that belong together, such as one plane's
GroupCaption = tuple[str, Sequence[str]]  # title of a group ("" for none), caption of each tile
Pair = tuple[Tensor, Tensor, Sequence[int]]  # two cubes and the voxel to show them at


def write_grid(path: Path, rows: list[list[Group]], captions: Sequence[GroupCaption] = ()) -> None:
    """Write rows of groups of tiles as a grey PNG.

    Args:
        path: the PNG to write.
        rows: for each row its groups of tiles (h, w) in [0, 1].
        captions: a title and a caption for each tile, for every group of a full row.
    """
    write_png(path, (mosaic(rows, MAGNIFICATION, captions) * 255).round().byte())


def mosaic(
    rows: list[list[Group]], magnification: int, captions: Sequence[GroupCaption] = ()
) -> Tensor:
    """Join rows of groups of tiles into one picture, columns aligned.

    Args:
        rows: for each row its groups of tiles (h, w) in [0, 1].
        magnification: whole factor of the tiles' size; captions are not magnified.
        captions: as in `write_grid`; without them the picture has no caption lines.

    Returns:
        (H, W) in [0, 1].
    """
    columns = _columns(_column_widths(rows, magnification, captions))
    picture = torch.cat([_row_strip(row, columns) for row in rows])
    picture = picture.repeat_interleave(magnification, 0).repeat_interleave(magnification, 1)
    if not captions:
        return picture
    return torch.cat([_caption_band(captions, columns, magnification, picture.shape[1]), picture])


def _column_widths(
    rows: list[list[Group]], magnification: int, captions: Sequence[GroupCaption]
) -> list[list[int]]:
    """Width of each column before magnification: of its widest tile or its caption."""
    widths = [[0] * len(group) for group in max(rows, key=len)]
    for row in rows:
        for g, group in enumerate(row):
            for t, tile in enumerate(group):
                widths[g][t] = max(widths[g][t], tile.shape[1])
    for g, (_, tile_captions) in enumerate(captions):
        for t, caption in enumerate(tile_captions):
            widths[g][t] = max(widths[g][t], -(-text_width(caption) // magnification))
    return widths


def _columns(widths: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Left and right edge of each column, in groups, before magnification."""
    columns, left = [], 0
    for group in widths:
        edges = []
        for width in group:
            edges.append((left, left + width))
            left += width + TILE_GAP
        left += GROUP_GAP - TILE_GAP
        columns.append(edges)
    return columns


def _row_strip(row: list[Group], columns: list[list[tuple[int, int]]]) -> Tensor:
    height = max(tile.shape[0] for group in row for tile in group) + TILE_GAP
    strip = torch.zeros(height, columns[-1][-1][1] + GROUP_GAP)
    for group, edges in zip(row, columns, strict=False):
        for tile, (left, _) in zip(group, edges, strict=True):
            strip[: tile.shape[0], left : left + tile.shape[1]] = tile.float().cpu()
    return strip


def _caption_band(
    captions: Sequence[GroupCaption],
    columns: list[list[tuple[int, int]]],
    magnification: int,
    width: int,
) -> Tensor:
    """(H, width): a line of the groups' titles, where there are any, and one of tile captions."""
    titles = [
        (title, edges[0][0], edges[-1][1])
        for (title, _), edges in zip(captions, columns, strict=True)
        if title
    ]
    tiles = [
        (caption, left, right)
        for (_, group), edges in zip(captions, columns, strict=True)
        for caption, (left, right) in zip(group, edges, strict=True)
    ]
    texts = [*titles, *tiles]
    fitting = min((right - left) * magnification // text_width(t) for t, left, right in texts)
    scale = max(1, min(MAX_CAPTION_SCALE, fitting))
    lines = []
    for texts in filter(None, (titles, tiles)):
        line = torch.zeros(CAPTION_HEIGHT * scale, width)
        top = LINE_MARGIN * scale
        for text, left, _ in texts:
            pixels = render_text(text, scale)[:, : width - left * magnification]
            start = left * magnification
            line[top : top + pixels.shape[0], start : start + pixels.shape[1]] = pixels
        lines.append(line)
    return torch.cat(lines)


def side_by_side(pairs: list[Pair], captions: tuple[str, str]) -> Tensor:
    """Draw a row for each pair of cubes: three slices of both through a voxel.

    Args:
        pairs: two cubes (S, S, S) in [0, 1] each, and the voxel. Small cubes are magnified to
            about 160 pixels.
        captions: what the first and the second cube of each pair are.

    Returns:
        (H, W) in [0, 1].
    """
    rows = [
        [list(tiles) for tiles in zip(slices_through(a, at), slices_through(b, at), strict=True)]
        for a, b, at in pairs
    ]
    magnification = max(1, STEP_TILE_PIXELS // pairs[0][0].shape[0])
    return mosaic(rows, magnification, [("", captions)] * 3)


def slices_through(cube: Tensor, at: Sequence[int]) -> list[Tensor]:
    """Return the three slices of a cube (S, S, S) through a voxel."""
    return [cube[at[0]], cube[:, at[1]], cube[:, :, at[2]]]


def middle_voxel(mask: Tensor) -> list[int]:
    """Return the voxel of a mask (X, Y, Z) nearest to its centre of mass."""
    voxels = mask.nonzero()
    squared = (voxels - voxels.float().mean(0)).square().sum(1)
    return voxels[int(squared.argmin())].tolist()


def anatomical_slices(volume: Tensor, at: Sequence[int] | None = None) -> list[Tensor]:
    """Return the axial, coronal and sagittal slice of a volume in radiological display.

    The patient's right is on the left and anterior is up; in the sagittal slice anterior is left.

    Args:
        volume: (X, Y, Z) in RAS.
        at: voxel to cut through, by default the middle.
    """
    x, y, z = at or [n // 2 for n in volume.shape]
    return [p.flip(0, 1).T for p in (volume[:, :, z], volume[:, y], volume[x])]


PLANES = ("axial", "coronal", "sagittal")  # in the order of `anatomical_slices`


def shown(hu: Tensor, low: float, high: float) -> Tensor:
    """Map HU to grey: black at ``low``, white at ``high``."""
    return ((hu - low) / (high - low)).clamp(0, 1)


def outlined(picture: Tensor, mask: Tensor) -> Tensor:
    """Return the picture (H, W) with the pixels just around a mask in white."""
    grown = F.max_pool2d(mask.float()[None], 3, stride=1, padding=1)[0] > 0
    return torch.where(grown & ~mask, 1.0, picture)


def write_png(path: Path, pixels: Tensor) -> None:
    """Write a grey picture (H, W) uint8 with the standard library alone."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
