"""Draw kinds of synthetic tumours beside real ones: early, rim, washed-out, bright, mid, late.

    python -m benchmarks.realism.kinds CT_DIR -o PICTURE [--generator liver-early] [--only NAME ...]

CT_DIR holds NAME_ct.nii.gz with NAME_label.nii.gz (1 liver, 2 tumour); outlines in annotations/
come first. By default only scans under CC BY are drawn, so that the picture may be passed on; mind
the terms of others. A row is a kind: up to three real tumours of its size and contrast, then three
synthetic ones from consecutive seeds, none chosen by their looks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the backend)

import tumorsynth as ts  # noqa: E402
from benchmarks.realism.paired import real_tumors  # noqa: E402
from benchmarks.realism.scans import ANNOTATIONS, LIVER, SYNTHETIC, Scan, liver_scans  # noqa: E402

FREE = ("crlm_1004", "crlm_1006", "crlm_1100_lowres", "hcc_015_pv")  # CC BY
COLUMNS, SEEDS = 3, 40
HALF_WINDOW_HU = 110.0  # around the liver
PAPER, INK = "#101010", "#d8d8d8"


@dataclass(frozen=True)
class Kind:
    """One row.

    Args:
        name: its caption.
        size_mm: of the tumours, real and synthetic.
        contrast_hu: of the synthetic ones; None leaves it to the generator.
        real_hu: of the real ones that are shown, between these two.
        field_mm: side of a picture.
        options: more arguments of `SynthesizeTumor`.
    """

    name: str
    size_mm: tuple[float, float]
    contrast_hu: Any = None
    real_hu: tuple[float, float] = (-200.0, 0.0)
    field_mm: float = 70.0
    options: dict[str, Any] = field(default_factory=dict)


RIM = ts.ContrastPrior(hypo=(-45, -25), rim=(12, 25), rim_share=1.0)
WASHED_OUT = ts.ContrastPrior(hypo=(-35, -20), core_share=1.0, core_from_mm=0.0)
BRIGHT = ts.ContrastPrior(hyper=(12, 28), shares=(0, 0, 1))
KINDS = (
    Kind("early", (8, 20)),
    Kind("rim", (14, 24), RIM),
    Kind("washed-out centre", (20, 30), WASHED_OUT),
    Kind("bright", (12, 30), BRIGHT, (5.0, 200.0)),
    Kind("mid", (20, 50), None, field_mm=100.0),
    Kind("late", (50, 75), "liver-portal", field_mm=150.0, options={"mass_effect": "auto"}),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PICTURE")
    parser.add_argument("--generator", default="liver-early")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(FREE), help="scans")
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS, help="more labels")
    args = parser.parse_args(arguments)
    scans = list(liver_scans(args.scans, args.annotations, args.only))
    figure, grid = plt.subplots(
        len(KINDS),
        2 * COLUMNS,
        figsize=(4 * COLUMNS, 2.25 * len(KINDS)),
        squeeze=False,
        facecolor=PAPER,
        layout="constrained",
    )
    figure.get_layout_engine().set(rect=(0.09, 0, 0.91, 1))
    for axes in grid.flat:
        axes.set_axis_off()
    real = [(scan, tumor) for scan in scans for tumor in real_tumors(scan)]
    for row, kind in enumerate(KINDS):
        shown = [
            (scan, np.asarray(tumor.hu), tumor.mask, f"real, {tumor.diameter_mm:.0f} mm")
            for scan, tumor in real
            if kind.size_mm[0] <= tumor.diameter_mm <= kind.size_mm[1]
            and kind.real_hu[0] <= tumor.contrast_hu <= kind.real_hu[1]
        ]
        made = synthetic(kind, scans, args.generator)
        cells = [*shown[:COLUMNS], *[None] * (COLUMNS - len(shown)), *made]
        for column, cell in enumerate(cells):
            if cell is not None:
                draw(grid[row, column], *cell, kind)
        if not shown:
            grid[row, 0].set_title("no real one among these scans", color=INK, fontsize=9)
        figure.text(0.002, 1 - row / len(KINDS) - 0.004, kind.name, color=INK, va="top", size=11)
        print(f"{kind.name}: {len(shown)} real, {len(made)} synthetic", flush=True)
    figure.savefig(args.out, dpi=110, facecolor=PAPER)
    print(args.out)


def synthetic(
    kind: Kind, scans: Sequence[Scan], generator: str
) -> list[tuple[Scan, np.ndarray, np.ndarray, str]]:
    """Tumours of a kind, from consecutive seeds, each in the next of the scans."""
    synth = ts.SynthesizeTumor(
        generator,
        LIVER,
        SYNTHETIC,
        count=1,
        size_mm=kind.size_mm,
        contrast_hu=kind.contrast_hu,
        **kind.options,
    )
    made: list[tuple[Scan, np.ndarray, np.ndarray, str]] = []
    for seed in range(SEEDS):
        scan = scans[(seed + len(made)) % len(scans)]
        healthy = scan.label.clone()
        image, label = synth(scan.hu[None], healthy[None], spacing=scan.spacing, seed=seed)
        (record,) = synth.report
        if not record["applied"]:
            continue
        caption = f"{record['diameter_mm']:.0f} mm, {record['hu_change']:+.0f} HU"
        made.append((scan, image[0].numpy(), (label[0] == SYNTHETIC).numpy(), caption))
        if len(made) == COLUMNS:
            break
    return made


def draw(axes: Any, scan: Scan, hu: np.ndarray, mask: np.ndarray, caption: str, kind: Kind) -> None:
    """Draw the slice with most of a tumour, the patient's right at the left."""
    z = int(mask.sum((0, 1)).argmax())
    middle = np.argwhere(mask[:, :, z]).mean(0)
    half = [kind.field_mm / 2 / s for s in scan.spacing[:2]]
    level = float(scan.hu[scan.label == LIVER].median())
    flips = [way not in ("L", "P")[axis] for axis, way in enumerate(scan.directions[:2])]
    axes.imshow(
        hu[:, :, z].T,
        cmap="gray",
        vmin=level - HALF_WINDOW_HU,
        vmax=level + HALF_WINDOW_HU,
        aspect=scan.spacing[1] / scan.spacing[0],
        interpolation="bicubic",
    )
    x, y = ((middle[k] - half[k], middle[k] + half[k]) for k in (0, 1))
    axes.set_xlim(*(x[::-1] if flips[0] else x))
    axes.set_ylim(*(y if flips[1] else y[::-1]))
    axes.set_title(caption, color=INK, fontsize=9)


if __name__ == "__main__":
    main()
