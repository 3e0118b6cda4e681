"""Process many scans, in one process or several; the files are the same either way.

The parent process hands out one scan at a time and holds no image. When a worker dies, its scan is
tried once more.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from tumorsynth.scans.channel_layout import check_channels
from tumorsynth.scans.errors import describe_error, is_fatal
from tumorsynth.scans.follow_up import FollowUp
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_masks import OrganMasks, read_scan
from tumorsynth.scans.pairing import Pair
from tumorsynth.scans.scan import (
    check_label_map,
    check_organ,
    check_taken_label,
    synthesize_scan,
)
from tumorsynth.scans.segmentation import Segmenter
from tumorsynth.scans.volume_files import lacks_geometry

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from tumorsynth.scans.volume import Volume
    from tumorsynth.synthesizer import SynthesizeTumor

# above this share of NaN or infinite voxels in the organ, the run prints a note
MAX_SHARE_NOT_FINITE = 0.01


@dataclass(frozen=True)
class Task:
    """One scan, and how to process it.

    Attributes:
        pair: its files.
        seed: decides its tumours.
        reading: how to read the files.
        if_taken: what to do if the label map holds the tumours' value (see `check_taken_label`).
        organ_required: whether a label map without the organ is an error.
        masks: which files matter where the label is a folder of one file per organ.
        segmenter: makes the label map; None where there is one.
        view: whether to write its part of the page before and after.
        follow_up: the point in time, in a series.
    """

    pair: Pair
    seed: int
    reading: Reading = Reading()
    if_taken: str = "refuse"
    organ_required: bool = False
    masks: OrganMasks | None = None
    segmenter: Segmenter | None = None
    view: bool = False
    follow_up: FollowUp | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one scan.

    Attributes:
        name: of the scan.
        records: the tumours of its report; empty after an error.
        error: the error in one line, or None.
        fatal: what the user has to do before the run can continue, or None to continue.
        device_lost: the device works no more in this process; in a new process it may.
    """

    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    fatal: str | None = None
    device_lost: bool = False


def process_scan(
    synth: SynthesizeTumor,
    task: Task,
    out: Path,
    step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Read, synthesise and write one scan.

    Args:
        synth: the transform.
        task: the scan.
        out: an existing folder.
        step: called after each of reading, synthesising, writing and drawing.

    Returns:
        The tumours of the report, one record each.

    Raises:
        ValueError: for files that cannot be used; nothing is written.
    """
    check_channels(task.pair)
    pair, about_label = task.pair, None  # what is known about a label map made here
    if task.segmenter is not None:
        image, label, about_label = task.segmenter.read_scan(pair.ct, pair.label, task.reading)
    else:
        image, label = read_scan(pair.ct, pair.label, task.reading, task.masks)
    check_label_map(label, synth)
    label.check_label_fits(synth.tumor_label)
    if task.organ_required:
        check_organ(label, synth, segmented=about_label is not None)
    if task.masks is not None:
        task.masks.check_free(label, add=task.if_taken == "add")
        taken = None
    else:
        taken = check_taken_label(label, synth.organ_labels, synth.tumor_label, task.if_taken)
    synth.taken_label.close()  # as checked here
    notes = _notes(synth, image, label, task.reading)
    for note in (*([taken] if taken else []), *notes):
        print(f"tumorsynth: {task.pair.name}: {note}", file=sys.stderr)
    report = synthesize_scan(
        synth,
        image,
        label,
        out,
        pair.name,
        task.seed,
        step,
        geometry=task.reading.geometry,
        masks=task.masks,
        pair=pair,
        about_label=about_label,
        view=task.view,
        follow_up=task.follow_up,
    )
    return report["tumors"]


def _notes(synth: SynthesizeTumor, image: Volume, label: Volume, reading: Reading) -> Iterator[str]:
    """What is unusual about a scan, and need not be wrong."""
    if reading.geometry is None and lacks_geometry(image) and synth.unknown_size.first():
        yield (  # once for each process
            f"the header of {image.name} says voxels of 1 mm and no position, as libraries write "
            "that know neither; where voxels have another size, so will the tumours: repair the "
            "header, or add --geometry pixdim if it is right"
        )
    if image.stored.dtype.kind == "f":
        in_organ = image.stored[np.isin(label.integers(), synth.organ_labels)]
        not_finite = np.count_nonzero(~np.isfinite(in_organ))
        if not_finite > MAX_SHARE_NOT_FINITE * in_organ.size:
            yield (
                f"{not_finite / in_organ.size:.0%} of the organ's voxels in {image.name} are NaN "
                "or infinite; no tumour goes there"
            )


def try_scan(
    synth: SynthesizeTumor, task: Task, out: Path, step: Callable[[], None] = lambda: None
) -> Outcome:
    """Run `process_scan` and catch its error."""
    try:
        return Outcome(task.pair.name, process_scan(synth, task, out, step))
    except Exception as error:
        name, words = task.pair.name, describe_error(error)
        if is_fatal(error):
            return Outcome(name, error=words, fatal="make room")
        from tumorsynth.devices import is_lost

        if is_lost(error):
            words = f"the device was lost: {' '.join(str(error).split())[:200]}"
            return Outcome(name, error=words, fatal="see to the device", device_lost=True)
        return Outcome(name, error=words)


def run_in_processes(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    threads: int = 1,
) -> Iterator[Outcome]:
    """Process scans in several processes of this machine.

    Args:
        synth: the transform; every process gets a copy.
        tasks: the scans.
        out: an existing folder.
        workers: the number of processes.
        devices: the processes take turns with these.
        threads: CPU threads per process.

    Yields:
        The outcomes, in the order in which the scans finish.
    """

    def start(k: int) -> _ProcessWorker:
        return _ProcessWorker(synth, out, devices[k % len(devices)], threads)

    def wait_for_some(busy: list[_ProcessWorker]) -> list[_ProcessWorker]:
        pipes = wait([worker.pipe for worker in busy])
        return [worker for worker in busy if worker.pipe in pipes]

    return distribute(tasks, workers, start, wait_for_some)


class Worker(Protocol):
    """Another process, which processes one scan at a time."""

    task: Task | None  # the scan in progress

    def start(self) -> None:
        """Start the process again after its end."""

    def submit(self, task: Task) -> None:
        """Hand it a scan."""

    def result(self) -> Outcome | None:
        """The outcome of its scan; None if the process died."""

    def stop(self) -> str:
        """End the process at once, even within a scan, and say how it ended. May be repeated."""


W = TypeVar("W", bound=Worker)


def distribute(
    tasks: Sequence[Task],
    workers: int,
    start: Callable[[int], W],
    wait_for_some: Callable[[list[W]], list[W]],
) -> Iterator[Outcome]:
    """Distribute scans among workers.

    If a worker dies (out of memory, killed) or loses its device, a new worker tries the scan once
    more.

    Args:
        tasks: the scans.
        workers: at most so many are started.
        start: starts the k-th worker.
        wait_for_some: waits until some of the busy workers have a result or died, returns them.

    Yields:
        The outcomes, in the order in which the scans finish.
    """
    waiting = deque(tasks)
    retried: set[str] = set()
    pool: list[W] = []
    try:
        for k in range(min(workers, len(tasks))):
            pool.append(start(k))
            pool[-1].submit(waiting.popleft())
        while busy := [worker for worker in pool if worker.task is not None]:
            for worker in wait_for_some(busy):
                task = worker.task
                assert task is not None
                outcome = worker.result()
                if outcome is None or outcome.device_lost:
                    ended = worker.stop()
                    worker.start()
                    if task.pair.name not in retried:
                        outcome = None
                        retried.add(task.pair.name)
                        waiting.appendleft(task)
                    elif outcome is None:
                        words = (
                            f"its process died twice ({ended}), perhaps out of memory; "
                            "use fewer --workers"
                        )
                        outcome = Outcome(task.pair.name, error=words)
                if outcome is not None:
                    yield outcome
                if waiting:
                    worker.submit(waiting.popleft())
                else:
                    worker.stop()  # on a cluster, another worker may be waiting for its place
    finally:
        for worker in pool:
            worker.stop()


class _ProcessWorker:
    """A worker in a process of this machine."""

    def __init__(self, synth: SynthesizeTumor, out: Path, device: str, threads: int):
        self.arguments = synth, out, device, threads
        self.start()

    def start(self) -> None:
        # spawn: a fork would inherit torch's and CUDA's threads, and hang
        context = multiprocessing.get_context("spawn")
        self.task: Task | None = None
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(theirs, os.getpid(), *self.arguments), daemon=True
        )
        with _uninterrupted():  # Ctrl-C is for the parent, which stops its workers
            self.process.start()
        theirs.close()  # else the pipe would outlive the process

    def submit(self, task: Task) -> None:
        self.task = task
        try:
            self.pipe.send(task)
        except OSError:  # dead already; result() says so
            pass

    def result(self) -> Outcome | None:
        self.task = None
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def stop(self) -> str:
        self.pipe.close()
        self.process.join(5 if self.task is None else 0)
        if self.process.is_alive():  # within a scan; no half-written file can stay
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _work(
    pipe: Connection, parent: int, synth: SynthesizeTumor, out: Path, device: str, threads: int
) -> None:
    import torch

    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    synth.device = torch.device(device)
    try:
        while True:
            pipe.send(try_scan(synth, pipe.recv(), out))
    except (EOFError, OSError, KeyboardInterrupt):  # no scan is left, or the parent is gone
        pass


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Block Ctrl-C in processes started here; this process gets it when the block ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else it starts with the first process and unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with(parent: int) -> None:
    """End this process when its parent is gone, so that nothing goes on writing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Clock:
    """Estimates the time left from the pace so far."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.monotonic()

    def tick(self) -> str:
        """Count one more scan; returns "2 of 6, 40 s left"."""
        self.done += 1
        left = self.total - self.done
        seconds = (time.monotonic() - self.started) / self.done * left
        return f"{self.done} of {self.total}" + (f", {duration(seconds)} left" if left else "")


def duration(seconds: float) -> str:
    """Format seconds as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
