"""Do drawn outlines look like real ones?

    python -m benchmarks.realism.outlines TUMOR_SHAPES_DIR -o FOLDER [--organ liver kidney]

20 real outlines and 20 drawn ones of the same diameters and through the same slices, each in its
largest axial slice and at its own scale, for each organ: FOLDER/liver.png and FOLDER/kidney.png.
With --coronal, in their largest coronal slice instead. To be looked at, and not to be passed on
without the masks' terms: the liver's and the pancreas's are the Medical Segmentation Decathlon's
(Antonelli et al. 2022, CC BY-SA 4.0), the kidney's KiTS23's (Heller et al. 2023, CC BY-NC-SA 4.0),
the lung's ULS23's (CC BY-NC-SA 4.0). So FOLDER must not lie in this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import HERE
from benchmarks.realism.shape_measures import (
    FILES,
    LARGEST,
    SMALLEST,
    drawn_mask,
    read_real,
    through_slices,
)
from benchmarks.realism.shapes import SHAPE_SEEDS
from tumorsynth.placement.organ_priors import PRIORS


def drawn(name: str, diameter: float, spacing: list[float], seed: int) -> np.ndarray:
    """A drawn tumour on a 1 mm grid, taken through slices."""
    shape = PRIORS[name].draw_shape(diameter, torch.Generator().manual_seed(SHAPE_SEEDS + seed))
    mask = drawn_mask(shape, diameter, seed, spacing)
    assert mask is not None
    return through_slices(mask, spacing, FILES[name].interpolation)


def picture(name: str, folder: Path, path: Path, seed: int, across: int) -> None:
    """20 real outlines in blue, and below them 20 drawn with the same diameters in red.

    across: the axis that the slices are across.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    real = read_real(name, folder)
    diameters = real.diameters
    fits = np.flatnonzero((diameters >= SMALLEST) & (diameters <= LARGEST[name]))
    chosen = np.sort(np.random.default_rng(seed).choice(fits, 20, replace=False))
    chosen = chosen[diameters[chosen].argsort()]
    others = tuple({0, 1, 2} - {across})
    fig, axes = plt.subplots(4, 10, figsize=(10, 4.3))
    for k, which in enumerate(chosen):
        size = float(diameters[which])
        row, column = divmod(k, 10)
        made = drawn(name, size, real.spacings[which].tolist(), seed + k)
        for block, mask in ((0, real.masks[which]), (2, made)):
            axis = axes[block + row, column]
            plane = np.pad(mask.take(mask.sum(others).argmax(), across), 2)
            axis.contour(plane.T.astype(float), [0.5], colors="C3" if block else "C0")
            at = np.argwhere(plane).mean(0)
            axis.set_xlim(at[0] - size, at[0] + size)
            axis.set_ylim(at[1] - size, at[1] + size)
            axis.set_aspect("equal")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{size:.0f} mm", fontsize=7, pad=2)
    for block, kind in ((0, "real"), (2, "drawn")):
        for row in (block, block + 1):
            axes[row, 0].set_ylabel(kind, fontsize=9)
    fig.tight_layout(pad=0.3)
    fig.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path, metavar="TUMOR_SHAPES_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--organ", nargs="+", choices=sorted(FILES), default=["liver", "kidney"])
    parser.add_argument("--coronal", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.out.resolve().is_relative_to(HERE.parent):
        parser.error(f"FOLDER must lie outside of the repository, got {args.out}: see the terms")
    args.out.mkdir(parents=True, exist_ok=True)
    for organ in args.organ:
        picture(organ, args.shapes, args.out / f"{organ}.png", args.seed, 1 if args.coronal else 2)
        print(args.out / f"{organ}.png")


if __name__ == "__main__":
    main()
