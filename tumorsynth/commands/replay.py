"""``tumorsynth replay``: the tumours of a report once more, checked to the last voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tumorsynth
from tumorsynth.commands.progress import progress_bar, summary
from tumorsynth.commands.shared import Out, Overwrite, fail, synthesizer
from tumorsynth.scans import nifti
from tumorsynth.scans.cases import check_outputs, find_pairs, output_paths, sweep, synthesize_scan


def replay(
    report: Annotated[Path, typer.Argument(help="The NAME_report.json of an earlier result.")],
    ct: Annotated[Path, typer.Argument(help="The CT it was made from.")],
    label: Annotated[Path, typer.Argument(help="Its label map.")],
    *,
    out: Out,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Where the report's generator is, if it is not bundled: a folder or hub id.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="[default: as in the report]", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the tumours of a report again.

    Takes the scan and label that the report was made from, places the very same tumours and writes
    what `synthesize` writes. The generator's weights and the scan are checked against the report,
    and the new voxels too: exit code 1 where they are not the same.
    """
    from tumorsynth.scans.replay import (
        bundled_generator,
        check_scan,
        read_report,
        same_generator,
        synthesizer_options,
    )

    told = read_report(report)
    (pair,) = find_pairs(ct, label)
    check_outputs([pair], out, overwrite)
    image, mask = nifti.read_pair(pair.ct, pair.label)
    check_scan(told, image, mask)
    synth = synthesizer(
        generator=generator or bundled_generator(told),
        device=device or told.get("device", "cpu"),
        threads=told.get("threads", 1),
        **synthesizer_options(told),
    )
    same_generator(told, synth.handle.get(synth.device or "cpu").card)
    mask.check_label_fits(synth.tumor_label)
    out.mkdir(parents=True, exist_ok=True)
    sweep([pair], out)
    with progress_bar(1) as progress:
        progress.begin(pair.name)
        made = synthesize_scan(
            synth, image, mask, out, pair.name, told["seed"], progress.step, params=told["params"]
        )
        progress.end()
    print(summary(pair.name, made["tumors"]))
    for path in output_paths(out, pair.name).values():
        print(path)
    if told["tumorsynth"] != tumorsynth.__version__:
        fail(f"note: made by version {told['tumorsynth']}, now {tumorsynth.__version__}", 0)
    known = told.get("voxels_sha256")
    if known is None:
        fail("note: the report has no voxels_sha256, so that nothing was compared", 0)
        return
    differing = [k for k in ("new_ct", "new_label") if made["voxels_sha256"][k] != known.get(k)]
    if differing:
        words = " and ".join(k.removeprefix("new_") for k in differing)
        raise typer.Exit(
            fail(f"the {words} of {pair.name} is not the report's to the last voxel", 1)
        )
    print("every voxel is as in the report")
