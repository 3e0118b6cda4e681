"""A run of `synthesize`: what is left to do, doing it, and what belongs to the run as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tumorsynth.commands.organs import Organs
from tumorsynth.commands.outcomes import report_outcomes
from tumorsynth.commands.pictures import without_view, write_pictures
from tumorsynth.commands.progress import Steps, progress_bar
from tumorsynth.scans import dataset_json
from tumorsynth.scans.collection import (
    Outcome,
    Task,
    process_scan,
    run_in_processes,
    try_scan,
)
from tumorsynth.scans.follow_up import FollowUp, expand, results_by_folder
from tumorsynth.scans.layouts import Found
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.outputs import (
    find_unfinished,
    folder_lock,
    mark_unfinished,
    output_paths,
    remove_partial_files,
)
from tumorsynth.scans.pairing import Pair
from tumorsynth.scans.run_settings import explain_mismatch, run_settings
from tumorsynth.scans.segmentation import Segmenter

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor


@dataclass(frozen=True)
class Run:
    """The scans of a run, and how to process them.

    Args:
        found: the scans.
        organs: the values of organ and tumours, or the files of the organs.
        out: the folder of the results.
        factors: of the diameter at each point in time; none without a series.
        seed: of the first scan.
        reading: how to read the files.
        if_taken: see `Task`.
        segmenter: makes the label maps; None where there are some.
        several: whether it was a folder of scans.
        overwrite: whether to replace earlier results.
        html: whether to write the page before and after.
        contact_sheet: whether to write the contact sheet.
    """

    found: Found
    organs: Organs
    out: Path
    factors: tuple[float, ...]
    seed: int
    reading: Reading
    if_taken: str
    segmenter: Segmenter | None
    several: bool
    overwrite: bool
    html: bool
    contact_sheet: bool

    @cached_property
    def series(self) -> list[tuple[Pair, FollowUp | None]]:
        """Each scan at each point in time."""
        return expand(self.found.pairs, self.factors)

    @property
    def pairs(self) -> list[Pair]:
        """The same without the points."""
        return [pair for pair, _ in self.series]

    def seed_of(self, k: int) -> int:
        """Return the seed of the k-th of ``series``: one for all points of a scan."""
        return self.seed + k // max(1, len(self.factors))

    @property
    def resumes(self) -> bool:
        """Whether finished scans stay as they are: in a folder, and to add pictures."""
        return self.several or self.html or self.contact_sheet

    def check_out(self) -> None:
        """Raise ValueError if results of one scan would replace others, before anything is read."""
        if not self.resumes:
            find_unfinished(self.pairs, self.out, overwrite=self.overwrite)

    def prepare(self, context: typer.Context, synth: SynthesizeTumor) -> list[Task]:
        """Make and tidy the folder of the results, and return what is left to do."""
        pairs = self.pairs
        if self.resumes:
            unfinished = self._prepare_folder(context, synth)
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            remove_partial_files(pairs, self.out)
            unfinished = list(range(len(pairs)))
        if self.html:
            lacking = without_view(self.out, [pair.name for pair in pairs])
            unfinished = sorted({*unfinished, *lacking})
        if len(unfinished) < len(pairs):
            print(f"{len(pairs) - len(unfinished)} of {len(pairs)} scans are finished already")
        return [
            Task(
                pairs[k],
                self.seed_of(k),
                self.reading,
                self.if_taken,
                not self.several,
                self.organs.masks,
                self.segmenter,
                self.html,
                self.series[k][1],
            )
            for k in unfinished
        ]

    def _prepare_folder(self, context: typer.Context, synth: SynthesizeTumor) -> list[int]:
        """Tidy the folder of the results; returns the indices of the unfinished scans.

        A run of several scans locks it; runs of one scan each may share it.
        """
        pairs, out = self.pairs, self.out

        def mismatch(k: int, report: Path) -> str | None:
            pair, follow_up = self.series[k]
            settings = run_settings(
                synth,
                ct=pair.ct.name,
                label=pair.label.name,
                seed=self.seed_of(k),
                geometry=self.reading.geometry,
                masks=self.organs.masks,
                follow_up=follow_up,
            )
            return explain_mismatch(report, settings)

        existed = out.is_dir()
        if existed and self.several:
            context.with_resource(folder_lock(out))
        unfinished = find_unfinished(
            pairs, out, overwrite=self.overwrite, mismatch=mismatch, beside_scans=not self.several
        )
        out.mkdir(parents=True, exist_ok=True)
        if not existed and self.several:
            context.with_resource(folder_lock(out))
        remove_partial_files(pairs, out)
        if self.overwrite:
            mark_unfinished(pairs, out)
        return unfinished

    def process(
        self,
        synth: SynthesizeTumor,
        tasks: Sequence[Task],
        *,
        engine: str,
        workers: int | None,
        devices: Sequence[str],
        threads: int,
        debug: bool,
    ) -> None:
        """Process scans, print each outcome, and write what describes the results together.

        Args:
            synth: the transform.
            tasks: the scans.
            engine: "processes" or "ray".
            workers: processes; None for a default.
            devices: that the processes share.
            threads: of each process.
            debug: whether errors are raised.
        """
        processes = workers or len(devices)
        with progress_bar(len(tasks)) as progress:
            outcomes: Iterator[Outcome]
            if len(tasks) < 2 or debug or (engine == "processes" and processes == 1):
                catch = len(self.pairs) > 1 and not debug
                outcomes = _run_here(synth, tasks, self.out, progress, catch=catch)
            elif engine == "ray":
                from tumorsynth.scans.ray import run_on_ray

                outcomes = run_on_ray(
                    synth, tasks, self.out, workers=workers, devices=devices, threads=threads
                )
            else:
                outcomes = run_in_processes(
                    synth, tasks, self.out, workers=processes, devices=devices, threads=threads
                )
            try:
                report_outcomes(
                    outcomes, tasks, len(self.pairs), self.out, progress, self._earlier(tasks)
                )
            finally:
                self._write_datasets()
                names = [pair.name for pair in self.pairs]
                write_pictures(self.out, names, html=self.html, contact_sheet=self.contact_sheet)

    def _earlier(self, tasks: Sequence[Task]) -> Iterator[list[dict[str, Any]]]:
        """Yield the tumours of each report that was there before this run."""
        again = {task.pair.name for task in tasks}
        for pair in self.pairs:
            if pair.name not in again:
                report = output_paths(self.out, pair.name)["report"]
                yield json.loads(report.read_text(encoding="utf-8")).get("tumors", [])

    def _write_datasets(self) -> None:
        """Write the dataset.json of each data set of results that are there."""
        source = self.found.dataset
        if source is None:
            return
        for folder, scans in results_by_folder(self.found.pairs, self.series):
            reports = {name: output_paths(self.out, name)["report"] for _, name in scans}
            finished = [scan for scan, name in scans if reports[name].exists()]
            target = self.out / folder
            if finished or (target / dataset_json.NAME).exists():
                dataset_json.write_for_results(source, target, finished, self.organs.tumor_label)


def _run_here(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    progress: Steps,
    *,
    catch: bool,
) -> Iterator[Outcome]:
    """Process scans in this process. catch: turn errors into outcomes."""
    for task in tasks:
        progress.begin(task.pair.name)
        if catch:
            yield try_scan(synth, task, out, progress.step)
        else:
            records = process_scan(synth, task, out, progress.step)
            yield Outcome(task.pair.name, records)
