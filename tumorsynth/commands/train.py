"""``tumorsynth train``: every field of the configs in `tumorsynth.training.config` is a flag."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tumorsynth.commands.organs import (
    LabelMapOption,
    Organ,
    OrganLabel,
    organs_of_annotated,
)
from tumorsynth.commands.scan_options import Channel
from tumorsynth.commands.shared import Geometry, Overwrite, SameGrid, parse_intensity, say
from tumorsynth.scans.annotated import read_annotated
from tumorsynth.scans.nifti import Reading
from tumorsynth.training.config import (
    PRESETS,
    AutoencoderTraining,
    DataConfig,
    DenoiserTraining,
    Hardware,
    configured,
    field_type,
)

app = typer.Typer(
    help="Train a generator: an autoencoder on any CT, then a denoiser on annotated tumours.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Data = Annotated[
    Path,
    typer.Argument(
        help='dataset.json ({"training": [{"image": ..., "label": ...}, ...]}), a pack (.npz), or '
        "a folder of CTs, also in the layout of a public data set (docs/layouts.md)"
    ),
]
Labels = Annotated[
    Path | None, typer.Option(help="Folder of the label maps, if DATA is a folder of CTs.")
]
MaskOrgan = Annotated[
    list[str] | None,
    typer.Option(
        "--organ",
        help="Where DATA has one file per organ (TotalSegmentator, AbdomenAtlas): the organ, which "
        "becomes label 1; repeat the option for several. ORGAN_tumor.nii.gz is the next label.",
        show_default=False,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="tiny: a trial on a CPU; light: as the bundled generators; lung: light, in a window "
        "from -1000 HU; base: the published sizes."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in OUT.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")]
Licence = Annotated[str | None, typer.Option(help="Terms of use, written into the card.")]


def with_flags(*kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for every field of some dataclasses, passed as keywords."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = []
        for kind in kinds:
            for f in fields(kind):
                words = f.metadata["help"]
                if f.metadata["choices"]:
                    words += f" One of {', '.join(f.metadata['choices'])}."
                if "[default:" not in words:
                    word = "light" if "Training" in kind.__name__ else "default"
                    words += f" [{word}: {f.default}]"
                option = typer.Option(
                    "--" + f.name.replace("_", "-"), help=words, show_default=False
                )
                flags.append(
                    inspect.Parameter(
                        f.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=None,
                        annotation=Annotated[field_type(f.type) | None, option],
                    )
                )

        def run(**given: Any) -> None:
            command(**given)

        run.__signature__ = signature.replace(parameters=own + flags)  # type: ignore[attr-defined]
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        # typer reads both
        run.__annotations__ = {p.name: p.annotation for p in own + flags}
        return run

    return decorate


@app.command()
@with_flags(AutoencoderTraining, Hardware)
def autoencoder(
    *,
    data: Data,
    out: Out,
    labels: Labels = None,
    channel: Channel = None,
    geometry: Geometry = None,
    same_grid: SameGrid = False,
    preset: Preset = "light",
    resume: Resume = False,
    init: Annotated[
        str | None, typer.Option(help="Folder of a trained autoencoder to start from.")
    ] = None,
    licence: Licence = None,
    **given: Any,
) -> None:
    """Train stage 1, an autoencoder, on CTs with or without labels.

    Writes a folder for --autoencoder of `tumorsynth train denoiser`. To resume an interrupted run,
    give the same command with --resume.
    """
    config = configured(AutoencoderTraining, _preset("autoencoder", preset), given)
    hardware = configured(Hardware, {}, given)
    from tumorsynth.training.autoencoder import train
    from tumorsynth.training.reading import load_data

    card = {"licence": licence} if licence else {}
    cases = partial(
        load_data, data, labels, Reading(geometry, same_grid), channel=channel
    )  # read after everything else is checked
    train(cases, out, config, hardware, resume=resume, init=init, card=card)
    _wrote(f"{out}; use it with tumorsynth train denoiser ... --autoencoder {out}")


@app.command()
@with_flags(DenoiserTraining, DataConfig, Hardware)
def denoiser(
    *,
    data: Data,
    out: Out,
    autoencoder: Annotated[
        str,
        typer.Option(help="Folder of an autoencoder or a generator, or a bundled generator's name"),
    ],
    labels: Labels = None,
    channel: Channel = None,
    geometry: Geometry = None,
    same_grid: SameGrid = False,
    preset: Preset = "light",
    resume: Resume = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the generator. [default: the folder's]")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Generator to start from.")] = None,
    licence: Licence = None,
    **given: Any,
) -> None:
    """Train stage 2, a denoiser, on annotated tumours with an autoencoder.

    Writes a generator folder, for --generator OUT and ts.load_generator(OUT). To resume an
    interrupted run, give the same command with --resume.
    """
    config = configured(DenoiserTraining, _preset("denoiser", preset), given)
    which, hardware = configured(DataConfig, {}, given), configured(Hardware, {}, given)
    from tumorsynth.training.denoiser import train
    from tumorsynth.training.reading import load_data

    card = {k: v for k, v in {"name": name, "licence": licence}.items() if v}
    cases = partial(
        load_data, data, labels, Reading(geometry, same_grid), channel=channel
    )  # read after everything else is checked
    train(cases, autoencoder, out, config, which, hardware, resume=resume, init=init, card=card)
    _wrote(f"{out}; use it with --generator {out}")


@app.command()
def pack(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help=".npz file to write.")],
    labels: Labels = None,
    channel: Channel = None,
    organ: MaskOrgan = None,
    geometry: Geometry = None,
    same_grid: SameGrid = False,
) -> None:
    """Pack all scans into one file, for machines without nibabel."""
    if out.suffix != ".npz":
        raise ValueError(f"a pack's name must end in .npz, got {out}; rename it")
    from tumorsynth.training.data import save_pack
    from tumorsynth.training.reading import load_data

    cases = load_data(data, labels, Reading(geometry, same_grid), organ or (), channel)
    save_pack(cases, out)
    for case in cases:
        size = " x ".join(str(n) for n in case.hu.shape)
        print(
            f"{case.name}: {size} mm{'' if case.label is None else ', annotated'}"
            f"{', held out' if case.held_out else ''}"
        )
    print(f"wrote {out}")


@app.command()
def bank(
    data: Annotated[
        Path,
        typer.Argument(
            help='dataset.json ({"training": [{"image": ..., "label": ...}, ...]}; what it lists '
            "under validation stays out), or a folder of CTs, also in the layout of a public data "
            "set (docs/layouts.md); of one file per organ, ORGAN_tumor.nii.gz holds the tumours"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help=".safetensors file to write.")],
    labels: Labels = None,
    channel: Channel = None,
    tumor_label: Annotated[
        int | None,
        typer.Option(
            help="Label value of tumours. [default: that of the label map's or dataset.json's "
            "tumours, or 2]",
            show_default=False,
        ),
    ] = None,
    organ_label: OrganLabel = None,
    organ: Organ = None,
    label_map: LabelMapOption = None,
    intensity: Annotated[
        str, typer.Option(help="Scale of the images: hu, or A_MIN,A_MAX,B_MIN,B_MAX.")
    ] = "hu",
    name: Annotated[
        str | None, typer.Option(help="Name of the bank, in reports. [default: the file's]")
    ] = None,
    terms: Annotated[
        str | None, typer.Option(help="Terms of use of the scans, written into the card.")
    ] = None,
    geometry: Geometry = None,
    same_grid: SameGrid = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut the tumours out of annotated scans, to paste them into others.

    Writes a bank, for --generator OUT and ts.CopyPaste.load(OUT). It holds voxels of the scans.
    Prints each lesion with its diameter, and the HU between its core and the organ around it.
    """
    from tumorsynth.generators.bank import check_bank_path
    from tumorsynth.generators.copy_paste import TERMS, CopyPaste
    from tumorsynth.scans.layouts import Found
    from tumorsynth.scans.pairing import Pair
    from tumorsynth.training.sources import dataset_beside, find_sources

    check_bank_path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another file or add --overwrite")
    sources = [one for one in find_sources(data, labels, channel=channel) if not one.held_out]
    annotated = [(one.name, one.image, one.label) for one in sources if one.label is not None]
    organs = organs_of_annotated(
        Found([Pair(*files) for files in annotated], dataset_beside(data)),
        organ_label=organ_label,
        organ=organ,
        label_map=label_map,
        tumor_label=tumor_label,
    )
    if organs.masks is not None:
        annotated = [files for files in annotated if organs.masks.has_tumors(files[2])]
    if len(annotated) < len(sources):
        lacking = len(sources) - len(annotated)
        what = "label map" if organs.masks is None else f"file {organs.masks.tumor}"
        say(f"note: {lacking} of {len(sources)} scans have no {what}")
    if not annotated:
        fix = "give their folder as --labels"
        if organs.masks is not None:
            fix = f"name the masks of the tumours {organs.masks.tumor}.nii.gz"
        raise ValueError(f"{data} must have annotated scans, but none has a {what}; {fix}")
    scans = read_annotated(
        annotated, Reading(geometry, same_grid), parse_intensity(intensity), organs.masks
    )
    made = CopyPaste.from_scans(
        scans,
        organs.tumor_label,
        organs.masks.organ_labels if organs.masks else organs.organ_labels,
        name=name or out.stem,
        terms=terms or TERMS,
    )
    made.save(out)
    for lesion in made.lesions:
        print(f"{lesion.source}: {lesion.diameter_mm:.1f} mm, core {lesion.contrast_hu:+.0f} HU")
    for reason in made.card["left_out"]:
        say(f"note: left out: {reason}")
    _wrote(f"{out} with {len(made.lesions)} lesions; use it with --generator {out}")


def _preset(stage: str, name: str) -> dict[str, Any]:
    presets = PRESETS[stage]
    if name not in presets:
        raise ValueError(f"--preset must be {' or '.join(presets)}, got {name!r}; give one of them")
    return presets[name]


def _wrote(words: str) -> None:
    """Print on the first of several processes only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"wrote {words}")
