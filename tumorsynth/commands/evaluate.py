"""``tumorsynth evaluate`` and ``healthy``: score predictions, and pick healthy scans."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tumorsynth
from tumorsynth.atomic_writes import write_atomic
from tumorsynth.commands.organs import LabelMapOption, Organ, OrganLabel, values_of
from tumorsynth.commands.score_tables import case_table, froc_table, right, summary_table
from tumorsynth.commands.shared import Geometry, SameGrid, say
from tumorsynth.scans.errors import describe_error
from tumorsynth.scans.nifti import Reading

TumorLabel = Annotated[int, typer.Option(help="Label value of tumours.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]

T = TypeVar("T")


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(help="Folder of predicted label or probability maps, or a single one."),
    ],
    labels: Annotated[Path, typer.Argument(help="Folder of the real label maps, or a single one.")],
    *,
    tumor_label: TumorLabel = 2,
    organ_label: OrganLabel = None,
    organ: Organ = None,
    label_map: LabelMapOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
    bootstrap: Annotated[
        int,
        typer.Option(
            help="Resamplings of the cases for the confidence intervals; 0: no intervals."
        ),
    ] = 1000,
    early_mm: Annotated[
        float, typer.Option(help="Tumours below this equivalent diameter, in mm, count as early.")
    ] = 20.0,
    tolerance_mm: Annotated[
        float, typer.Option(help="Tolerance of the surface Dice, in mm.")
    ] = 2.0,
    least_iou: Annotated[
        float,
        typer.Option(help="IoU from which a tumour counts as detected; 0: one common voxel."),
    ] = 0.0,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities", help="Predictions are maps of the probability of tumour, 0 to 1."
        ),
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Probability from which a voxel is predicted as tumour.")
    ] = 0.5,
    candidate_threshold: Annotated[
        float,
        typer.Option(help="Probability from which voxels form the candidates of FROC."),
    ] = 0.1,
    inside_organ: Annotated[
        bool,
        typer.Option("--inside-organ", help="Score inside the label's organ and tumours only."),
    ] = False,
    inside: Annotated[
        Path | None,
        typer.Option(
            help="Score inside these organs only: folder of label maps named like the "
            "predictions, or a single one, in which --organ-label and --tumor-label count."
        ),
    ] = None,
    fp_rate: Annotated[
        list[float],
        typer.Option(
            help="False positives a scan at which sensitivity is compared. Repeat the option for "
            "several."
        ),
    ] = [0.25, 0.5, 1, 2, 4, 8],  # noqa: B006 (typer copies it)
    size_edge: Annotated[
        list[float],
        typer.Option(
            help="Equivalent diameter in mm at which a bin of sizes ends. Repeat the option for "
            "several."
        ),
    ] = [10, 20],  # noqa: B006
    froc_plot: Annotated[
        Path | None, typer.Option(help="PNG, SVG or PDF of the FROC curve to write.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the resamplings.")] = 0,
    geometry: Geometry = None,
    same_grid: SameGrid = False,
    each: Annotated[bool, typer.Option("--each", help="Print a row per case, too.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Score predictions against the real label maps.

    Pairs .nii[.gz] by name (without a trailing _label; NAME_ct beside NAME_label is a CT and left
    out) and prints means over cases with 95 % intervals: Dice, surface Dice, HD95, and per tumour
    the detections and false positives; then the sensitivity at rates of false positives a scan
    (FROC), over all tumours and by size. Both maps must lie on one grid. A case that fails is
    reported and skipped, and the exit code is 1. docs/evaluation.md defines every score.
    """
    from tumorsynth.evaluation.detection import check_thresholds
    from tumorsynth.evaluation.folders import find_comparisons, label_values, score
    from tumorsynth.evaluation.froc import check_rates, check_size_edges, froc_summary
    from tumorsynth.evaluation.froc_plot import check_plot_path, save_froc_plot
    from tumorsynth.evaluation.metrics import check_settings, summary

    check_settings(early_mm=early_mm, tolerance_mm=tolerance_mm, least_iou=least_iou)
    check_thresholds(candidate_threshold, threshold, least_iou, tolerance_mm)
    rates, edges = check_rates(fp_rate), check_size_edges(size_edge)
    organs = values_of(organ_label, organ, label_map)
    _check_labels(tumor_label, organs)
    if inside_organ and inside is not None:
        raise ValueError("--inside-organ and --inside name two regions; give one of them")
    reading = Reading(geometry, same_grid)
    for path in (out, froc_plot):
        _check_new(path, overwrite)
    if froc_plot is not None:
        check_plot_path(froc_plot)
        from tumorsynth.scans.preview import require_matplotlib  # imports torch

        require_matplotlib()
    pairs, waiting = find_comparisons(predictions, labels, inside)
    settings = {"early_mm": early_mm, "tolerance_mm": tolerance_mm, "least_iou": least_iou}
    options: dict[str, Any] = {
        "tumor_label": tumor_label,
        "organ_labels": organs,
        "probabilities": probabilities,
        "threshold": threshold,
        "candidate_threshold": candidate_threshold,
        "inside_organ": inside_organ,
        **settings,
    }
    cases, failed = _for_each(
        pairs, lambda pair: score(pair, reading, **options), catch=predictions.is_dir()
    )
    if waiting:
        say(f"note: {len(waiting)} of the labels have no prediction ({waiting[0]}, ...)")
    scores = summary([case.scores for case in cases.values()], bootstrap, seed)
    matches = {name: case.matches for name, case in cases.items()}
    froc = None
    if cases:
        froc = froc_summary(list(matches.values()), rates, edges, bootstrap, seed)
        if froc["tumors_outside"]:
            say(f"note: {froc['tumors_outside']} tumours lie outside the organ and are left out")
    if cases and not scores["cases_with_tumor"]:
        label = next(pair.label for pair in pairs if pair.name in cases)
        held = ", ".join(map(str, label_values(label, reading)))
        say(
            f"note: no label holds {tumor_label} = --tumor-label, so that only specificity and "
            f"false positives are scored ({label.name} holds {held}); if the scans have tumours, "
            "give their value"
        )
    others = [pair for pair in pairs if pair.name in cases and cases[pair.name].holds_other]
    if (
        others
        and scores["cases_with_tumor"]
        and not any(case.holds_tumor for case in cases.values())
    ):
        prediction = others[0].prediction
        held = ", ".join(map(str, label_values(prediction, reading)))
        say(
            f"note: no prediction holds {tumor_label} = --tumor-label, so that no tumour counts as "
            f"found ({prediction.name} holds {held}); if tumours are predicted, write them with "
            "the value that the labels give them"
        )
    if froc is not None:
        if each:
            Console().print(case_table({name: case.scores for name, case in cases.items()}))
        Console().print(summary_table(scores, settings))
        Console().print(froc_table(froc))
    if out is not None:
        document = {
            "tumorsynth": tumorsynth.__version__,
            "settings": {
                **options,
                "inside": None if inside is None else str(inside),
                "bootstrap": bootstrap,
                "seed": seed,
            },
            "summary": scores,
            "froc": froc,
            "cases": {
                name: {**case.scores.as_dict(), "matches": case.matches.as_dict()}
                for name, case in cases.items()
            },
            "failed": failed,
            "labels_without_prediction": waiting,
        }
        _write(out, document)
    if froc_plot is not None and froc is not None:
        if froc["tumors"]:
            save_froc_plot(froc_plot, {predictions.name: list(matches.values())}, rates)
            print(f"wrote {froc_plot}")
        else:
            say("note: no FROC plot, since no label has a tumour")
    _end(failed, len(pairs))


def _check_labels(tumor_label: int, organ_label: list[int]) -> None:
    if tumor_label in organ_label or 0 in (tumor_label, *organ_label):
        raise ValueError(
            "--tumor-label and --organ-label must differ, and 0 is the background, got "
            f"{tumor_label} and {', '.join(map(str, organ_label))}; give the values in your maps"
        )


def healthy(
    predictions: Annotated[
        Path, typer.Argument(help="Folder of label maps that a segmenter predicted.")
    ],
    cts: Annotated[
        Path | None, typer.Argument(help="Folder of the CTs, with the same names.")
    ] = None,
    *,
    tumor_label: TumorLabel = 2,
    organ_label: OrganLabel = None,
    organ: Organ = None,
    label_map: LabelMapOption = None,
    organ_ml: Annotated[
        float, typer.Option(help="Least predicted organ volume, in ml, over all organ labels.")
    ] = 20.0,
    tumor_ml: Annotated[float, typer.Option(help="Most predicted tumour volume, in ml.")] = 0.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON list to write.")] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="Decathlon dataset.json to write: the healthy CTs, with predictions as labels."
        ),
    ] = None,
    geometry: Geometry = None,
    overwrite: Overwrite = False,
) -> None:
    """Pick healthy scans by a segmenter's predictions.

    A scan is healthy if enough organ and not too much tumour is predicted. Synthetic tumours can
    then go into scans without real ones, as in the paper.
    """
    from tumorsynth.evaluation.folders import decathlon, find_scans, volumes_ml, why_not_healthy

    if dataset is not None and cts is None:
        raise ValueError("--dataset lists CTs: the folder of the CTs is needed as 2nd argument")
    organs = values_of(organ_label, organ, label_map)
    _check_labels(tumor_label, organs)
    if not (organ_ml >= 0 and tumor_ml >= 0):
        raise ValueError(
            f"--organ-ml and --tumor-ml must be 0 or more, got {organ_ml}, {tumor_ml}; give "
            "volumes in ml"
        )
    for path in (out, dataset):
        _check_new(path, overwrite)
    reading = Reading(geometry)
    scans = find_scans(predictions, cts)
    volumes, failed = _for_each(scans, lambda scan: volumes_ml(scan, tumor_label, organs, reading))
    table = Table("scan", right("organ, ml"), right("tumour, ml"), "healthy?")
    picked, rows = [], []
    for scan in scans:
        if scan.name not in volumes:
            continue
        volume, tumor = volumes[scan.name]
        reason = why_not_healthy(volume, tumor, least_organ_ml=organ_ml, most_tumor_ml=tumor_ml)
        table.add_row(scan.name, f"{volume:.0f}", f"{tumor:.2f}", reason or "yes")
        row = {"name": scan.name, "organ_ml": round(volume, 3), "tumor_ml": round(tumor, 4)}
        paths = {"prediction": str(scan.prediction), "ct": scan.ct and str(scan.ct)}
        rows.append({**row, "healthy": reason is None, "reason": reason, **paths})
        if reason is None:
            picked.append(scan)
    if rows:
        Console().print(table)
    print(f"{len(picked)} of {len(scans)} scans are healthy")
    if out is not None:
        settings = {
            "tumor_label": tumor_label,
            "organ_labels": organs,
            "organ_ml": organ_ml,
            "tumor_ml": tumor_ml,
        }
        listed = {"healthy": [scan.name for scan in picked], "scans": rows, "failed": failed}
        _write(out, {"tumorsynth": tumorsynth.__version__, "settings": settings, **listed})
    if dataset is not None:
        _write(dataset, decathlon(picked, dataset.parent))
    _end(failed, len(scans))


def _for_each(
    items: Sequence[Any], work: Callable[[Any], T], *, catch: bool = True
) -> tuple[dict[str, T], dict[str, str]]:
    """Results by name, and why other items failed; prints the failures. catch: continue then."""
    done: dict[str, T] = {}
    failed: dict[str, str] = {}
    for item in _progress(items):
        try:
            done[item.name] = work(item)
        except ModuleNotFoundError:  # every case would fail
            raise
        except Exception as error:
            if not catch:
                raise
            failed[item.name] = describe_error(error)
            say(f"{item.name}: {failed[item.name]}")
    return done, failed


def _progress(items: Sequence[Any]) -> Iterator[Any]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    yield from track(items, "cases", console=console, transient=True, disable=hidden)


def _check_new(path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"{path} must be a file in an existing folder; make the folder first")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another file or add --overwrite")


def _write(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))
    print(f"wrote {path}")


def _end(failed: dict[str, str], count: int) -> None:
    if failed:
        say(f"{len(failed)} of {count} scans failed")
        raise typer.Exit(1)
