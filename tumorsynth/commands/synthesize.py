"""``tumorsynth synthesize``: tumours in one scan, or in a folder of scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tumorsynth.commands.follow_up import FollowUpFactors, parse_factors
from tumorsynth.commands.organs import (
    LabelMapOption,
    Organ,
    OrganLabel,
    Pattern,
    Segment,
    SegmentFast,
    TumorLabel,
    choose_organs,
)
from tumorsynth.commands.outcomes import report_outcomes
from tumorsynth.commands.pictures import ContactSheet, Html, without_view, write_pictures
from tumorsynth.commands.progress import (
    Steps,
    progress_bar,
)
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
)
from tumorsynth.scans.collection import (
    Outcome,
    Task,
    process_scan,
    run_in_processes,
    try_scan,
)
from tumorsynth.scans.dataset_json import write_for_results
from tumorsynth.scans.follow_up import FollowUp, expand, results_by_folder
from tumorsynth.scans.layouts import find_scans, find_unlabelled
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.outputs import (
    find_unfinished,
    folder_lock,
    mark_unfinished,
    output_paths,
    remove_partial_files,
)
from tumorsynth.scans.pairing import Pair, is_collection
from tumorsynth.scans.run_settings import explain_mismatch, run_settings
from tumorsynth.scans.segmentation import SEGMENTATIONS, find_segmenter

if TYPE_CHECKING:
    from tumorsynth.scans.organ_masks import OrganMasks
    from tumorsynth.synthesizer import SynthesizeTumor


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
            help="HU between tumour and organ, for example -50 -20; negative is darker. "
            "[default: the generator's own]",
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
    reading = Reading(geometry, same_grid)
    if segment or segment_fast:
        found = find_unlabelled(ct, label, out / SEGMENTATIONS)
        segmenter = find_segmenter(device.split(",")[0], fast=segment_fast)
    else:
        found, segmenter = find_scans(ct, label, pattern, without=out), None
    factors = parse_factors(follow_up)
    series = expand(found.pairs, factors)
    pairs, points = [pair for pair, _ in series], max(1, len(factors))
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
    several = is_collection(ct) or len(found.pairs) > 1
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
    if not several:
        find_unfinished(pairs, out, overwrite=overwrite)
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
    if several:
        unfinished = _prepare_folder(
            context, synth, series, points, out, seed, overwrite, geometry, organs.masks
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        remove_partial_files(pairs, out)
        unfinished = list(range(len(pairs)))
    names = [pair.name for pair in pairs]
    if html:
        unfinished = sorted({*unfinished, *without_view(out, names)})
    if len(unfinished) < len(pairs):
        print(f"{len(pairs) - len(unfinished)} of {len(pairs)} scans are finished already")
    if_taken = "add" if add_to_label else "refuse" if tumor_label is None else "judge"
    tasks = [
        Task(
            pairs[k],
            seed + k // points,
            reading,
            if_taken,
            not several,
            organs.masks,
            segmenter,
            html,
            series[k][1],
        )
        for k in unfinished
    ]
    debug = context.find_root().params["debug"]
    processes = workers or len(devices)
    with progress_bar(len(tasks)) as progress:
        outcomes: Iterator[Outcome]
        if len(tasks) < 2 or debug or (engine == "processes" and processes == 1):
            catch = len(pairs) > 1 and not debug
            outcomes = _run_here(synth, tasks, out, progress, catch=catch)
        elif engine == "ray":
            from tumorsynth.scans.ray import run_on_ray

            outcomes = run_on_ray(
                synth, tasks, out, workers=workers, devices=devices, threads=threads
            )
        else:
            outcomes = run_in_processes(
                synth, tasks, out, workers=processes, devices=devices, threads=threads
            )
        try:
            report_outcomes(outcomes, tasks, len(pairs), out, progress)
        finally:
            if found.dataset is not None:
                for folder, scans in results_by_folder(found.pairs, series):
                    reports = {name: output_paths(out, name)["report"] for _, name in scans}
                    finished = [scan for scan, name in scans if reports[name].exists()]
                    if finished or not folder:
                        tumor = organs.tumor_label
                        write_for_results(found.dataset, out / folder, finished, tumor)
            write_pictures(out, names, html=html, contact_sheet=contact_sheet)


def _prepare_folder(
    context: typer.Context,
    synth: SynthesizeTumor,
    series: Sequence[tuple[Pair, FollowUp | None]],
    points: int,
    out: Path,
    seed: int,
    overwrite: bool,
    geometry: str | None,
    masks: OrganMasks | None,
) -> list[int]:
    """Lock and tidy the folder of the results; returns the indices of the unfinished scans.

    points: in time, of each scan.
    """
    pairs = [pair for pair, _ in series]

    def mismatch(k: int, report: Path) -> str | None:
        pair, follow_up = series[k]
        settings = run_settings(
            synth,
            ct=pair.ct.name,
            label=pair.label.name,
            seed=seed + k // points,
            geometry=geometry,
            masks=masks,
            follow_up=follow_up,
        )
        return explain_mismatch(report, settings)

    existed = out.is_dir()
    if existed:
        context.with_resource(folder_lock(out))
    unfinished = find_unfinished(pairs, out, overwrite=overwrite, mismatch=mismatch)
    if not existed:
        out.mkdir(parents=True, exist_ok=True)
        context.with_resource(folder_lock(out))
    remove_partial_files(pairs, out)
    if overwrite:
        mark_unfinished(pairs, out)
    return unfinished


def _run_here(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    progress: Steps,
    *,
    catch: bool,
) -> Iterator[Outcome]:
    """Process scans in this process. catch: turn errors into outcomes."""
    for task in tasks:
        progress.begin(task.pair.name)
        if catch:
            yield try_scan(synth, task, out, progress.step)
        else:
            records = process_scan(synth, task, out, progress.step)
            yield Outcome(task.pair.name, records)
