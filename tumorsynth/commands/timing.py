"""What a generator costs on this machine: the time of each stage, and the memory.

On a GPU every measured call is synchronised before and after, and memory is what torch allocated.
On a CPU there are two clocks, the wall's and the process's (summed over its threads; it says more
on a machine that is shared), and memory is the resident set.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tumorsynth.generators.diffusion import Generator
from tumorsynth.pipeline import finish, place, requests
from tumorsynth.synthesizer import SynthesizeTumor

# steps of a call, in the order of the data
ORDER = "place crop encode denoise quantise decode paint blend other".split()


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(
    run: Callable[[], object], device: torch.device, repeats: int = 5
) -> dict[str, list[float]]:
    """``wall_ms`` and ``cpu_ms`` of each of ``repeats`` calls, after some that are not counted."""
    for _ in range(3 if device.type == "cuda" else 1):  # kernels are chosen and loaded at first
        run()
    found: dict[str, list[float]] = {"wall_ms": [], "cpu_ms": []}
    for _ in range(repeats):
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronise(device)
        found["wall_ms"].append((time.perf_counter() - wall) * 1e3)
        found["cpu_ms"].append((time.process_time() - cpu) * 1e3)
    return found


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that a call held beyond what was held before it, in MiB.

    CUDA: allocated tensors. CPU: resident memory, sampled every ms; on Linux with glibc alone, else
    None. What earlier calls freed goes back to the system first, or it would hide what this takes.
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
    """Patches (B, 1, side, side, side) that are all organ: 110 HU with a noise of 12, label 1."""
    rng = torch.Generator().manual_seed(0)
    image = 110 + 12 * torch.randn(batch, 1, side, side, side, generator=rng)
    return image.to(device), torch.ones(image.shape, dtype=torch.uint8, device=device)


def call_times(
    synth: SynthesizeTumor,
    image: Tensor,
    label: Tensor,
    repeats: int = 5,
    **where: Any,
) -> dict[str, dict[str, list[float]]]:
    """`times` of whole calls, ``call``, and of their steps, measured apart within like calls.

    A step's time is without that of the steps inside it; ``other`` is what no step takes. On a GPU
    the calls with steps wait for it at every step, the whole calls do not.
    where: ``spacing`` or ``affine``.
    """
    device = synth.device or image.device
    generator: Any = synth.handle.get(device)
    run = partial(synth, image, label, seed=0, **where)
    whole = times(run, device, repeats)
    steps: list[tuple[Any, str, str]] = [
        (place, "place_sample", "place"),
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
    """Times methods of objects and functions of modules, each without the watched ones inside."""

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
            start, before = self._now(), self._total()
            try:
                return inner(*args, **kwargs)
            finally:
                end, after = self._now(), self._total()
                own = [
                    e - s - (a - b) for e, s, a, b in zip(end, start, after, before, strict=True)
                ]
                old = self.spent.get(key, (0.0, 0.0))
                self.spent[key] = old[0] + own[0], old[1] + own[1]

        self._wrapped.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = run

    def unwrap(self) -> None:
        """Put back everything that was wrapped."""
        for owner, name, own in reversed(self._wrapped):
            owner.__dict__.pop(name)
            if own is not None:
                owner.__dict__[name] = own
        self._wrapped.clear()
