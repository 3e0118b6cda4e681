"""``tumorsynth replay``: make the tumours of a report again and check every voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tumorsynth
from tumorsynth.commands.progress import progress_bar, summary
from tumorsynth.commands.shared import Out, Overwrite, build_synthesizer, fail, say
from tumorsynth.scans.layouts import find_scans
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_masks import read_scan
from tumorsynth.scans.outputs import find_unfinished, output_paths_of, remove_partial_files
from tumorsynth.scans.phase import Phase, check_phase
from tumorsynth.scans.scan import synthesize_scan
from tumorsynth.scans.volume_files import read_volume


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
    other_phase: Annotated[
        Path | None,
        typer.Option(
            metavar="CT",
            help="Another phase of the same patient, on the same grid, to put the tumours into.",
            show_default=False,
        ),
    ] = None,
    contrast_hu: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="With --other-phase: HU between the tumour's core and the organ in that phase.",
            show_default=False,
        ),
    ] = None,
    contrast_prior: Annotated[
        str | None,
        typer.Option(
            help="With --other-phase: contrast of an organ in that phase, for example "
            "liver-arterial.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the tumours of a report again.

    Takes the CT and the label map that the report was made from, makes the same tumours and writes
    the same files as `synthesize`. Checks the generator and the scan against the report first, and
    the new voxels at the end: if they differ, the exit code is 1.

    With --other-phase, makes them in that CT instead: in the very same voxels, with the contrast of
    that phase. The label map is then the report's; the files are named after that CT.
    """
    if contrast_hu is not None and contrast_prior is not None:
        raise ValueError("--contrast-hu and --contrast-prior exclude each other; give one of them")
    if other_phase is None and (contrast_hu or contrast_prior):
        raise ValueError(
            "--contrast-hu and --contrast-prior go with --other-phase here, got no --other-phase; "
            "a replay keeps the contrast of its report"
        )
    from tumorsynth.scans.replay import (
        bundled_generator,
        check_generator,
        check_scan,
        follow_up_of,
        masks_of,
        read_report,
        reading_of,
        synthesizer_options,
    )

    old = read_report(report)
    (pair,) = find_scans(ct, label).pairs
    masks = masks_of(old)
    image, mask = read_scan(pair.ct, pair.label, reading_of(old), masks)
    check_scan(old, image, mask)
    phase = None
    if other_phase is not None:
        phase = Phase(report.name, image, contrast_prior or contrast_hu)
        (pair,) = find_scans(other_phase, label).pairs
        image = read_volume(pair.ct, Reading(old.get("geometry")))
        check_phase(phase.first, image)
    find_unfinished([pair], out, overwrite=overwrite)
    synth = build_synthesizer(
        generator=generator or bundled_generator(old),
        device=device or old.get("device", "cpu"),
        threads=old.get("threads", 1),
        **synthesizer_options(old),
    )
    check_generator(old, synth.handle.get(synth.device or "cpu").card)
    mask.check_label_fits(synth.tumor_label)
    if phase is not None:
        phase.check_contrast(synth)
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
            follow_up=follow_up_of(old),
            phase=phase,
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
    compared = ("new_ct", "new_label") if phase is None else ("new_label",)
    differing = [
        key.removeprefix("new_") for key in compared if new["voxels_sha256"][key] != known.get(key)
    ]
    if differing:
        words = " and ".join(differing)
        raise typer.Exit(
            fail(f"the {words} of {pair.name} is not the report's to the last voxel", 1)
        )
    print("every voxel is as in the report" if phase is None else "the label is as in the report")
