"""Many scans on a Ray cluster: the loop and the files of `tumorsynth.scans.collection`, Ray's processes.

Every node needs tumorsynth, and the same folders under the same names.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    # Ray reads these as it is imported. No reports to its makers, unless asked for; a local Ray on
    # the loopback interface alone, as where it supports no clusters (elsewhere it listens to all);
    # and its workers as urgent as the command itself (Ray's own default is 15 nicer).
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
except ImportError as error:
    raise ImportError('--engine ray needs Ray: pip install "tumorsynth[ray]"') from error

from tumorsynth.scans.collection import Outcome, Task, outcome, shared_out

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor

STORE = 80 * 2**20  # bytes; images go through files, and Ray would take a third of the memory


def on_ray(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int | None = None,
    devices: Sequence[str] = ("cpu",),
    threads: int = 1,
) -> Iterator[Outcome]:
    """The outcomes of all tasks, as they come, as from `collection.in_processes`.

    On the cluster that RAY_ADDRESS names, else on a local one that ends with the run. Each of the
    ``workers`` (None: as many as there is room for) takes ``threads`` CPUs, and with "cuda" a GPU
    of Ray's choice. ValueError where there is no room for one, or no cluster answers.
    """
    if len(devices) > 1 or ":" in devices[0]:
        raise ValueError(f"Ray hands out the GPUs: give --device cuda, got {','.join(devices)}")
    needs = {"CPU": threads} | ({} if devices[0] == "cpu" else {"GPU": 1})
    _join_or_start(workers and workers * threads, gpus="GPU" in needs)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(node.get(k, 0) // n) for k, n in needs.items()) for node in nodes)
        if room == 0:
            words = " and ".join(f"{n} {k}" for k, n in needs.items())
            raise ValueError(f"a node of the Ray cluster must have {words}, but none has")
        scans = ray.remote(num_cpus=threads, num_gpus=needs.get("GPU", 0))(_Scans)

        def start(_: int) -> _Worker:
            return _Worker(scans, synth, out, devices[0], threads)

        yield from shared_out(tasks, min(workers or room, room), start, _ready)
    finally:
        ray.shutdown()


def _join_or_start(cpus: int | None, gpus: bool) -> None:
    # what Ray is going to do anyway: GPUs stay visible; without it Ray says so
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            host, _, port = address.rpartition(":")
            if port.isdigit() and "/" not in host:  # Ray itself would try for ten minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(**quiet)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAY_ADDRESS must name a Ray cluster that answers, but {address} does not "
                f"({' '.join(str(error).split())[:200]}); see that it is up; one that asks for a "
                "token needs RAY_AUTH_MODE=token here, too"
            ) from error
        return
    quiet |= {"include_dashboard": False} | ({} if gpus else {"num_gpus": 0})
    ray.init(address="local", num_cpus=cpus, object_store_memory=STORE, **quiet)


class _Worker:
    """An actor as `shared_out` wants its workers."""

    def __init__(self, scans: Any, *arguments: Any):
        self.scans, self.arguments = scans, (os.getcwd(), *arguments)
        self.start()

    def start(self) -> None:
        self.task: Task | None = None
        self.ended = ""
        self.actor = self.scans.remote(*self.arguments)

    def give(self, task: Task) -> None:
        self.task = task
        self.result = self.actor.do.remote(task)

    def take(self) -> Outcome | None:
        self.task = None
        try:
            result, said = ray.get(self.result)
        except ray.exceptions.RayTaskError:  # not a lost worker: a mistake in here
            raise
        except ray.exceptions.RayError as error:
            self.ended = " ".join(str(error).split())[:300]
            return None
        sys.stderr.write(said)
        return result

    def end(self) -> str:
        ray.kill(self.actor)
        return self.ended


def _ready(busy: list[_Worker]) -> list[_Worker]:
    done, _ = ray.wait([worker.result for worker in busy])
    return [worker for worker in busy if worker.result in done]


class _Scans:
    """What runs in Ray's process: one scan after another."""

    def __init__(
        self, cwd: str, synth: SynthesizeTumor, out: Path, device: str, threads: int
    ) -> None:
        import torch

        with suppress(OSError):  # no such folder there: then only absolute paths are found
            os.chdir(cwd)
        torch.set_num_threads(threads)
        synth.device = torch.device(device)
        self.synth, self.out = synth, out

    def do(self, task: Task) -> tuple[Outcome, str]:
        """The outcome, and what was said on stderr."""
        with redirect_stderr(StringIO()) as said:
            result = outcome(self.synth, task, self.out)
        return result, said.getvalue()
