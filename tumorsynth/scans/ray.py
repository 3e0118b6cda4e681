"""Process many scans on a Ray cluster, with the same files as `tumorsynth.scans.collection`.

Every node needs tumorsynth, and the same folders under the same paths.
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
    # Ray reads these when it is imported. Usage reports are off unless the user turns them on. A
    # local Ray listens on the loopback interface alone, as it does where it supports no clusters,
    # and its workers run at the priority of the command (by default they are 15 nicer).
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
except ImportError as error:
    raise ImportError('--engine ray needs Ray: pip install "tumorsynth[ray]"') from error

from tumorsynth.scans.collection import Outcome, Task, distribute, try_scan

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor

# Images go through files, so the store can be small; by default Ray takes a third of the memory.
OBJECT_STORE_BYTES = 80 * 2**20


def run_on_ray(
    synth: SynthesizeTumor,
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int | None = None,
    devices: Sequence[str] = ("cpu",),
    threads: int = 1,
) -> Iterator[Outcome]:
    """Process scans on the cluster at RAY_ADDRESS, or on a local one that ends with the run.

    Args:
        synth: the transform; every worker gets a copy.
        tasks: the scans.
        out: an existing folder, on every node.
        workers: the number of workers; None: as many as the cluster has room for.
        devices: ("cpu",), or ("cuda",) for one GPU per worker, which Ray chooses.
        threads: CPUs per worker.

    Yields:
        The outcomes, in the order in which the scans finish.

    Raises:
        ValueError: if the cluster does not answer or has no room for a worker.
    """
    if len(devices) > 1 or ":" in devices[0]:
        raise ValueError(
            f"--engine ray assigns the GPUs itself; give --device cuda, got {','.join(devices)}"
        )
    needs = {"CPU": threads} | ({} if devices[0] == "cpu" else {"GPU": 1})
    _join_or_start(workers and workers * threads, gpus="GPU" in needs)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        capacity = sum(min(int(node.get(k, 0) // n) for k, n in needs.items()) for node in nodes)
        if capacity == 0:
            words = " and ".join(f"{n} {k}" for k, n in needs.items())
            raise ValueError(
                f"a node of the Ray cluster must have {words}, but none has; add such a node, or "
                "use fewer --threads or --device cpu"
            )
        actor_class = ray.remote(num_cpus=threads, num_gpus=needs.get("GPU", 0))(_Processor)

        def start(_: int) -> _RayWorker:
            return _RayWorker(actor_class, synth, out, devices[0], threads)

        yield from distribute(tasks, min(workers or capacity, capacity), start, _wait_for_some)
    finally:
        ray.shutdown()


def _join_or_start(cpus: int | None, gpus: bool) -> None:
    # keep GPUs visible to workers without one: Ray's coming default, about which it would warn
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            host, _, port = address.rpartition(":")
            if port.isdigit() and "/" not in host:  # Ray itself tries for ten minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(**quiet)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAY_ADDRESS must name a Ray cluster that answers, but {address} does not "
                f"({' '.join(str(error).split())[:200]}); check that it is up; if it requires a "
                "token, set RAY_AUTH_MODE=token here, too"
            ) from error
        return
    quiet |= {"include_dashboard": False} | ({} if gpus else {"num_gpus": 0})
    ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)


class _RayWorker:
    """A worker in a Ray actor."""

    def __init__(self, actor_class: Any, *arguments: Any):
        self.actor_class, self.arguments = actor_class, (os.getcwd(), *arguments)
        self.start()

    def start(self) -> None:
        self.task: Task | None = None
        self.ended = ""
        self.actor = self.actor_class.remote(*self.arguments)

    def submit(self, task: Task) -> None:
        self.task = task
        self.pending = self.actor.process.remote(task)

    def result(self) -> Outcome | None:
        self.task = None
        try:
            outcome, printed = ray.get(self.pending)
        except ray.exceptions.RayTaskError:  # a mistake in this code, not a lost worker
            raise
        except ray.exceptions.RayError as error:
            self.ended = " ".join(str(error).split())[:300]
            return None
        sys.stderr.write(printed)
        return outcome

    def stop(self) -> str:
        ray.kill(self.actor)
        return self.ended


def _wait_for_some(busy: list[_RayWorker]) -> list[_RayWorker]:
    done, _ = ray.wait([worker.pending for worker in busy])
    return [worker for worker in busy if worker.pending in done]


class _Processor:
    """Runs in Ray's process and processes one scan at a time."""

    def __init__(
        self, cwd: str, synth: SynthesizeTumor, out: Path, device: str, threads: int
    ) -> None:
        import torch

        with suppress(OSError):  # on a node without this folder, relative paths do not work
            os.chdir(cwd)
        torch.set_num_threads(threads)
        synth.device = torch.device(device)
        self.synth, self.out = synth, out

    def process(self, task: Task) -> tuple[Outcome, str]:
        """Process a scan; returns its outcome, and what it printed on stderr."""
        with redirect_stderr(StringIO()) as printed:
            outcome = try_scan(self.synth, task, self.out)
        return outcome, printed.getvalue()
