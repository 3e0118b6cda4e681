"""``tumorsynth synthesize``: tumours in one scan, or in a folder of scans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tumorsynth.commands.follow_up import FollowUpFactors, parse_factors
from tumorsynth.commands.organs import (
    LabelMapOption,
    Organ,
    OrganLabel,
    TumorLabel,
    choose_organs,
)
from tumorsynth.commands.pictures import ContactSheet, Html
from tumorsynth.commands.scan_options import Channel, Pattern, Segment, SegmentFast
from tumorsynth.commands.shared import (
    Count,
    Gated,
    GateLimits,
    GeneratorName,
    Geometry,
    Out,
    Overwrite,
    SameGrid,
    Seed,
    SizeMm,
    Threads,
    build_synthesizer,
    check_device,
    parse_bulge,
    parse_count,
    parse_gate,
    parse_intensity,
    parse_mass_effect,
    say,
)
from tumorsynth.commands.synthesis_run import Run
from tumorsynth.scans.layouts import find_scans, find_unlabelled
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.pairing import is_collection
from tumorsynth.scans.segmentation import SEGMENTATIONS, find_segmenter


def synthesize(
    context: typer.Context,
    ct: Annotated[Path, typer.Argument(help="A CT or a folder, see above.")],
    label: Annotated[
        Path | None,
        typer.Argument(help="The label map, on the same grid, or the folder of the label maps."),
    ] = None,
    *,
    out: Out,
    organ_label: OrganLabel = None,
    organ: Organ = None,
    label_map: LabelMapOption = None,
    tumor_label: TumorLabel = None,
    pattern: Pattern = None,
    channel: Channel = None,
    segment: Segment = False,
    segment_fast: SegmentFast = False,
    add_to_label: Annotated[
        bool,
        typer.Option(
            "--add-to-label",
            help="Add the tumours to those that the label maps hold (LiTS: 1 liver, 2 tumour). "
            "Without it, a map is refused that holds the default --tumor-label, or another organ "
            "of the value that you give.",
        ),
    ] = False,
    generator: GeneratorName = None,
    count: Count = None,
    size_mm: SizeMm = None,
    size_prior: Annotated[
        str | None,
        typer.Option(
            help="Sizes and shapes of real tumours: liver, kidney, pancreas, cyst or lung."
        ),
    ] = None,
    seed: Seed = 0,
    p: Annotated[float, typer.Option("--p", help="Probability that a scan gets tumours.")] = 1.0,
    blend: Annotated[
        str,
        typer.Option(
            help="change: add the difference that the generator makes; difftumor: paste its "
            "voxels, as published."
        ),
    ] = "change",
    contrast_hu: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="HU between the tumour's core and the organ, for example -50 -20; negative is "
            "darker. [default: the generator's own]",
            show_default=False,
        ),
    ] = None,
    contrast_prior: Annotated[
        str | None,
        typer.Option(
            help="Contrast of an organ and a phase, with rims and necrotic cores: liver-portal, "
            "kidney-arterial, pancreas-unenhanced, ...",
            show_default=False,
        ),
    ] = None,
    bulge: Annotated[
        str,
        typer.Option(
            help="Exophytic tumours, which grow into unlabelled fat around the organ: prior, as in "
            "real masks (with --size-prior kidney or cyst); the share of their volume, 0.3 or "
            "0-0.5; or no."
        ),
    ] = "no",
    any_tissue: Annotated[
        bool,
        typer.Option(
            "--any-tissue",
            help="Paint also in tissue that the generator is not for, which is avoided otherwise.",
        ),
    ] = False,
    mass_effect: Annotated[
        str,
        typer.Option(
            help="Tissue to push aside: share of the tumour's volume, 0 to 0.9, or auto, which "
            "grows with sizes above 20 mm."
        ),
    ] = "0",
    follow_up: FollowUpFactors = None,
    gate: Gated = False,
    gate_limits: GateLimits = None,
    intensity: Annotated[
        str,
        typer.Option(
            help="hu, or HU_LOW,HU_HIGH,LOW,HIGH for a scaled CT, for example -175,250,0,1."
        ),
    ] = "hu",
    geometry: Geometry = None,
    same_grid: SameGrid = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; or several: cuda:0,cuda:1.")
    ] = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the scans. [default: one per device; ray: as many as fit]",
            show_default=False,
        ),
    ] = None,
    threads: Threads = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="processes: on this machine; ray: on the Ray cluster at RAY_ADDRESS, or on a "
            "local one."
        ),
    ] = "processes",
    html: Html = False,
    contact_sheet: ContactSheet = False,
    overwrite: Overwrite = False,
) -> None:
    """Synthesise tumours in one scan or in a folder of scans.

    \b
    CT and LABEL are one of:
      CT.nii.gz LABEL.nii.gz   one scan
      CT.nii.gz FOLDER         one scan, with one file per organ in the folder
      FOLDER                   every NAME_ct.nii[.gz] in it, with NAME_label.nii[.gz] beside it
      CT_FOLDER LABEL_FOLDER   every .nii[.gz] in the first, with the same name in the second
      FOLDER or dataset.json   nnU-Net raw, Decathlon, TotalSegmentator, AbdomenAtlas, KiTS, LiTS
                               or BTCV, as downloaded; results keep the layout (docs/layouts.md)
    Names are compared without .nii[.gz] and without a trailing _ct or _label. With the extra itk,
    .nrrd, .mha and .mhd stand for .nii.gz, and a folder of DICOM slices for a CT.

    \b
    Writes for each scan:
      OUT/NAME_ct.nii.gz, OUT/NAME_label.nii.gz   affine, dtype and header kept; as .nrrd, .mha or
                                                  .mhd if they came so
      OUT/NAME_report.json                        each tumour, and what replay needs
      OUT/NAME_preview.png                        each tumour in three planes, before and after
    and with --html OUT/view.html, with --contact-sheet OUT/contact_sheet.png.

    With --follow-up, NAME is that of the scan and _t0, _t1, ...; each report names the one before.

    In a folder, the k-th scan by name (k = 0, 1, ...) uses seed + k, and the files are the same for
    any number of --workers. A scan that fails is reported and skipped, and the exit code is 1. To
    resume an interrupted run, give the same command again.
    """
    if engine not in ("processes", "ray"):
        raise ValueError(f"--engine must be processes or ray, got {engine!r}; give one of them")
    if engine == "ray":
        import tumorsynth.scans.ray  # noqa: F401 (fail fast on a missing package)
    if segment or segment_fast:
        for option, value in (("--pattern", pattern), ("--channel", channel)):
            if value is not None:
                raise ValueError(
                    f"{option} is for CTs with labels, and --segment makes the labels, got both; "
                    "leave one of them out"
                )
        found = find_unlabelled(ct, label, out / SEGMENTATIONS)
        segmenter = find_segmenter(device.split(",")[0], fast=segment_fast)
    else:
        found, segmenter = find_scans(ct, label, pattern, without=out, channel=channel), None
        if label is None and ct.is_dir() and not any(pair.label.exists() for pair in found.pairs):
            first = found.pairs[0]
            raise ValueError(
                f"the folder {ct} must hold the label maps of its CTs, but has none, such as "
                f"{first.label.name} for {first.ct.name}; give the folder of the label maps as "
                "second argument, or --segment to make them with TotalSegmentator"
            )
    factors = parse_factors(follow_up)
    if not 0 <= seed <= 2**63 - len(found.pairs):
        raise ValueError(
            f"--seed must be 0 to 2**63 - {len(found.pairs)}, as each scan takes the next one, got "
            f"{seed}; choose another"
        )
    scale = parse_intensity(intensity)
    if size_mm is not None and size_prior is not None:
        raise ValueError("--size-mm and --size-prior exclude each other; give one of them")
    if contrast_hu is not None and contrast_prior is not None:
        raise ValueError("--contrast-hu and --contrast-prior exclude each other; give one of them")
    devices = [name.strip() for name in device.split(",")]
    for name in devices:
        check_device(name)
    if workers is not None and workers < 1 or threads < 1:
        raise ValueError(f"--workers and --threads must be 1 or more, got {workers}, {threads}")
    bulges, effect = parse_bulge(bulge), parse_mass_effect(mass_effect)
    organs = choose_organs(
        found,
        organ_label=organ_label,
        organ=organ,
        label_map=label_map,
        tumor_label=tumor_label,
        segmented=segmenter is not None,
        grows=bulges is not False,
        moves=effect != 0,
    )
    run = Run(
        found,
        organs,
        out,
        factors=factors,
        seed=seed,
        reading=Reading(geometry, same_grid),
        if_taken="add" if add_to_label else "refuse" if tumor_label is None else "judge",
        segmenter=segmenter,
        several=is_collection(ct) or len(found.pairs) > 1,
        overwrite=overwrite,
        html=html,
        contact_sheet=contact_sheet,
    )
    run.check_out()
    synth = build_synthesizer(
        generator=generator,
        organ_labels=organs.organ_labels,
        tumor_label=organs.tumor_label,
        label_map=organs.label_map,
        count=parse_count(count or "1-3") if count or size_prior is None else None,
        size_mm=size_prior or size_mm or (8.0, 20.0),
        p=p,
        blend=blend,
        contrast_hu=contrast_prior or contrast_hu,
        bulge=bulges,
        mass_effect=effect,
        any_tissue=any_tissue,
        gate=parse_gate(gate, gate_limits),
        intensity=scale,
        device=devices[0],
        threads=threads,
    )
    tasks = run.prepare(context, synth)
    for note in (found.about_alone, found.about_tests, found.about_channels):
        if note:
            say(f"note: {note}")
    run.process(
        synth,
        tasks,
        engine=engine,
        workers=workers,
        devices=devices,
        threads=threads,
        debug=context.find_root().params["debug"],
    )
