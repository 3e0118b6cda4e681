"""Sheets of lesions, to be looked at: each group by itself, and real and synthetic ones mixed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.realism.lesions import Lesion

WINDOWS = {"wide": (-175.0, 250.0), "liver": (40.0, 180.0)}
TILE, ZOOM = 56, 3  # mm, pixels per mm


def plane(lesion: Lesion, window: tuple[float, float], axis: int, outline: bool) -> np.ndarray:
    """(pixels, pixels, 3) uint8: one plane through a lesion's middle, 56 mm; axis 2 is axial."""
    from PIL import Image

    middle = [int(round(float(c))) for c in np.argwhere(lesion.tumor).mean(0)]
    half = TILE // 2
    padded = np.pad(lesion.hu, half, mode="constant", constant_values=-1000.0)
    mask = np.pad(lesion.tumor, half)
    cut = tuple(slice(m, m + 2 * half) if a != axis else m + half for a, m in enumerate(middle))
    low, high = window
    grey = (np.clip((padded[cut] - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    size = (ZOOM * TILE, ZOOM * TILE)

    def turned(a: np.ndarray) -> np.ndarray:  # the patient's right at the left, front or head up
        return a[::-1, ::-1].T

    picture = np.asarray(Image.fromarray(turned(grey)).resize(size, Image.Resampling.BICUBIC))
    picture = np.repeat(picture[..., None], 3, axis=-1).copy()
    if outline:
        large = np.kron(turned(mask[cut]), np.ones((ZOOM, ZOOM))).astype(bool)
        picture[large & ~ndimage.binary_erosion(large)] = (255, 210, 60)
    picture[-1:] = picture[:, -1:] = 0  # a thin line between tiles
    return picture


def sheet(tiles: list[np.ndarray], columns: int, path: Path) -> None:
    from PIL import Image

    empty = np.zeros_like(tiles[0])
    tiles = tiles + [empty] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[k : k + columns], 1) for k in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def sheets(groups: dict[str, list[Lesion]], folder: Path, seed: int) -> None:
    """Sheets of every group, axial, in two windows, with and without outlines, and in three planes;
    and "mixed": real and synthetic ones shuffled, the answer in mixed.json."""
    for name, lesions in groups.items():
        for window, (low, high) in WINDOWS.items():
            for outline in (False, True):
                tiles = [plane(each, (low, high), 2, outline) for each in lesions]
                sheet(tiles, 8, folder / f"{name}_{window}{'_outline' * outline}.png")
        some = [
            plane(each, WINDOWS["liver"], axis, False)
            for each in lesions[:12]
            for axis in (2, 1, 0)
        ]
        sheet(some, 6, folder / f"{name}_planes.png")
    rng = np.random.default_rng(seed)
    made = [name for name in groups if name not in ("real", "sham")]
    mixed = [("real", each) for each in groups["real"]]
    for name in made:
        picked = rng.permutation(len(groups[name]))[: max(1, 25 // len(made))]
        mixed += [(name, groups[name][k]) for k in picked]
    mixed = [mixed[k] for k in rng.permutation(len(mixed))]
    sheet([plane(each, WINDOWS["liver"], 2, False) for _, each in mixed], 8, folder / "mixed.png")
    (folder / "mixed.json").write_text(json.dumps([name for name, _ in mixed], indent=2) + "\n")
