"""Tables of scores for ``tumorsynth evaluate``."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table

ROWS = {  # of the table: heading and decimals
    "dsc": ("tumour Dice", 3),
    "nsd": ("tumour surface Dice, {tolerance_mm:g} mm", 3),
    "hd95_mm": ("tumour HD95, mm", 1),
    "organ_dsc": ("organ Dice", 3),
    "sensitivity": ("sensitivity, by tumour", 3),
    "early_sensitivity": ("  of tumours under {early_mm:g} mm", 3),
    "false_positives_per_scan": ("false positives per scan", 2),
    "early_false_positives_per_scan": ("  under {early_mm:g} mm", 2),
    "specificity": ("specificity, by scan", 3),
}


def summary_table(scores: dict[str, Any], settings: dict[str, float]) -> Table:
    table = Table("", right("mean"), right("95 % interval"), "over")
    for key, (words, digits) in ROWS.items():
        entry = scores[key]
        value, interval = entry["value"], entry["ci95"]
        table.add_row(
            words.format(**settings),
            "-" if value is None else f"{value:.{digits}f}",
            "-" if interval is None else " to ".join(f"{v:.{digits}f}" for v in interval),
            _counted(entry["n"], entry["of"]),
        )
    return table


def _counted(n: int, of: str) -> str:
    """Format as "1 case", "2 cases" or "1 scan without tumour"."""
    what, *more = of.split(" ")
    return " ".join([str(n), what.removesuffix("s") if n == 1 else what, *more])


def case_table(cases: dict[str, Any]) -> Table:
    table = Table("case", *map(right, ("Dice", "NSD", "HD95", "organ", "found", "false")))
    for name, case in cases.items():
        table.add_row(
            name,
            *("-" if v is None else f"{v:.3f}" for v in (case.dsc, case.nsd)),
            "-" if case.hd95_mm is None else f"{case.hd95_mm:.1f}",
            "-" if case.organ_dsc is None else f"{case.organ_dsc:.3f}",
            f"{case.detected}/{case.tumors}",
            str(case.false_positives),
        )
    return table


def right(title: str) -> Column:
    return Column(title, justify="right")


def froc_table(froc: dict[str, Any]) -> Table:
    """Sensitivity at each rate of false positives, over all tumours and by size."""
    sizes = froc["tumors_by_size"]
    table = Table(
        *(right(title) for title in ("FP/scan", "sensitivity", "95 %")),
        *(right(f"{name}\n({count})") for name, count in sizes.items()),
        right("FP/scan,\nhealthy"),
    )
    for row in froc["rates"]:
        value, interval = row["sensitivity"]["value"], row["sensitivity"]["ci95"]
        table.add_row(
            f"{row['rate']:g}",
            _number(value),
            "-" if interval is None else "-".join(f"{v:.2f}" for v in interval),
            *(_number(row["by_size"][name]["value"]) for name in sizes),
            _number(row["healthy_false_positives_per_scan"]["value"], 2),
        )
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
