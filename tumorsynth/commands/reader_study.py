"""``tumorsynth reader-study``: show blinded cases to readers, and tabulate their answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tumorsynth.commands.shared import Geometry, SameGrid
from tumorsynth.scans.nifti import Reading

if TYPE_CHECKING:
    from tumorsynth.reader_study.blinding import Scan
    from tumorsynth.reader_study.server import Served
    from tumorsynth.reader_study.store import Store

app = typer.Typer(
    help="Run a blinded study: do readers tell real from synthetic tumours?",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Positive = Annotated[
    str,
    typer.Option(help="Which cases sensitivity is about: real or synthetic."),
]


@app.command()
def serve(
    *,
    real: Annotated[Path, typer.Option(help="Folder of the scans with real tumours.")],
    synthetic: Annotated[Path, typer.Option(help="Folder of the scans with synthetic tumours.")],
    db: Annotated[Path, typer.Option(help="File for the study and its answers.")] = Path(
        "answers.sqlite"
    ),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: any free one.")] = 8765,
    reader_name: Annotated[
        str | None,
        typer.Option(help="Name of the only reader. [default: the page asks]", show_default=False),
    ] = None,
    real_labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the real scans' label maps. [default: NAME_label beside NAME_ct]",
            show_default=False,
        ),
    ] = None,
    synthetic_labels: Annotated[
        Path | None, typer.Option(help="The same for the synthetic scans.", show_default=False)
    ] = None,
    tumor_label: Annotated[int, typer.Option(help="Label value of the tumours to mark.")] = 2,
    synthetic_tumor_label: Annotated[
        int | None,
        typer.Option(
            help="The same for the synthetic scans. [default: as --tumor-label]", show_default=False
        ),
    ] = None,
    lesions: Annotated[
        str, typer.Option(help="largest: one case per scan; each: one case per tumour.")
    ] = "largest",
    field_mm: Annotated[
        float | None,
        typer.Option(
            help="Show a cube of this side, in mm, around the tumour. [default: the whole scan]",
            show_default=False,
        ),
    ] = None,
    positive: Positive = "real",
    geometry: Geometry = None,
    same_grid: SameGrid = False,
) -> None:
    """Show blinded cases in a local web page and collect answers.

    Prints the address to open, and saves every answer at once. Stop with Ctrl-C; the same command
    continues the study. If the scans have label maps, the tumour is marked.
    """
    from tumorsynth.reader_study import server
    from tumorsynth.reader_study.blinding import find_scans
    from tumorsynth.reader_study.results import convention
    from tumorsynth.reader_study.store import Store

    convention(positive)  # fail fast on an unknown value
    reading = Reading(geometry, same_grid)
    found = [
        (find_scans(real, "real", real_labels), tumor_label),
        (
            find_scans(synthetic, "synthetic", synthetic_labels),
            tumor_label if synthetic_tumor_label is None else synthetic_tumor_label,
        ),
    ]
    place = server.listen(port)
    store = Store(db)
    with place, contextlib.closing(store):
        cases = _prepare(store, found, lesions=lesions, field_mm=field_mm, reading=reading)
        study = server.Study(store, cases, reader_name, positive)
        print(f"{len(cases)} cases; answers go to {db}")
        print(f"open {server.address(study, place)}", flush=True)
        server.serve(study, place)
    print("stopped; the same command continues")


def _prepare(
    store: Store,
    found: list[tuple[list[Scan], int]],
    *,
    lesions: str,
    field_mm: float | None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> dict[str, Served]:
    """Blind the scans; prints differences between the sides that could give them away.

    Args:
        store: of the study.
        found: the scans of each side, with the label value of their tumours.
        lesions: "largest" or "each".
        field_mm: side of the cube to show; None: the whole scan.
        reading: what to do where files contradict themselves or each other.

    Returns:
        What the server shows, by an opaque id.
    """
    from tumorsynth.reader_study.blinding import Vault, blind, differences
    from tumorsynth.reader_study.server import Served

    vault = Vault()
    identities, traits, served = [], [], []
    for scans, value in found:
        for scan in scans:
            for case in blind(
                scan, tumor_label=value, lesions=lesions, field_mm=field_mm, reading=reading
            ):
                volume = case.nifti()
                digest = hashlib.sha256(volume).hexdigest()
                identities.append((scan.truth, case.source, digest))
                traits.append(case.traits)
                served.append(Served(vault.put(volume), case.mark))
    sides: dict[str, str] = {}
    for truth, source, digest in identities:
        if sides.setdefault(digest, truth) != truth:
            raise ValueError(
                f"no scan may be on both sides, but {source} is; give --real and --synthetic "
                "different scans"
            )
    for words in differences(traits):
        typer.echo(f"tumorsynth: warning: {words}", err=True)
    return dict(zip(store.set_up(identities), served, strict=True))


@app.command()
def results(
    db: Annotated[Path, typer.Argument(help="File of the study and its answers.")],
    *,
    positive: Positive = "real",
    interval: Annotated[
        str, typer.Option(help="95 % interval: wilson, or exact (Clopper-Pearson).")
    ] = "wilson",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write.", show_default=False)
    ] = None,
) -> None:
    """Print sensitivity, specificity and accuracy, per reader and together.

    Counts the readers who have answered all cases and finished.
    """
    from tumorsynth.atomic_writes import write_atomic
    from tumorsynth.reader_study.results import study_results
    from tumorsynth.reader_study.store import Store

    with contextlib.closing(Store(db, write=False)) as store:
        found = study_results(store, positive=positive, interval=interval)
    for reader in found["unfinished"]:
        typer.echo(
            f"tumorsynth: {reader['reader']} has answered {reader['answered']} cases, has not "
            "finished, and is not counted",
            err=True,
        )
    if not found["rows"]:
        raise ValueError(f"no reader has finished in {db}; run the table again when one has")
    heading, *body = found.pop("table")
    widths = [max(len(line[k]) for line in [heading, *body]) for k in range(len(heading))]
    for line in [heading, ["-" * w for w in widths], *body]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")
    print(f"{found['convention']}; in %, {found['interval']} interval")
    if json_file is not None:
        text = json.dumps(found, indent=2) + "\n"
        write_atomic(json_file, lambda file: file.write(text.encode()))
