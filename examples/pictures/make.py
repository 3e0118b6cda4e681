"""Make the pictures of the README and of docs/gallery.md, into docs/pictures.

    python examples/pictures/make.py [--scan CT.nii.gz LABEL.nii.gz] [-o FOLDER]

Everything is shown on the made-up phantom with the shipped generators. `--scan` adds a picture of
a real CT whose liver has label 1; only a scan whose licence allows it may go into the project
(README.md beside this file). Look at every picture before keeping it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.nn.functional import max_pool3d

import tumorsynth as ts
from tumorsynth.scans.preview import save_preview
from tumorsynth.scans.volume_files import read_pair

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the backend)
from PIL import Image  # noqa: E402

SEED = 5
CLOSED = 21  # voxels: holes in the label of a real scan up to this wide are closed
PAPER, INK, OUTLINE = "#101010", "#d8d8d8", "#ffd23f"
COLUMNS = "before", "after", "outline"


@dataclass
class Panel:
    """One tumour: RAS patches (X, Y) of its axial slice, before and after, and its outline."""

    caption: str
    before: torch.Tensor
    after: torch.Tensor
    tumor: torch.Tensor
    mm: tuple[float, float]


def panels(
    ct: ts.Phantom, caption: str, *, organ: str = "liver", zoom_mm: float = 70.0, **options: Any
) -> list[Panel]:
    """Tumours in the phantom's organ, one panel each; options are SynthesizeTumor's."""
    value = ts.phantom.LABELS[organ.replace(" ", "_")]
    synth = ts.SynthesizeTumor(organ_labels=value, tumor_label=20, **options)
    image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=SEED)
    found = []
    for record in synth.report:
        if not record["applied"]:
            raise SystemExit(f"{caption}: {record['reason']}")
        x, y, z = (round(c) for c in record["centre_voxel"])
        across, along = (
            slice(max(0, c - round(zoom_mm / 2 / s)), c + round(zoom_mm / 2 / s))
            for c, s in zip((x, y), ct.spacing, strict=False)
        )
        patches = (v[0, across, along, z] for v in (ct.image, image, label == 20))
        text = f"{caption}\n{record['diameter_mm']:.0f} mm, {record['hu_change']:+.0f} HU".strip()
        found.append(Panel(text, *patches, ct.spacing[:2]))
    return found


def draw(path: Path, rows: Sequence[Panel], title: str) -> None:
    """Tumours side by side: before above, after in the middle, the outline below."""
    size = 1.9
    figure, grid = plt.subplots(
        len(COLUMNS),
        len(rows),
        figsize=(size * len(rows) + 0.3, size * len(COLUMNS) + 0.9),
        squeeze=False,
        facecolor=PAPER,
        layout="constrained",
    )
    figure.suptitle(title, color=INK, fontsize=10)
    for column, panel in enumerate(rows):
        for axes, name in zip(grid[:, column], COLUMNS, strict=True):
            shown = panel.before if name == "before" else panel.after
            # RAS: x grows to the patient's right, which a radiologist sees on the left
            axes.imshow(shown.flip(0, 1).T, cmap="gray", vmin=-100, vmax=200, aspect="auto")
            if name == "outline":
                edge = panel.tumor.flip(0, 1).T.float().numpy()
                axes.contour(edge, [0.5], colors=OUTLINE, linewidths=0.9)
            axes.set(xticks=[], yticks=[])
            axes.set_box_aspect(1)
            if column == 0:
                axes.set_ylabel(name, color=INK, fontsize=9)
        grid[0, column].set_title(panel.caption, color=INK, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor=PAPER)
    plt.close(figure)
    shrink(path)


def before_after(path: Path, volumes: Sequence[Any], record: dict[str, Any]) -> None:
    """The README's picture: a whole axial slice before and after, and the tumour outlined.

    volumes: before, after, tumour, each (X, Y, Z) of 1 mm in x and y.
    """
    x, y, z = (round(c) for c in record["centre_voxel"])
    before, after, tumor = (v[:, ::-1, z][::-1].T for v in volumes)
    height, width = before.shape
    figure, grid = plt.subplots(
        1,
        3,
        figsize=(10.6, 3.1),
        width_ratios=(width, width, height),
        facecolor=PAPER,
        layout="constrained",
    )
    for axes, name, shown in zip(grid, COLUMNS, (before, after, after), strict=True):
        axes.imshow(shown, cmap="gray", vmin=-100, vmax=200)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, color=INK, fontsize=10)
    column, row = width - 1 - x, height - 1 - y
    grid[2].contour(tumor.astype(float), [0.5], colors=OUTLINE, linewidths=1.2)
    grid[2].set(xlim=(column - 40, column + 40), ylim=(row + 40, row - 40))
    figure.savefig(path, dpi=100, facecolor=PAPER)
    plt.close(figure)
    shrink(path)


def shrink(path: Path) -> None:
    """A palette of 256 colours: a third of the bytes, and no difference to the eye."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


def make_all(folder: Path) -> None:
    ct = ts.make_phantom(spacing=(0.8, 0.8, 1.5), shape=(220, 200, 70), seed=1)
    early = {"generator": "liver-early", "count": 1}

    draw(
        folder / "sizes.png",
        [p for mm in (6, 9, 13, 18, 26) for p in panels(ct, "", size_mm=mm, **early)],
        "liver-early, five sizes",
    )
    draw(
        folder / "contrasts.png",
        [
            p
            for hu in (-20, -35, -50, -70, 30)
            for p in panels(ct, f"asked: {hu:+d} HU", size_mm=15, contrast_hu=hu, **early)
        ],
        "the same place and seed, contrast_hu from -20 to +30",
    )
    draw(
        folder / "generators.png",
        [
            p
            for name in ("liver-early", "hu2023")
            for p in panels(ct, name, size_mm=(12, 18), count=3, generator=name)
        ],
        "the same places and shapes, liver-early and hu2023",
    )
    whole = ts.make_phantom(spacing=(1.0, 1.0, 2.0), seed=1)
    draw(
        folder / "organs.png",
        [
            p
            for organ, mm in (("liver", 15), ("pancreas", 10), ("left kidney", 14), ("spleen", 14))
            for p in panels(whole, organ, organ=organ, size_mm=mm, **early)
        ],
        "liver-early, learned in a liver, in four organs",
    )
    draw(
        folder / "bulge.png",
        [
            p
            for share in (0, 0.2, 0.4, 0.6, 0.8)
            for p in panels(
                whole, f"bulge={share}", organ="left kidney", size_mm=26, bulge=share, **early
            )
        ],
        "liver-early in a kidney, the share beyond it from 0 to 0.8",
    )
    synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=20, count=2, size_mm=(14, 20))
    image, label = synth(whole.image, whole.label, spacing=whole.spacing, seed=SEED)
    volumes = whole.image[0].numpy(), image[0].numpy(), (label != whole.label)[0].numpy()
    before_after(folder / "before_after.png", volumes, synth.report[1])
    path = folder / "phantom_preview.png"
    save_preview(path, *volumes, whole.affine, synth.report, title="phantom, liver-early")
    shrink(path)


def spread(volume: torch.Tensor) -> torch.Tensor:
    """The largest value within a cube of CLOSED voxels a side, axis by axis."""
    for axis in range(3):
        kernel = [CLOSED if a == axis else 1 for a in range(3)]
        volume = max_pool3d(volume, kernel, 1, [k // 2 for k in kernel])
    return volume


def make_scan(folder: Path, ct: Path, organ: Path) -> None:
    """A real scan: two tumours in label 1, its holes closed, as rough labels leave out vessels."""
    scan, labels = read_pair(ct, organ)
    hu = torch.from_numpy(scan.values().astype("float32"))[None]
    label = torch.from_numpy(labels.values().astype("int16"))[None]
    closed = -spread(-spread((label == 1).float()))
    label[closed == 1] = 1
    synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=20, count=2, size_mm=(14, 20))
    image, new = synth(hu, label, affine=scan.affine, seed=2)
    path = folder / f"{ct.name.split('.')[0].removesuffix('_ct')}_preview.png"
    volumes = hu[0].numpy(), image[0].numpy(), (new != label)[0].numpy()
    save_preview(path, *volumes, scan.affine, synth.report, title="liver-early in a real CT")
    shrink(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", nargs=2, type=Path, metavar=("CT", "LABEL"))
    parser.add_argument(
        "-o", type=Path, default=Path(__file__).parents[2] / "docs/pictures", metavar="FOLDER"
    )
    given = parser.parse_args()
    if given.scan:
        make_scan(given.o, *given.scan)
    make_all(given.o)
