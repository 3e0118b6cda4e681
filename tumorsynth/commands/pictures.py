"""The options of `synthesize` that make pictures of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Html = Annotated[
    bool,
    typer.Option(
        "--html",
        help="Also write OUT/view.html: all scans before and after, slice by slice, in a browser.",
    ),
]
ContactSheet = Annotated[
    bool,
    typer.Option(
        "--contact-sheet", help="Also write OUT/contact_sheet.png, with a tile for each scan."
    ),
]


def without_view(out: Path, names: Sequence[str]) -> list[int]:
    """Indices of the scans whose voxels the page lacks: finished by a run without --html."""
    from tumorsynth.scans.view import view_path

    return [k for k, name in enumerate(names) if not view_path(out, name).is_file()]


def write_pictures(out: Path, names: Sequence[str], *, html: bool, contact_sheet: bool) -> None:
    """Write the page and the sheet that the options ask for, and print where they are.

    Args:
        out: the folder of the results.
        names: of the scans of the run.
        html: write the page.
        contact_sheet: write the sheet.
    """
    if html:
        from tumorsynth.scans.view import write_view_page

        print(f"open {write_view_page(out)}")
    if contact_sheet:
        from tumorsynth.scans.contact_sheet import write_contact_sheet

        path = out / "contact_sheet.png"
        write_contact_sheet(path, out, names)
        print(path)
