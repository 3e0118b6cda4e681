"""``tumorsynth reader-study``: blinded cases for readers, and the table of their answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tumorsynth.reader_study.blinding import Scan
    from tumorsynth.reader_study.server import Served
    from tumorsynth.reader_study.store import Store

app = typer.Typer(
    help="Real or synthetic? Blinded cases for readers, in a web page.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Positive = Annotated[
    str,
    typer.Option(help="real: sensitivity counts real cases called real; or synthetic."),
]


@app.command()
def serve(
    *,
    real: Annotated[Path, typer.Option(help="Folder of the scans with real tumours.")],
    synthetic: Annotated[Path, typer.Option(help="Folder of the scans with synthetic tumours.")],
    db: Annotated[Path, typer.Option(help="File of the study and its answers.")] = Path(
        "answers.sqlite"
    ),
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 takes a free one.")] = 8765,
    reader_name: Annotated[
        str | None,
        typer.Option(help="The only reader. [default: the page asks]", show_default=False),
    ] = None,
    real_labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the label maps. [default: NAME_label beside NAME_ct]",
            show_default=False,
        ),
    ] = None,
    synthetic_labels: Annotated[
        Path | None, typer.Option(help="The same, of the synthetic ones.", show_default=False)
    ] = None,
    tumor_label: Annotated[int, typer.Option(help="Label value of the lesions to mark.")] = 2,
    synthetic_tumor_label: Annotated[
        int | None,
        typer.Option(help="The same, of the synthetic ones, if another.", show_default=False),
    ] = None,
    lesions: Annotated[
        str, typer.Option(help="largest: one case per scan; each: one case per lesion.")
    ] = "largest",
    field_mm: Annotated[
        float | None,
        typer.Option(
            help="Show a cube of this edge around the lesion. [default: the whole scan]",
            show_default=False,
        ),
    ] = None,
    positive: Positive = "real",
) -> None:
    """Show blinded cases in a local web page and collect answers.

    Prints the address to open. Every change is saved at once; stop with Ctrl-C, and the same
    command goes on. Where the scans have label maps, the lesion is marked.
    """
    from tumorsynth.reader_study import server
    from tumorsynth.reader_study.blinding import find_scans
    from tumorsynth.reader_study.results import convention
    from tumorsynth.reader_study.store import Store

    convention(positive)  # refuses what is no side, before any scan is read
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
        cases = _prepare(store, found, lesions=lesions, field_mm=field_mm)
        study = server.Study(store, cases, reader_name, positive)
        print(f"{len(cases)} cases; answers go to {db}")
        print(f"open {server.address(study, place)}", flush=True)
        server.serve(study, place)
    print("stopped; the same command goes on")


def _prepare(
    store: Store,
    found: list[tuple[list[Scan], int]],
    *,
    lesions: str,
    field_mm: float | None,
) -> dict[str, Served]:
    """Blinded volumes by opaque id, of scans with the label value of their lesions; warns."""
    from tumorsynth.reader_study.blinding import Vault, blind, differences
    from tumorsynth.reader_study.server import Served

    vault = Vault()
    identities, traits, served = [], [], []
    for scans, value in found:
        for scan in scans:
            for case in blind(scan, tumor_label=value, lesions=lesions, field_mm=field_mm):
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
                "folders of different scans"
            )
    for words in differences(traits):
        typer.echo(f"tumorsynth: warning: {words}", err=True)
    return dict(zip(store.set_up(identities), served, strict=True))


@app.command()
def results(
    db: Annotated[Path, typer.Argument(help="The file of the answers.")],
    *,
    positive: Positive = "real",
    interval: Annotated[
        str, typer.Option(help="95 % interval: wilson, or exact (Clopper-Pearson).")
    ] = "wilson",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.", show_default=False)
    ] = None,
) -> None:
    """The table: sensitivity, specificity and accuracy, per reader and together.

    Counts readers who have answered all cases and closed their answers.
    """
    from tumorsynth.reader_study.results import study_results
    from tumorsynth.reader_study.store import Store
    from tumorsynth.scans.nifti import write_atomic

    with contextlib.closing(Store(db, write=False)) as store:
        found = study_results(store, positive=positive, interval=interval)
    for reader in found["unfinished"]:
        typer.echo(
            f"tumorsynth: {reader['reader']} has answered {reader['answered']} cases and not "
            "finished, and is not counted",
            err=True,
        )
    if not found["rows"]:
        raise ValueError(f"no reader has finished in {db}; there is no table yet")
    heading, *body = found.pop("table")
    widths = [max(len(line[k]) for line in [heading, *body]) for k in range(len(heading))]
    for line in [heading, ["-" * w for w in widths], *body]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")
    print(f"{found['convention']}; in %, {found['interval']} interval")
    if json_file is not None:
        text = json.dumps(found, indent=2) + "\n"
        write_atomic(json_file, lambda file: file.write(text.encode()))
