"""``tumorsynth replay``: make the tumours of a report again and check every voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tumorsynth
from tumorsynth.commands.progress import progress_bar, summary
from tumorsynth.commands.shared import Out, Overwrite, build_synthesizer, fail, say
from tumorsynth.scans.layouts import find_scans
from tumorsynth.scans.organ_masks import read_scan
from tumorsynth.scans.outputs import find_unfinished, output_paths_of, remove_partial_files
from tumorsynth.scans.scan import synthesize_scan


def replay(
    report: Annotated[Path, typer.Argument(help="NAME_report.json of an earlier run.")],
    ct: Annotated[Path, typer.Argument(help="The CT that the report was made from.")],
    label: Annotated[
        Path, typer.Argument(help="The label map that it was made from, or the folder of masks.")
    ],
    *,
    out: Out,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Folder, hub id or bank of the report's generator, unless it is a bundled one.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ... [default: as in the report]", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the tumours of a report again.

    Takes the CT and the label map that the report was made from, makes the same tumours and writes
    the same files as `synthesize`. Checks the generator and the scan against the report first, and
    the new voxels at the end: if they differ, the exit code is 1.
    """
    from tumorsynth.scans.replay import (
        bundled_generator,
        check_generator,
        check_scan,
        masks_of,
        read_report,
        reading_of,
        synthesizer_options,
    )

    old = read_report(report)
    (pair,) = find_scans(ct, label).pairs
    masks = masks_of(old)
    find_unfinished([pair], out, overwrite=overwrite)
    image, mask = read_scan(pair.ct, pair.label, reading_of(old), masks)
    check_scan(old, image, mask)
    synth = build_synthesizer(
        generator=generator or bundled_generator(old),
        device=device or old.get("device", "cpu"),
        threads=old.get("threads", 1),
        **synthesizer_options(old),
    )
    check_generator(old, synth.handle.get(synth.device or "cpu").card)
    mask.check_label_fits(synth.tumor_label)
    out.mkdir(parents=True, exist_ok=True)
    remove_partial_files([pair], out)
    with progress_bar(1) as progress:
        progress.begin(pair.name)
        new = synthesize_scan(
            synth,
            image,
            mask,
            out,
            pair.name,
            old["seed"],
            progress.step,
            params=old["params"],
            geometry=old.get("geometry"),
            masks=masks,
            pair=pair,
        )
        progress.end()
    print(summary(pair.name, new["tumors"]))
    for path in output_paths_of(pair, out).values():
        print(path)
    if old["tumorsynth"] != tumorsynth.__version__:
        say(f"note: made by version {old['tumorsynth']}, now {tumorsynth.__version__}")
    known = old.get("voxels_sha256")
    if known is None:
        say("note: the report has no voxels_sha256, so nothing was compared")
        return
    differing = [
        key.removeprefix("new_")
        for key in ("new_ct", "new_label")
        if new["voxels_sha256"][key] != known.get(key)
    ]
    if differing:
        words = " and ".join(differing)
        raise typer.Exit(
            fail(f"the {words} of {pair.name} is not the report's to the last voxel", 1)
        )
    print("every voxel is as in the report")
