"""Many scans: one process or several, each scan by itself, with the same files either way.

The parent hands out one scan at a time and holds none; a dead worker gives its scan back, once.
"""

from __future__ import annotations

import errno
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

from tumorsynth.scans import nifti
from tumorsynth.scans.cases import Pair, check_organ, synthesize_scan

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from tumorsynth.synthesizer import SynthesizeTumor

# what fails one scan for these would fail all that follow
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Task:
    """One scan and the seed that decides its tumours."""

    pair: Pair
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a scan: its records, or the error in one line. ``fatal``: stop the run, and
    what to do then."""

    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    fatal: str | None = None
    lost: bool = False  # the device, for this process: another one may have it again


def expected(error: BaseException) -> bool:
    """An error that says what is wrong with the input or the machine, not with this code."""
    return isinstance(error, (ValueError, TypeError, OSError, ImportError))


def exit_code(error: BaseException) -> int:
    """2: the command or its input is at fault; 1: the machine, or this code."""
    hopeless = isinstance(error, OSError) and error.errno in HOPELESS
    return 2 if expected(error) and not hopeless else 1


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if expected(error) and words:
        return words
    return f"unexpected {type(error).__name__}: {words} (--debug shows where)"


def run_one(
    synth: SynthesizeTumor,
    task: Task,
    out: Path,
    step: Callable[[], None] = lambda: None,
    *,
    organ_needed: bool = False,
) -> list[dict[str, Any]]:
    """Read, synthesise and write one scan; returns the report's records, or raises.

    organ_needed: ValueError, and nothing written, where the label map holds no such organ.
    """
    image, mask = nifti.read_pair(task.pair.ct, task.pair.label)
    mask.check_label_fits(synth.tumor_label)
    if organ_needed:
        check_organ(mask, synth.organ_labels)
    there = int((mask.values() == synth.tumor_label).sum())
    if there:  # a patient's own tumours, or an organ that happens to have the number
        print(
            f"tumorsynth: {task.pair.name}: label {synth.tumor_label} is in the map already "
            f"({there} voxels); --tumor-label N gives the synthetic tumours another",
            file=sys.stderr,
        )
    if image.stored.dtype.kind == "f":
        in_organ = image.stored[np.isin(mask.values(), synth.organ_labels)]
        if (wrong := np.count_nonzero(~np.isfinite(in_organ))) > 0.01 * in_organ.size:
            print(
                f"tumorsynth: {task.pair.name}: {wrong / in_organ.size:.0%} of the organ's voxels "
                f"in {image.name} are NaN or infinite; no tumour goes there",
                file=sys.stderr,
            )
    return synthesize_scan(synth, image, mask, out, task.pair.name, task.seed, step)["tumors"]


def outcome(
    synth: SynthesizeTumor, task: Task, out: Path, step: Callable[[], None] = lambda: None
) -> Outcome:
    """As `run_one`, with an error caught."""
    try:
        return Outcome(task.pair.name, run_one(synth, task, out, step))
    except Exception as error:
        name, words = task.pair.name, one_line(error)
        if isinstance(error, OSError) and error.errno in HOPELESS:
            return Outcome(name, error=words, fatal="make room")
        from tumorsynth.devices import is_lost

        if is_lost(error):
            words = f"the device was lost: {' '.join(str(error).split())[:200]}"
            return Outcome(name, error=words, fatal="see to the device", lost=True)
        return Outcome(name, error=words)


def in_processes(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    threads: int = 1,
) -> Iterator[Outcome]:
    """The outcomes of all tasks, as they come; ``workers`` processes share out the devices."""

    def start(k: int) -> _Worker:
        return _Worker(synth, out, devices[k % len(devices)], threads)

    def ready(busy: list[_Worker]) -> list[_Worker]:
        pipes = wait([worker.pipe for worker in busy])
        return [worker for worker in busy if worker.pipe in pipes]

    return shared_out(tasks, workers, start, ready)


class Worker(Protocol):
    """Another process, which does one scan after another."""

    task: Task | None  # at hand

    def start(self) -> None:
        """Anew, after its end."""

    def give(self, task: Task) -> None: ...

    def take(self) -> Outcome | None:
        """Its outcome; None when it died over the task."""

    def end(self) -> str:
        """At once, and in the middle of a scan; says how it ended. More than once is no harm."""


W = TypeVar("W", bound=Worker)


def shared_out(
    tasks: Sequence[Task],
    workers: int,
    start: Callable[[int], W],
    ready: Callable[[list[W]], list[W]],
) -> Iterator[Outcome]:
    """The outcomes of all tasks, as they come, from ``start(0)`` to ``start(workers - 1)``.

    ``ready`` waits until some of the workers have an outcome, or died. A scan whose worker dies
    (out of memory, killed) is tried once more in a new one, then failed.
    """
    waiting = deque(tasks)
    died: set[str] = set()
    pool: list[W] = []
    try:
        for k in range(min(workers, len(tasks))):
            pool.append(start(k))
            pool[-1].give(waiting.popleft())
        while busy := [worker for worker in pool if worker.task is not None]:
            for worker in ready(busy):
                task = worker.task
                assert task is not None
                result = worker.take()
                if result is None or result.lost:  # it died, or can do no more
                    code = worker.end()
                    worker.start()
                    if task.pair.name not in died:
                        result = None
                        died.add(task.pair.name)
                        waiting.appendleft(task)
                    elif result is None:
                        words = (
                            f"its process died twice ({code}), perhaps out of memory; "
                            "use fewer --workers"
                        )
                        result = Outcome(task.pair.name, error=words)
                if result is not None:
                    yield result
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    worker.end()  # another may be waiting for its place
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process of its own, which does one scan after another."""

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
        with _uninterrupted():  # Ctrl-C is the parent's; it ends its processes
            self.process.start()
        theirs.close()  # so that its death ends the pipe

    def give(self, task: Task) -> None:
        self.task = task
        try:
            self.pipe.send(task)
        except OSError:  # dead already: take() will say so
            pass

    def take(self) -> Outcome | None:
        """Its outcome; None when it died over the task."""
        self.task = None
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        self.pipe.close()
        self.process.join(5 if self.task is None else 0)
        if self.process.is_alive():  # in the middle of a scan: nothing half-written can stay
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _work(
    pipe: Connection, parent: int, synth: SynthesizeTumor, out: Path, device: str, threads: int
) -> None:
    import torch

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    synth.device = torch.device(device)
    try:
        while True:
            pipe.send(outcome(synth, pipe.recv(), out))
    except (EOFError, OSError, KeyboardInterrupt):  # no more to do, or the parent is gone
        pass


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process started in here has Ctrl-C blocked for good; here it comes a moment later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # begun with the first process, it would let Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(parent: int) -> None:
    """A killed parent must not leave processes behind that still write."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Clock:
    """The time left, from the pace so far."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def tick(self) -> str:
        """One more is done; says how many, and how long the rest will take."""
        self.done += 1
        left = self.total - self.done
        seconds = (time.monotonic() - self.began) / self.done * left
        return f"{self.done} of {self.total}" + (f", {duration(seconds)} left" if left else "")


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min" """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
