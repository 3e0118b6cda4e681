"""Progress on stderr, and the line that sums up a scan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tumorsynth.arguments import format_beside
from tumorsynth.commands.shared import printable

STEPS = ("reading", "synthesising", "writing", "drawing")


def number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def summary(name: str, records: list[dict[str, Any]]) -> str:
    """Sum up a scan: its tumours and their sizes, and why others were skipped."""
    placed = [r for r in records if r.get("applied", True)]
    sizes = ", ".join(f"{r['diameter_mm']:.1f} mm" for r in placed[:10])
    sizes += ", ..." if len(placed) > 10 else ""
    words = f"{printable(name)}: {number(len(placed), 'tumour')}" + (f" ({sizes})" if sizes else "")
    if faint := faint_tumors(records):
        words += f", {len(faint)} hardly visible"
    if short := sum(not r.get("growth", {}).get("has_room", True) for r in placed):
        words += f", {short} without room for the new size"
    reasons = [str(r.get("reason")) for r in records if not r.get("applied", True)]
    return "; ".join([words, *dict.fromkeys(reasons)])


def faint_tumors(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tumours that are hardly visible; those of earlier versions, without a figure, are not."""
    from tumorsynth.appearance.visibility import is_faint  # imports torch

    return [r for r in records if r.get("applied", True) and is_faint(r.get("visibility"))]


def faint_note(faint: list[dict[str, Any]], tumors: int) -> str:
    """Say how many tumours of a run are hardly visible, and what to do.

    Args:
        faint: the records of those tumours, at least one.
        tumors: how many the run made.
    """
    from tumorsynth.appearance.visibility import VISIBLE_FROM

    lowest, highest = (f(r["visibility"] for r in faint) for f in (min, max))
    ends = [lowest] if len(faint) == 1 else [lowest, highest]
    values = " to ".join(format_beside(end, [VISIBLE_FROM]) for end in ends)
    return (
        f"{len(faint)} of {number(tumors, 'tumour')} {'is' if len(faint) == 1 else 'are'} hardly "
        f"visible over the scan's noise (visibility must be {VISIBLE_FROM:g} or more, got "
        f"{values}); give a stronger --contrast-hu or a larger --size-mm, or skip them with --gate"
    )


class Steps:
    """Bars for the scans, and for the steps of the scan in progress."""

    def __init__(self, bar: Progress, total: int):
        self.bar = bar
        self.scans = bar.add_task("scans", total=total, visible=total > 1)
        self.task = bar.add_task("", total=len(STEPS))
        self.name, self.done = "", 0

    def begin(self, name: str, words: str = "") -> None:
        """The next scan. words: its first step, if that is not reading."""
        self.name, self.done = name, -1
        self.step()
        if words:
            self.bar.update(self.task, description=f"{name}: {words}")
            if self.bar.disable:
                print(f"{name}: {words} ...", file=sys.stderr, flush=True)

    def step(self) -> None:
        self.done += 1
        words = f"{self.name}: {STEPS[self.done]}" if self.done < len(STEPS) else self.name
        self.bar.update(self.task, description=words, completed=self.done)

    def end(self) -> None:
        self.bar.advance(self.scans)


@contextmanager
def progress_bar(total: int) -> Iterator[Steps]:
    """Show progress on stderr; nothing if stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
    )
    # rich below 14.3 ends even a disabled bar with an empty line
    with bar if console.is_terminal else nullcontext():
        yield Steps(bar, total)
