"""Draw FROC curves. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.evaluation.detection import ScanMatches
from tumorsynth.evaluation.froc import RATES, froc_curve, sensitivity_at
from tumorsynth.scans.preview import require_matplotlib

FORMATS = ("png", "svg", "pdf")


def save_froc_plot(
    path: Path | str,
    methods: Mapping[str, Sequence[ScanMatches]],
    rates: Sequence[float] = RATES,
) -> None:
    """Draw the FROC curve of each method, with dots at the rates that are compared.

    Args:
        path: the .png, .svg or .pdf to write, completely or not at all.
        methods: matches of the scans, by the name of the method.
        rates: false positives a scan, the first of them above 0.

    Raises:
        ValueError: for another format, or a method without a real tumour.
    """
    path = Path(path)
    kind = check_plot_path(path)
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(rate for rate in rates if rate > 0) or list(RATES)
    low, high = shown[0] / 2, shown[-1] * 1.25
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, scans) in enumerate(methods.items()):
        curve = froc_curve(scans)
        # the staircase starts at the left edge and ends at the right one
        x = [low, *curve.false_positives.clip(low), max(high, curve.false_positives[-1])]
        first = float(curve.sensitivity[curve.false_positives <= low].max())
        y = [first, *curve.sensitivity.clip(first), curve.sensitivity[-1]]
        axes.step(x, y, where="post", color=f"C{number}", label=f"{name} ({len(scans)} scans)")
        dots = [sensitivity_at(scans, rate) or 0.0 for rate in shown]
        axes.plot(shown, dots, "o", color=f"C{number}", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.set_xticks([], minor=True)
    axes.set(
        xlim=(low, high),
        ylim=(-0.02, 1.02),
        xlabel="false positives a scan",
        ylabel="sensitivity, by tumour",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    write_atomic(path, lambda file: figure.savefig(file, format=kind, dpi=130))


def check_plot_path(path: Path) -> str:
    """Return the format that a path names; raise ValueError for one that is not drawn."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"the plot must be a .png, .svg or .pdf, got {path.name}; rename it")
    return kind
