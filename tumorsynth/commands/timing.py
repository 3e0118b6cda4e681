"""Measure the time of each stage and the memory of a generator.

On a GPU every measured call is synchronised before and after, and memory is what torch allocated.
On a CPU there are two clocks, wall time and the CPU time of all threads (more reliable on a shared
machine), and memory is the resident set.
"""

from __future__ import annotations

import ctypes
import inspect
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.fetching import Task
from tumorsynth.generators.diffusion import Generator
from tumorsynth.pipeline import finish, place_batch, requests
from tumorsynth.synthesizer import SynthesizeTumor

# steps of a call, in the order of the data
ORDER = "place crop encode denoise quantise decode paint blend other".split()


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(
    run: Callable[[], object],
    device: torch.device,
    repeats: int = 5,
    between: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """``wall_ms`` and ``cpu_ms`` of each of ``repeats`` calls, after a warm-up.

    ``between`` is called before each of them, and not timed.
    """
    for _ in range(3 if device.type == "cuda" else 1):  # the first calls choose and load kernels
        run()
    found: dict[str, list[float]] = {"wall_ms": [], "cpu_ms": []}
    for _ in range(repeats):
        between()
        for name, ms in zip(found, once(run, device), strict=True):
            found[name].append(ms)
    return found


def once(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall and CPU time of one call, in ms."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The peak memory of a call in MiB, beyond what was in use before it.

    CUDA: allocated tensors. CPU: resident memory, sampled every ms; None except on Linux with
    glibc. Memory that earlier calls freed is returned to the system first, as it would hide some.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    statm = Path("/proc/self/statm")
    if device.type != "cpu" or not statm.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another libc
        return None

    def resident() -> float:
        return int(statm.read_text().split()[1]) * 4096 / 2**20

    start, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return round(max(0.0, max(peak[0], resident()) - start), 1)


def cpu_name() -> str:
    """The processor's model, as Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names and names[0]) or platform.processor() or platform.machine() or "unknown"


@torch.no_grad()
def reference_times(device: torch.device, repeats: int = 3) -> dict[str, list[float]]:
    """`times` of `reference_work`."""
    return times(reference_work(device), device, repeats)


def reference_work(device: torch.device) -> Callable[[], object]:
    """Return a function that runs four float32 convolutions, 3x3x3, 32 channels, 96^3.

    A fixed amount of work in PyTorch's own kernels: what a tumour costs as a share of it can be
    compared across machines.
    """
    layer = nn.Conv3d(32, 32, 3, padding=1, device=device, dtype=torch.float32)
    x = torch.randn(1, 32, 96, 96, 96, device=device, dtype=torch.float32)
    layer.requires_grad_(False)
    return lambda: [layer(x) for _ in range(4)]


def crop_and_mask(
    side: int, batch: int = 1, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Crops of noisy tissue in [0, 1] and a ball of 18 mm in each: (B, 1, side, side, side)."""
    rng = torch.Generator().manual_seed(0)
    crop = (0.65 + 0.03 * torch.randn(batch, 1, side, side, side, generator=rng)).clamp(0, 1)
    axis = torch.arange(side) - side // 2
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    ball = x.square() + y.square() + z.square() <= 81
    return crop.to(device), ball.expand(batch, 1, -1, -1, -1).to(device)


@torch.no_grad()
def pass_times(
    generator: Generator, side: int | None = None, batch: int = 1, repeats: int = 5
) -> dict[str, dict[str, list[float]]]:
    """`times` of one pass of each network, and of ``change`` and ``inpaint`` as a whole.

    ``change`` encodes and decodes twice, with and without the tumour. Each row is of the whole
    batch. side: of the crop in voxels, by default the generator's own.
    """
    device = generator.device
    crop, mask = crop_and_mask(side or generator.crop_size, batch, device)
    seeds = list(range(batch))
    inputs = generator.prepare(crop, mask, seeds)
    noise, decoder = inputs.noise.to(device), generator.autoencoder.decoder
    raw = generator.autoencoder.denormalize(generator.sample(inputs.cond, noise))
    quantised = generator.autoencoder.quantize(raw)

    runs: dict[str, Callable[[], object]] = {
        "encode": lambda: generator.encode_volume(inputs.volume),
        "denoise": lambda: generator.sample(inputs.cond, noise),
        "quantise": lambda: generator.autoencoder.quantize(raw),
        "decode": lambda: generator.run_network(decoder, quantised),
        "inpaint": lambda: generator.inpaint(crop, mask, seed=seeds),
        "change": lambda: generator.change(crop, mask, seed=seeds),
    }
    return {name: times(run, device, repeats) for name, run in runs.items()}


def patch_and_label(
    side: int = 96, batch: int = 1, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Patches (B, 1, side, side, side) of organ alone: 110 HU with a noise of 12, label 1."""
    rng = torch.Generator().manual_seed(0)
    image = 110 + 12 * torch.randn(batch, 1, side, side, side, generator=rng)
    return image.to(device), torch.ones(image.shape, dtype=torch.uint8, device=device)


def call_times(
    synth: SynthesizeTumor,
    image: Tensor,
    label: Tensor,
    repeats: int = 5,
    between: Callable[[], object] = lambda: None,
    **where: Any,
) -> dict[str, dict[str, list[float]]]:
    """`times` of whole calls, ``call``, and of their steps, measured in separate calls.

    A step's time excludes the steps inside it; ``other`` is the rest of a call. On a GPU every step
    is synchronised, but whole calls are not.

    Args:
        synth: the transform.
        image: passed to it.
        label: passed to it.
        repeats: calls of each kind.
        between: called before each call, and not timed.
        where: ``spacing`` or ``affine``.
    """
    device = synth.device or image.device
    generator: Any = synth.handle.get(device)
    run = partial(synth, image, label, seed=0, **where)
    whole = times(run, device, repeats, between)
    steps: list[tuple[Any, str, str]] = [
        (place_batch, "place_sample", "place"),
        (requests, "request_painting", "crop"),
        (finish, "blend_candidate", "blend"),
        (finish, "write", "blend"),
    ]
    if isinstance(generator, Generator):
        steps += [
            (generator, "encode_volume", "encode"),
            (generator, "sample", "denoise"),
            (generator, "decode_latent", "decode"),
        ]
        if generator.autoencoder.codebook is not None:
            steps.append((generator.autoencoder, "quantize", "quantise"))
    else:
        steps.append((generator, "change", "paint"))
    watch = Watch(device)
    laps: list[dict[str, tuple[float, float]]] = []
    try:
        for owner, name, key in steps:
            watch.wrap(owner, name, key)
        watch.wrap(synth, "forward", "other")
        for _ in range(repeats):
            between()
            watch.spent = {}
            run()
            laps.append(watch.spent)
    finally:
        watch.unwrap()
    found = {"call": whole}
    for key in sorted({key for lap in laps for key in lap}, key=ORDER.index):
        both = [lap.get(key, (0.0, 0.0)) for lap in laps]
        found[key] = {"wall_ms": [b[0] for b in both], "cpu_ms": [b[1] for b in both]}
    return found


class Watch:
    """Times methods of objects and functions of modules, excluding the timed ones they call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, tuple[float, float]] = {}
        self._wrapped: list[tuple[Any, str, Any]] = []

    def _now(self) -> tuple[float, float]:
        synchronise(self.device)
        return time.perf_counter() * 1e3, time.process_time() * 1e3

    def _total(self) -> tuple[float, float]:
        return sum(s[0] for s in self.spent.values()), sum(s[1] for s in self.spent.values())

    def wrap(self, owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._lap(key):
                made = inner(*args, **kwargs)
            is_task: bool = inspect.isgenerator(made)
            return self._steps(key, made) if is_task else made

        self._wrapped.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = run

    @contextmanager
    def _lap(self, key: str) -> Iterator[None]:
        """Add what is spent inside, without the timed calls there, to a key."""
        start, before = self._now(), self._total()
        try:
            yield
        finally:
            end, after = self._now(), self._total()
            own = [e - s - (a - b) for e, s, a, b in zip(end, start, after, before, strict=True)]
            old = self.spent.get(key, (0.0, 0.0))
            self.spent[key] = old[0] + own[0], old[1] + own[1]

    def _steps(self, key: str, task: Task[Any]) -> Task[Any]:
        """Run a task (`tumorsynth.fetching`), of which each step is a lap."""
        answer: Any = None
        send: Any = task.send
        while True:
            with self._lap(key):
                try:
                    wanted = send(answer)
                except StopIteration as end:
                    return end.value
            answer = yield wanted

    def unwrap(self) -> None:
        """Put back everything that was wrapped."""
        for owner, name, own in reversed(self._wrapped):
            owner.__dict__.pop(name)
            if own is not None:
                owner.__dict__[name] = own
        self._wrapped.clear()
