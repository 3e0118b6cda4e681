"""Make the pictures of docs/follow-up.md, into docs/pictures: a growth series, and two phases.

    python examples/pictures/follow_up.py [-o FOLDER]

Everything is shown on the made-up phantom. Its arterial phase is the phantom with a darker liver.
Look at every picture before keeping it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import tumorsynth as ts

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the backend)
from PIL import Image  # noqa: E402

TUMOR, LIVER, SEED = 20, 1, 2
PAPER, INK, OUTLINE = "#101010", "#d8d8d8", "#ffd23f"
FACTORS = (0.7, 1.0, 1.3, 1.7)
ARTERIAL_HU = -35.0  # the liver's, against the portal phase
ZOOM_MM = 80.0


def cut(volume: torch.Tensor, centre: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Return the axial slice (1, X, Y, Z) through a voxel, as a radiologist sees it."""
    x, y, z = centre
    half = [round(ZOOM_MM / 2 / s) for s in spacing[:2]]
    patch = volume[0, max(0, x - half[0]) : x + half[0], max(0, y - half[1]) : y + half[1], z]
    return patch.flip(0, 1).T.float().numpy()


def draw(path: Path, rows: Sequence[Sequence[tuple[str, np.ndarray, np.ndarray]]]) -> None:
    """Draw rows of (caption, HU, tumour), each with its outline below."""
    columns = len(rows[0])
    figure, grid = plt.subplots(
        2 * len(rows),
        columns,
        figsize=(2.1 * columns, 4.3 * len(rows)),
        squeeze=False,
        facecolor=PAPER,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_box_aspect(1)
    for r, row in enumerate(rows):
        for c, (caption, hu, tumor) in enumerate(row):
            for axes in grid[2 * r : 2 * r + 2, c]:
                axes.imshow(hu, cmap="gray", vmin=-100, vmax=200, aspect="auto")
            if tumor.any():
                grid[2 * r + 1, c].contour(tumor, [0.5], colors=OUTLINE, linewidths=0.9)
            grid[2 * r, c].set_title(caption, color=INK, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor=PAPER)
    plt.close(figure)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


def main(folder: Path) -> None:
    ct = ts.make_phantom(spacing=(0.8, 0.8, 1.5), shape=(220, 200, 70), seed=1)
    synth = ts.SynthesizeTumor(
        organ_labels=LIVER, tumor_label=TUMOR, count=1, size_mm=16, contrast_hu=-40
    )
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=SEED)
    first, (record,) = synth.params, synth.report
    centre = record["centre_voxel"]

    def panel(caption: str, volume: Any, mask: Any) -> tuple[str, np.ndarray, np.ndarray]:
        shown = cut(mask == TUMOR, centre, ct.spacing)
        return caption, cut(volume, centre, ct.spacing), shown

    series = []
    for factor in FACTORS:
        made, mask = synth(ct.image, ct.label, spacing=ct.spacing, params=synth.grow(first, factor))
        (record,) = synth.report
        series.append(panel(f"{factor:g} x: {record['diameter_mm']:.1f} mm", made, mask))
    draw(folder / "follow_up.png", [series])

    noise = torch.Generator().manual_seed(3)
    arterial = ct.image + ARTERIAL_HU * (ct.label == LIVER)
    arterial = arterial + 6 * torch.randn(arterial.shape, generator=noise)
    phases = [panel(f"portal, {first[0]['tumors'][0]['contrast_hu']:+.0f} HU", image, label)]
    for words, contrast in (("arterial, hypo", (-35, -15)), ("arterial, hyper", (25, 40))):
        made, mask = synth(
            arterial,
            ct.label,
            spacing=ct.spacing,
            params=first,
            contrast_hu=contrast,
            first_phase=ct.image,
        )
        assert mask.equal(label)
        phases.append(panel(f"{words}, {synth.report[0]['contrast_hu']:+.0f} HU", made, mask))
    draw(folder / "phases.png", [phases])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-o", type=Path, default=Path(__file__).parents[2] / "docs/pictures", metavar="FOLDER"
    )
    main(parser.parse_args().o)
