"""The command line: tumours into NIfTI files, one scan or a folder of them.

Exit codes: 0 all done; 1 some cases of a folder failed, or something unexpected happened; 2 bad
input. Errors are one line on stderr; ``--debug`` shows the traceback instead. torch is imported
by the commands that need it, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f'tumorsynth: no {error.name}: the commands need pip install "tumorsynth[cli]"')

import tumorsynth
from tumorsynth import nifti
from tumorsynth.bench import bench
from tumorsynth.cases import (
    check_outputs,
    find_pairs,
    forget,
    made_otherwise,
    output_paths,
    settings,
    sweep,
    synthesize_scan,
)
from tumorsynth.collection import (
    Clock,
    Outcome,
    Task,
    expected,
    in_processes,
    one_line,
    outcome,
    run_one,
)
from tumorsynth.evaluation.cli import evaluate, healthy
from tumorsynth.reader_study.cli import app as reader_study

if TYPE_CHECKING:
    from tumorsynth.intensity import HU, Scaled
    from tumorsynth.synthesizer import SynthesizeTumor

app = typer.Typer(
    help="Realistic synthetic tumours for 3-D CT, image and label.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STEPS = ("reading", "synthesising", "writing", "drawing")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. Expected errors become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # wherever it stands: the commands see it in front
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="tumorsynth", standalone_mode=False
        )
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 130)
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # typer's own: unknown option, missing argument
            place = getattr(getattr(error, "ctx", None), "command_path", "tumorsynth")
            return _fail(f"{error.format_message().rstrip('.')}; see {place} --help", 2)
        return _fail(one_line(error), 2 if expected(error) else 1)
    if code == 130:  # typer's own way of saying so
        return _fail("stopped", 130)
    return code if isinstance(code, int) else 0


def _fail(words: str, code: int) -> int:
    print(f"tumorsynth: {words}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(tumorsynth.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


# Shared options, so that every command says the same of the same word.
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
GeneratorName = Annotated[
    str | None,
    typer.Option(
        help="Bundled name, generator folder or hub id; `tumorsynth info` lists the bundled ones. "
        "[default: liver-early, or hu2023 where that does not ship]",
        show_default=False,
    ),
]
Count = Annotated[
    str | None,
    typer.Option(
        help="Tumours per scan: N, or LOW-HIGH to draw from. "
        "[default: 1-3; with --size-prior as many as real cases have]",
        show_default=False,
    ),
]
SizeMm = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Range of the equivalent diameter in mm. [default: 8 20]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Same seed, same tumours.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int,
    typer.Option(help="CPU threads per process; another number may change a diffusion's last bit."),
]


@app.command()
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
        from tumorsynth.ray import on_ray  # a missing package is said now
    cases = find_pairs(ct, label)
    scale = _intensity(intensity)
    if size_mm is not None and size_prior is not None:
        raise ValueError("--size-mm and --size-prior exclude each other; give one of them")
    devices = [name.strip() for name in device.split(",")]
    for each in devices:
        check_device(each)
    if workers is not None and workers < 1 or threads < 1:
        raise ValueError(f"--workers and --threads must be 1 or more, got {workers}, {threads}")
    folder = ct.is_dir()
    if not folder:
        check_outputs(cases, out, overwrite)
    synth = _synthesizer(
        generator=generator,
        organ_labels=tuple(organ_label),
        tumor_label=tumor_label,
        count=_count(count or "1-3") if count or size_prior is None else None,
        size_mm=size_prior or size_mm or (8.0, 20.0),
        p=p,
        blend=blend,
        contrast_hu=contrast_hu,
        mass_effect=_share(mass_effect),
        intensity=scale,
        device=devices[0],
        threads=threads,
    )

    def finished(k: int, report: Path) -> str | None:
        names = {"name": cases[k].ct.name, "label": cases[k].label.name}
        return made_otherwise(report, settings(synth, **names, seed=seed + k))

    todo = check_outputs(cases, out, overwrite, finished) if folder else [0]
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
    with _progress(len(tasks)) as progress:

        def one_by_one() -> Iterator[Outcome]:
            for task in tasks:
                progress.begin(task.pair.name)
                if len(cases) == 1 or debug:  # fails as a whole
                    yield Outcome(task.pair.name, run_one(synth, task, out, progress.step))
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
        placed = 0
        for result in results:
            placed += sum(bool(r.get("applied", True)) for r in result.records or ())
            progress.end()
            pace = clock.tick()
            where = f" [{pace}]" if len(tasks) > 1 else ""
            if result.error is None:
                print(_summary(result.name, result.records) + where, flush=True)
            else:
                failed += 1
                _fail(f"{result.name}: {result.error}", 1)
                if result.fatal:
                    stopped = result.fatal
                    break
    print(f"wrote {_number(clock.done - failed, 'scan')} to {out}")
    if clock.done > failed and not placed:
        print("tumorsynth: no scan got a tumour; the reasons stand above", file=sys.stderr)
    if stopped:
        words = f"stopped, {_number(clock.total - clock.done, 'scan')} not tried"
        raise typer.Exit(_fail(f"{words}; {stopped}, and give the same command to go on", 1))
    if failed:
        raise typer.Exit(_fail(f"{failed} of {len(cases)} scans failed", 1))


@app.command()
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
    from tumorsynth.replay import (
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
    synth = _synthesizer(
        generator=generator or bundled_generator(told),
        device=device or told.get("device", "cpu"),
        threads=told.get("threads", 1),
        **synthesizer_options(told),
    )
    same_generator(told, synth.handle.get(synth.compute_device or "cpu").card)
    mask.check_label_fits(synth.tumor_label)
    out.mkdir(parents=True, exist_ok=True)
    sweep([pair], out)
    with _progress(1) as progress:
        progress.begin(pair.name)
        made = synthesize_scan(
            synth, image, mask, out, pair.name, told["seed"], progress.step, params=told["params"]
        )
        progress.end()
    print(_summary(pair.name, made["tumors"]))
    for path in output_paths(out, pair.name).values():
        print(path)
    if told["tumorsynth"] != tumorsynth.__version__:
        _fail(f"note: made by version {told['tumorsynth']}, now {tumorsynth.__version__}", 0)
    known = told.get("voxels_sha256")
    if known is None:
        return
    differing = [k for k in ("new_ct", "new_label") if made["voxels_sha256"][k] != known.get(k)]
    if differing:
        words = " and ".join(k.removeprefix("new_") for k in differing)
        raise typer.Exit(
            _fail(f"the {words} of {pair.name} is not the report's to the last voxel", 1)
        )
    print("every voxel is as in the report")


@app.command()
def demo(
    out: Out = Path("tumorsynth-demo"),
    generator: GeneratorName = None,
    count: Annotated[str, typer.Option(help="Tumours: N, or LOW-HIGH to draw from.")] = "3",
    size_mm: SizeMm = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Put tumours into a phantom: no data needed.

    Makes an abdominal CT, synthesises tumours in its liver, writes what `synthesize` writes and
    says where the pictures are. Results of an earlier demo in OUT are replaced.
    """
    from tumorsynth.phantom import LABELS, make_phantom

    synth = _synthesizer(
        generator=generator,
        organ_labels=(LABELS["liver"],),
        tumor_label=max(LABELS.values()) + 1,
        count=_count(count),
        size_mm=size_mm or (12.0, 20.0),
        device=device,
    )
    out.mkdir(parents=True, exist_ok=True)
    with _progress(1) as progress:
        progress.begin("phantom")
        phantom = make_phantom(spacing=(1.0, 1.0, 1.5), seed=seed)
        stored = phantom.image[0].round().short().numpy()
        image = nifti.new_volume("phantom_ct.nii.gz", stored, phantom.affine)
        mask = nifti.new_volume("phantom_label.nii.gz", phantom.label[0].numpy(), phantom.affine)
        made = synthesize_scan(synth, image, mask, out, "phantom", seed, progress.step)
        print(_summary("phantom", made["tumors"]))
        progress.end()
    print(f"generator: {synth.handle.get(device).name}")
    for path in output_paths(out, "phantom").values():
        print(path)


@app.command()
def convert(
    autoencoder: Annotated[Path, typer.Argument(help="The published AutoencoderModel.ckpt.")],
    denoiser: Annotated[Path, typer.Argument(help="A published denoiser: liver_early.pt, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The generator folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn published checkpoints into a generator.

    Reads the published DiffTumor files and writes a folder of safetensors and a card, to be used
    with --generator FOLDER. Nothing in the checkpoints is executed. The published weights may not
    be redistributed, converted or not.
    """
    for path in (autoencoder, denoiser):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    if (out / "card.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a generator; choose another folder or add --overwrite")
    from tumorsynth.generator import Generator

    Generator.from_difftumor(autoencoder, denoiser).save(out)
    print(f"wrote {out}; use it with --generator {out}")


@app.command()
def info(
    name: Annotated[
        str | None, typer.Argument(help="Bundled name, generator folder or hub id.")
    ] = None,
) -> None:
    """Show and check a generator, or list all.

    Prints the card of NAME after checking its files against it; without NAME, the bundled ones.
    """
    from tumorsynth import weights

    names = weights.bundled_names() if name is None else [name]
    for each in names:
        generator = weights.load_generator(each)  # which checks the files against the card
        card = {k: v for k, v in generator.card.items() if k not in ("format", "config")}
        if name is None:
            default = "  (default)" if each == weights.default_generator() else ""
            print(f"{each}{default}: {card.get('description') or card.get('source', '')}")
            continue
        if each != weights.HANDCRAFTED:
            parts = {k: getattr(generator, k) for k in ("autoencoder", "denoiser")}
            card["parameters"] = {
                k: f"{sum(p.numel() for p in part.parameters()):,}" for k, part in parts.items()
            }
            folder = weights.find_folder(each)
            card["file"] = f"{(folder / weights.MODEL).stat().st_size / 1e6:.1f} MB, sha256 agrees"
        _print_card(card)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND ...")] = None,
) -> None:
    """Train a generator: autoencoder, denoiser, pack."""
    from tumorsynth.training.cli import app as commands  # not before: inference needs none of it

    command = typer.main.get_command(commands)
    command.main(words or ["--help"], prog_name="tumorsynth train", standalone_mode=False)


app.command()(evaluate)
app.command()(healthy)
app.command()(bench)

nnunet = typer.Typer(
    help="The trainer for nnU-Net v2: its folder, or a copy among nnU-Net's own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(nnunet, name="nnunet")
app.add_typer(reader_study, name="reader-study")


@nnunet.command()
def path() -> None:
    """Print the folder for the variable nnUNet_extTrainer (nnU-Net 2.8 and later)."""
    from tumorsynth import _nnunet_shim

    print(_nnunet_shim.folder())


@nnunet.command()
def install() -> None:
    """Copy the trainer's shim among the trainers of the installed nnU-Net (2.5 and later)."""
    from tumorsynth import _nnunet_shim

    print(_nnunet_shim.install())


def _print_card(value: dict[str, Any], indent: str = "") -> None:
    for key, entry in value.items():
        title = indent + str(key).replace("_", " ")
        if isinstance(entry, dict):
            print(f"{title}:")
            _print_card(entry, indent + "  ")
        elif isinstance(entry, (list, tuple)) and any(isinstance(e, (dict, str)) for e in entry):
            print(f"{title}:")
            for item in entry:
                print(f"{indent}  - {item}")
        else:
            print(f"{title}: {entry}")


def check_device(device: str) -> None:
    """ValueError for what is no device of this machine."""
    import torch

    from tumorsynth import devices

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must name a torch device, got {device!r}; try cpu") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there is no such GPU here; use --device cpu")
    devices.check_device(wanted)


def _synthesizer(
    *, generator: str | None, device: str, threads: int | None = None, **options: Any
) -> SynthesizeTumor:
    # now, and not after the work is done
    nifti.require_nibabel()
    from tumorsynth.preview import require_matplotlib

    require_matplotlib()
    import torch

    from tumorsynth.synthesizer import SynthesizeTumor
    from tumorsynth.weights import default_generator, load_generator

    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = torch.device(device)
    name = generator or default_generator()
    load_generator(name, wanted)  # damaged weights are said before any scan is read
    return SynthesizeTumor(generator=name, device=wanted, **options)


def _share(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(
            f"--mass-effect must be a share from 0 to 0.9, or auto, got {text!r}"
        ) from None


def _count(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"--count must be N or LOW-HIGH, as 3 or 1-3, got {text!r}") from None


def _intensity(text: str) -> HU | Scaled:
    from tumorsynth.intensity import HU, Scaled

    if text.lower() == "hu":
        return HU()
    try:
        a_min, a_max, b_min, b_max = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--intensity must be hu or four numbers as in -175,250,0,1, got {text!r}"
        ) from None
    return Scaled(a_min, a_max, b_min, b_max)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _summary(name: str, records: list[dict[str, Any]]) -> str:
    placed = [r for r in records if r.get("applied", True)]
    sizes = ", ".join(f"{r['diameter_mm']:.1f} mm" for r in placed[:10])
    sizes += ", ..." if len(placed) > 10 else ""
    words = f"{name}: {_number(len(placed), 'tumour')}" + (f" ({sizes})" if sizes else "")
    reasons = [str(r.get("reason")) for r in records if not r.get("applied", True)]
    return "; ".join([words, *dict.fromkeys(reasons)])


class _Progress:
    """Scans done, and the step of the scan at hand, on stderr; silent off a terminal."""

    def __init__(self, bar: Progress, total: int):
        self.bar = bar
        self.scans = bar.add_task("scans", total=total, visible=total > 1)
        self.task = bar.add_task("", total=len(STEPS))
        self.name, self.done = "", 0

    def begin(self, name: str) -> None:
        self.name, self.done = name, -1
        self.step()

    def step(self) -> None:
        self.done += 1
        words = f"{self.name}: {STEPS[self.done]}" if self.done < len(STEPS) else self.name
        self.bar.update(self.task, description=words, completed=self.done)

    def end(self) -> None:
        self.bar.advance(self.scans)


@contextmanager
def _progress(total: int) -> Iterator[_Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
    ) as bar:
        yield _Progress(bar, total)


if __name__ == "__main__":
    sys.exit(main())
