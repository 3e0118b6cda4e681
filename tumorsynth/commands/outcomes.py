"""What `synthesize` prints of each scan and of the run, and with which exit code it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from tumorsynth.commands.progress import Steps, faint_note, faint_tumors, number, summary
from tumorsynth.commands.shared import fail, say
from tumorsynth.scans.collection import Clock, Outcome, Task

NOT_SELECTED = "not_selected"  # the skip code of what p, count or the caller left out


def report_outcomes(
    outcomes: Iterator[Outcome],
    tasks: Sequence[Task],
    scans: int,
    out: Path,
    progress: Steps,
    earlier: Iterator[list[dict[str, Any]]],
) -> None:
    """Print each outcome and the totals; exits with 1 if scans failed or none got a tumour.

    Args:
        outcomes: of this run.
        tasks: its scans.
        scans: the number of all scans, with those that were finished before.
        out: the folder of the results.
        progress: of the run.
        earlier: the tumours of each scan that was finished before.
    """
    failed, fatal, all_lack_tumors = 0, None, True
    faint: list[dict[str, Any]] = []
    tumors = 0
    clock = Clock(len(tasks))
    for outcome in outcomes:
        all_lack_tumors &= lacks_tumors(outcome.records)
        tumors += sum(record.get("applied", True) for record in outcome.records)
        faint += faint_tumors(outcome.records)
        progress.end()
        pace = clock.tick()
        if outcome.error is None:
            suffix = f" [{pace}]" if len(tasks) > 1 else ""
            print(summary(outcome.name, outcome.records) + suffix, flush=True)
        else:
            failed += 1
            fail(f"{outcome.name}: {outcome.error}", 1)
            if outcome.fatal:
                fatal = outcome.fatal
                break
    print(f"wrote {number(clock.done - failed, 'scan')} to {out}")
    if faint:
        say(faint_note(faint, tumors))
    if fatal:
        words = f"stopped, {number(clock.total - clock.done, 'scan')} not tried"
        raise typer.Exit(fail(f"{words}; {fatal}, and give the same command to resume", 1))
    if failed:
        raise typer.Exit(fail(f"{failed} of {scans} scans failed", 1))
    if all_lack_tumors and all(map(lacks_tumors, earlier)):
        raise typer.Exit(fail("no scan got a tumour; see the reasons above", 1))


def lacks_tumors(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a scan should have got tumours and got none; not if p or count left it out."""
    wanted = [record for record in records if not _is_not_selected(record)]
    return bool(wanted) and not any(record.get("applied", True) for record in wanted)


def _is_not_selected(record: dict[str, Any]) -> bool:
    code = record.get("code")
    if code is None:  # a record of an earlier version
        return str(record.get("reason")).startswith("left alone")
    return code == NOT_SELECTED
