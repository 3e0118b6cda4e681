"""The options that say which files of a folder belong together, or make the label maps."""

from __future__ import annotations

from typing import Annotated

import typer

Pattern = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="CT LABEL",
        help="Names of CT and label below the folders where no known layout fits, for example "
        "'img/{name}.nii.gz' 'seg/{name}_mask.nii.gz'.",
        show_default=False,
    ),
]
Segment = Annotated[
    bool,
    typer.Option(
        "--segment",
        help="Make the label maps with TotalSegmentator, which has to be installed; needs --organ "
        "NAME. OUT/segmentations keeps them.",
    ),
]
SegmentFast = Annotated[
    bool, typer.Option("--segment-fast", help="--segment with the faster model for 3 mm.")
]
Channel = Annotated[
    str | None,
    typer.Option(
        help="Number or name of the CT where cases have several channels (nnU-Net: NAME_0000, "
        "NAME_0001, ...). [default: the one that dataset.json calls CT]",
        show_default=False,
    ),
]
