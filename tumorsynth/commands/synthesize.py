"""``tumorsynth synthesize``: tumours into one scan, or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tumorsynth.commands.progress import number, progress_bar, summary
from tumorsynth.commands.shared import (
    Count,
    GeneratorName,
    Out,
    Overwrite,
    Seed,
    SizeMm,
    Threads,
    bulge_range,
    check_device,
    count_range,
    fail,
    scale_of,
    share,
    synthesizer,
)
from tumorsynth.scans.cases import (
    check_outputs,
    find_pairs,
    forget,
    made_otherwise,
    only_run,
    settings,
    sweep,
)
from tumorsynth.scans.collection import Clock, Outcome, Task, in_processes, outcome, run_one


def synthesize(
    context: typer.Context,
    ct: Annotated[Path, typer.Argument(help="A CT (.nii or .nii.gz), or a folder, see above.")],
    label: Annotated[
        Path | None,
        typer.Argument(help="Its label map on the same grid, or the folder of the label maps."),
    ] = None,
    *,
    out: Out,
    organ_label: Annotated[
        list[int],
        typer.Option(help="Label value a tumour may sit in; repeat it for several values."),
    ] = [1],  # noqa: B006 (typer copies it)
    tumor_label: Annotated[int, typer.Option(help="Label value given to tumour voxels.")] = 2,
    generator: GeneratorName = None,
    count: Count = None,
    size_mm: SizeMm = None,
    size_prior: Annotated[
        str | None,
        typer.Option(help="Sizes and shapes as in real tumours: liver, kidney, cyst, ..."),
    ] = None,
    seed: Seed = 0,
    p: Annotated[float, typer.Option("--p", help="Probability that a scan gets tumours.")] = 1.0,
    blend: Annotated[
        str,
        typer.Option(help="change: carry the change over; difftumor: paste, as published."),
    ] = "change",
    contrast_hu: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="HU between tumour and organ, negative for darker tumours, -50 -20 for example. "
            "[default: the generator's own]",
            show_default=False,
        ),
    ] = None,
    contrast_prior: Annotated[
        str | None,
        typer.Option(
            help="Contrast as of an organ and a phase, with rims and necrotic cores: liver-portal, "
            "kidney-arterial, pancreas-unenhanced, ...",
            show_default=False,
        ),
    ] = None,
    bulge: Annotated[
        str,
        typer.Option(
            help="Tumours that stick out of the organ into unlabelled fat: prior, as in real "
            "masks (kidney, cyst), or the share of their volume, 0.3 or 0-0.5; no for none."
        ),
    ] = "no",
    mass_effect: Annotated[
        str,
        typer.Option(
            help="Push tissue aside: share of a tumour's volume, 0 to 0.9, or auto, which grows "
            "from 20 mm on."
        ),
    ] = "0",
    intensity: Annotated[
        str,
        typer.Option(help="hu, or HU_LOW,HU_HIGH,LOW,HIGH when the CT was scaled (-175,250,0,1)."),
    ] = "hu",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; several as cuda:0,cuda:1.")
    ] = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the scans. [default: one per device; ray: all that fit]",
            show_default=False,
        ),
    ] = None,
    threads: Threads = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="Whose processes: processes, of this machine; ray, of the Ray cluster at "
            "RAY_ADDRESS, or of one started here."
        ),
    ] = "processes",
    overwrite: Overwrite = False,
) -> None:
    """Put tumours into a scan or a folder of them.

    \b
    CT and LABEL are one of:
      CT.nii.gz LABEL.nii.gz   one scan
      FOLDER                   every NAME_ct.nii[.gz] in it, with NAME_label.nii[.gz] beside it
      CT_FOLDER LABEL_FOLDER   every .nii[.gz] in the first, with its namesake in the second
    Names are compared without .nii[.gz] and without _ct or _label at their end.

    \b
    Writes for each scan:
      OUT/NAME_ct.nii.gz, OUT/NAME_label.nii.gz   affine, dtype and header kept
      OUT/NAME_report.json                        what was placed, and how to make it again
      OUT/NAME_preview.png                        each tumour in three planes, before and after

    In a folder the k-th scan in the order of the names (k = 0, 1, ...) uses seed + k, and the files
    are the same for any number of --workers. A scan that fails is reported and passed over, and the
    exit code is 1. The same command again goes on where a stopped or killed one left off.
    """
    if engine not in ("processes", "ray"):
        raise ValueError(f"--engine must be processes or ray, got {engine!r}")
    if engine == "ray":
        from tumorsynth.scans.ray import on_ray  # a missing package is said now
    cases = find_pairs(ct, label)
    if not 0 <= seed <= 2**63 - len(cases):
        raise ValueError(
            f"--seed must be 0 to 2**63 - {len(cases)}, as each scan takes the next one, got {seed}"
        )
    scale = scale_of(intensity)
    if size_mm is not None and size_prior is not None:
        raise ValueError("--size-mm and --size-prior exclude each other; give one of them")
    if contrast_hu is not None and contrast_prior is not None:
        raise ValueError("--contrast-hu and --contrast-prior exclude each other; give one of them")
    devices = [name.strip() for name in device.split(",")]
    for each in devices:
        check_device(each)
    if workers is not None and workers < 1 or threads < 1:
        raise ValueError(f"--workers and --threads must be 1 or more, got {workers}, {threads}")
    folder = ct.is_dir()
    if not folder:
        check_outputs(cases, out, overwrite)
    synth = synthesizer(
        generator=generator,
        organ_labels=tuple(organ_label),
        tumor_label=tumor_label,
        count=count_range(count or "1-3") if count or size_prior is None else None,
        size_mm=size_prior or size_mm or (8.0, 20.0),
        p=p,
        blend=blend,
        contrast_hu=contrast_prior or contrast_hu,
        bulge=bulge_range(bulge),
        mass_effect=share(mass_effect),
        intensity=scale,
        device=devices[0],
        threads=threads,
    )

    def finished(k: int, report: Path) -> str | None:
        names = {"name": cases[k].ct.name, "label": cases[k].label.name}
        return made_otherwise(report, settings(synth, **names, seed=seed + k))

    if folder and out.is_dir():
        context.with_resource(only_run(out))
    todo = check_outputs(cases, out, overwrite, finished) if folder else [0]
    if folder and not out.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        context.with_resource(only_run(out))
    out.mkdir(parents=True, exist_ok=True)
    sweep(cases, out)
    if folder and overwrite:
        forget(cases, out)
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} scans are there already")
    tasks = [Task(cases[k], seed + k) for k in todo]
    debug = context.find_root().params["debug"]
    failed, stopped = 0, ""
    count_of_workers = workers or len(devices)
    clock = Clock(len(tasks))
    with progress_bar(len(tasks)) as progress:

        def one_by_one() -> Iterator[Outcome]:
            for task in tasks:
                progress.begin(task.pair.name)
                if len(cases) == 1 or debug:  # fails as a whole
                    made = run_one(synth, task, out, progress.step, organ_needed=not folder)
                    yield Outcome(task.pair.name, made)
                else:
                    yield outcome(synth, task, out, progress.step)

        if len(tasks) < 2 or debug:
            results = one_by_one()
        elif engine == "ray":
            results = on_ray(synth, tasks, out, workers=workers, devices=devices, threads=threads)
        elif count_of_workers > 1:
            results = in_processes(
                synth, tasks, out, workers=count_of_workers, devices=devices, threads=threads
            )
        else:
            results = one_by_one()
        fruitless = True  # as long as every scan has reasons for no tumour, and none is chance
        for result in results:
            fruitless &= _fruitless(result)
            progress.end()
            pace = clock.tick()
            where = f" [{pace}]" if len(tasks) > 1 else ""
            if result.error is None:
                print(summary(result.name, result.records) + where, flush=True)
            else:
                failed += 1
                fail(f"{result.name}: {result.error}", 1)
                if result.fatal:
                    stopped = result.fatal
                    break
    print(f"wrote {number(clock.done - failed, 'scan')} to {out}")
    if stopped:
        words = f"stopped, {number(clock.total - clock.done, 'scan')} not tried"
        raise typer.Exit(fail(f"{words}; {stopped}, and give the same command to go on", 1))
    if failed:
        raise typer.Exit(fail(f"{failed} of {len(cases)} scans failed", 1))
    if tasks and fruitless:
        raise typer.Exit(fail("no scan got a tumour; the reasons stand above", 1))


def _fruitless(result: Outcome) -> bool:
    """Whether a scan was to get tumours and got none: not where p or count left it alone."""
    asked = [r for r in result.records if not str(r.get("reason")).startswith("left alone")]
    return bool(asked) and not any(r.get("applied", True) for r in asked)
