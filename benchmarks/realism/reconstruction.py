"""How much of a scan comes through an autoencoder: HU, PSNR, SSIM and noise by tissue, in pictures.

    python benchmarks/realism/reconstruction.py CASES.npz [...] --generator NAME=RUN/gen [...]
        [--tissue liver=1 left-kidney=3] [--picture OUT.png]

Every autoencoder is measured in the labelled scans of the packs, and under "without_detail" without
`Autoencoder.detail`, where it has that. The picture has an axial slice of the last scan, window
[-175, 250]: the scan, then each reconstruction without and with detail.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write
from tumorsynth.generators.store import find_folder, read_folder
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.data import Case, load_pack
from tumorsynth.training.pictures import grid, shown
from tumorsynth.training.reconstruction import reconstructed, reconstruction, tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packs", type=Path, nargs="+", help="of `tumorsynth train pack`")
    parser.add_argument("--generator", action="append", required=True, metavar="[NAME=]FOLDER")
    parser.add_argument("--tissue", nargs="+", default=["organ=1"], metavar="NAME=LABEL")
    parser.add_argument("--picture", type=Path, help="a PNG to write: part of the scan")
    parser.add_argument("-o", "--output", default="reconstruction")
    args = parser.parse_args()
    tissues = {name: int(label) for name, label in (t.split("=") for t in args.tissue)}
    cases = [c for pack in args.packs for c in load_pack(pack) if c.label is not None]
    rows: dict[str, Any] = {}
    slices: list[Tensor] = []
    for given in args.generator:
        name, _, folder = given.rpartition("=")
        autoencoder = read_folder(find_folder(folder)).autoencoder
        rows[name or folder] = {case.name: measured(autoencoder, case, tissues) for case in cases}
        if args.picture:
            slices += middle(autoencoder, cases[-1])
    write(args.output, {"rows": rows})
    if args.picture:
        low, high = -175.0, 250.0
        where = centre(cases[-1])
        scan = cases[-1].hu[where].float()
        scan = scan[:, :, scan.shape[2] // 2]
        grid(args.picture, [[[shown(s, low, high).flip(0, 1).T for s in (scan, *slices)]]])


def measured(autoencoder: Autoencoder, case: Case, tissues: dict[str, int]) -> dict[str, Any]:
    assert case.label is not None
    present = {n: value for n, value in tissues.items() if bool((case.label == value).any())}
    return {name: reconstruction(autoencoder, case, [v]) for name, v in present.items()}


def centre(case: Case, side: int = 96) -> tuple[slice, slice, slice]:
    """The cube of a scan with the most labelled voxels."""
    assert case.label is not None
    label = case.label
    return max(tiles(label.shape, side), key=lambda where: int((label[where] > 0).sum()))


@torch.no_grad()
def middle(autoencoder: Autoencoder, case: Case) -> list[Tensor]:
    """An axial slice, reconstructed without and with detail."""
    _, out, plain = reconstructed(autoencoder, case.hu[centre(case)])
    return [part[:, :, part.shape[2] // 2] for part in (plain, out)]


if __name__ == "__main__":
    main()
