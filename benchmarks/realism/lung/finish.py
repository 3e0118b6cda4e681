"""Give the trained `lung` 3 its card.

python -m benchmarks.realism.lung.finish RUN/lung -o FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.realism.recipes import described
from tumorsynth.appearance.tissue import CARD_KEY
from tumorsynth.generators.folder import read_folder

FIELDS = {
    "name": "lung",
    "version": 3,
    "description": "A small diffusion generator for solid nodules of the lung, trained on six "
    "nodules of one patient. For research and training data; not for diagnosis.",
    "licence": "CC BY 4.0, with attribution to the collections under data",
    "data": {
        "tumours": "six nodules of 6 to 11 mm in one arterial chest CT of the LIDC family "
        "(doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0), outlined by the project's authors, who "
        "are not radiologists; also enlarged 1.6 and 2.3 times, with edges as sharp",
        "autoencoder": "started from that of liver-early 6 (CC BY scans); that scan, "
        "LIDC-IDRI-0314 (the same collection), two crops of an Apache-2.0 "
        "repository's example scans; smoothed copies of the first two",
        "surroundings": "in nine of ten crops the nodule is moved, with another contrast, into "
        "lung of those scans",
    },
    # of lung in general, as in version 2: what surrounds six nodules has no large vessels
    CARD_KEY: {
        "level_hu": [-960.0, -450.0],
        "local_hu": [-990.0, -250.0],
        "voxel_hu": [-1200.0, 500.0],
    },
    "limits": [
        "trained on nodules of one patient; those above 13 mm are enlarged small ones",
        "tissue_range is that of lung, as for version 2, not measured",
        "makes solid nodules only: no ground glass, cavities or long spicules",
        "contrast is relative to the surrounding lung; use the lung's organ_labels",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder of the trained denoiser")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    generator = read_folder(args.trained)
    generator.card = described(generator.card, FIELDS)
    print(generator.save(args.out))


if __name__ == "__main__":
    main()
