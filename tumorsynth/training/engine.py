"""The loop that both stages run in: checkpoints, resume, signals, logs, progress.

Nothing random outlives a step: crops and noise are functions of (seed, step, place in the batch),
and torch's own random state is set at the start of every step. So a checkpoint is weights and a
step number, a resumed run repeats an uninterrupted one, and the work can be split over any number
of processes.
"""

from __future__ import annotations

import math
import signal
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tumorsynth.training.config import Training
from tumorsynth.training.run_folder import CHECKPOINT, RunFolder, written

LOG = "log.csv"


class Stage(Protocol):
    """What the loop asks of a stage."""

    def state(self) -> dict[str, Any]:
        """All that a step changes: parts with state_dict and load_state_dict, by name."""
        ...

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """One optimiser step with this learning rate; the losses, "loss" first, for the log."""
        ...

    def picture(self) -> Tensor:
        """(H, W) in [0, 1]: what the stage can do by now."""
        ...


class Diverged(ValueError):
    """The loss is no number any more."""


def train_loop(fabric: Any, run: RunFolder, stage: Stage, config: Training, title: str) -> float:
    """Steps from the last checkpoint, or from 0, to ``config.steps``; the last is saved.

    Returns the seconds that took, those before a resumption included.

    Raises Diverged for a loss that is NaN or infinite, OSError for a full disk, and SystemExit
    after SIGTERM or Ctrl-C: each leaves the last good checkpoint.
    """
    if config.batch_size % (fabric.world_size * config.accumulate):
        raise ValueError(
            f"--batch-size must be a multiple of processes x --accumulate, got {config.batch_size} "
            f"and {fabric.world_size} x {config.accumulate}"
        )
    state = stage.state()
    saved = run.load()
    first, seconds, start = 0, 0.0, time.time()
    if saved is not None:
        first = int(saved["step"])
        seconds = float(saved.get("seconds", 0.0))
        for name, part in state.items():
            part.load_state_dict(saved["parts"][name])
    if fabric.is_global_zero:
        run.path.mkdir(parents=True, exist_ok=True)
        for stale in run.path.glob(f".{CHECKPOINT}.*"):  # of a killed process
            stale.unlink()
    fabric.barrier()
    with written(run), _Signals() as signals, _Log(fabric, run.path, config, first, title) as log:
        for step in range(first, config.steps):
            torch.manual_seed(_mixed(config.seed, step))
            rate = learning_rate(config, step)
            losses = stage.step(step, rate)
            names = list(losses)
            sums = torch.stack([v.detach().float() for v in losses.values()])
            stop = torch.tensor([float(signals.caught)], device=sums.device)
            told = fabric.all_reduce(torch.cat([sums / fabric.world_size, stop]), reduce_op="sum")
            *values, stop_sum = told.tolist()
            if not all(map(math.isfinite, values)):
                bad = ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
                raise Diverged(
                    f"the loss is not finite at step {step} ({bad}); lower --lr {config.lr:g}, or "
                    f"use --precision 32-true; {_kept(run)}"
                )
            done = step + 1
            log.write(done, rate, dict(zip(names, values, strict=True)))
            stopping = stop_sum > 0
            if fabric.is_global_zero:
                if config.picture_every and done % config.picture_every == 0:
                    log.picture(done, stage.picture())
                if done % config.save_every == 0 or done == config.steps or stopping:
                    log.flush()
                    run.save(done, state, seconds + time.time() - start)
            if stopping and done < config.steps:
                log.say(f"stopped at step {done}, which is saved; go on with --resume")
                raise SystemExit(128 + signals.caught if signals.caught else 1)
    fabric.barrier()
    return seconds + (time.time() - start if first < config.steps else 0.0)


def say(fabric: Any, words: str) -> None:
    """One line on stderr, of the first process alone."""
    if fabric.is_global_zero:
        print(words, file=sys.stderr, flush=True)


def learning_rate(config: Training, step: int) -> float:
    """Linear warm-up, then a cosine to 1 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * (0.01 + 0.99 * cosine)


def places(fabric: Any, config: Training) -> list[list[int]]:
    """The places of the step's batch that this process fills, one list per accumulated part."""
    size = config.batch_size // (config.accumulate * fabric.world_size)
    starts = [
        (part * fabric.world_size + fabric.global_rank) * size for part in range(config.accumulate)
    ]
    return [list(range(start, start + size)) for start in starts]


def update(network: torch.nn.Module, optimiser: Any, clip: float) -> None:
    """One optimiser step with the gradients that are there, clipped to this norm, and then none."""
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def random_of(*numbers: int) -> np.random.Generator:
    """A random stream of its own for (seed, purpose, step, place, ...)."""
    return np.random.default_rng(list(numbers))


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _kept(run: RunFolder) -> str:
    return f"{run.checkpoint} stays" if run.checkpoint.is_file() else "no checkpoint yet"


class _Signals:
    """SIGTERM (a queue's time is up) and the first Ctrl-C: remembered until the step is done."""

    def __enter__(self) -> _Signals:
        self.caught = 0
        self.before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._catch)
            except ValueError:  # not in the main thread
                pass
        return self

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Log:
    """log.csv, TensorBoard where it is installed, and progress on stderr; rank 0 alone."""

    def __init__(self, fabric: Any, folder: Path, config: Training, first: int, title: str):
        self.fabric, self.folder, self.config = fabric, folder, config
        self.active = fabric.is_global_zero
        self.first, self.title, self.start = first, title, time.time()
        self.rows: list[str] = []
        self.mean: dict[str, float] = {}
        self.recent: dict[str, deque[float]] = {}  # of the last 50 steps
        self.bar: Any = None
        self.board: Any = None

    def __enter__(self) -> _Log:
        if not self.active:
            return self
        path = self.folder / LOG
        if path.is_file():  # what a killed run wrote after its last checkpoint happens again
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines[1:] if line.endswith("\n")]
            kept = [line for line in whole if int(line.split(",")[0]) <= self.first]
            path.write_text("".join(lines[:1] + kept))
        self.headed = path.is_file() and path.stat().st_size > 0
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first)
        except ImportError:
            pass
        self._start_bar()
        self.say(f"{self.title}: step {self.first} to {self.config.steps}")
        return self

    def _start_bar(self) -> None:
        try:
            from rich import progress
            from rich.console import Console
        except ModuleNotFoundError:
            return
        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}"),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.config.steps, completed=self.first)

    def write(self, done: int, rate: float, losses: dict[str, float]) -> None:
        if not self.active:
            return
        if not self.headed:
            self.rows.append(",".join(["step", "lr", *losses]) + "\n")
            self.headed = True
        self.rows.append(",".join([str(done), f"{rate:.6g}", *map(repr, losses.values())]) + "\n")
        for name, value in losses.items():
            self.recent.setdefault(name, deque(maxlen=50)).append(value)
            self.mean[name] = sum(self.recent[name]) / len(self.recent[name])
        words = "  ".join(f"{name} {value:.4g}" for name, value in self.mean.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=words)
        if done % self.config.log_every and done != self.config.steps:
            return
        self.flush()
        if self.board is not None:
            for name, value in {**losses, "lr": rate}.items():
                self.board.add_scalar(name, value, done)
        if self.bar is None:
            spent = time.time() - self.start
            left = spent / (done - self.first) * (self.config.steps - done)
            self.say(f"step {done}/{self.config.steps}  {words}  {spent:.0f} s, {left:.0f} s left")

    def picture(self, done: int, image: Tensor) -> None:
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu()
        write_png(self.folder / "pictures" / f"step_{done:07d}.png", pixels)
        if self.board is not None:
            self.board.add_image("sample", pixels, done, dataformats="HW")

    def flush(self) -> None:
        if self.active and self.rows:
            with (self.folder / LOG).open("a") as file:
                file.write("".join(self.rows))
            self.rows = []

    def say(self, words: str) -> None:
        say(self.fabric, words)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error[0] is None or issubclass(error[0], SystemExit | Diverged):
            self.flush()
        if self.board is not None:
            self.board.close()


def write_png(path: Path, pixels: Tensor) -> None:
    """A grey picture (H, W) uint8, with the standard library alone."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))


class Average:
    """A moving average of a network's weights, part of the state."""

    def __init__(self, average: torch.nn.Module, now: torch.nn.Module, decay: float):
        self.average, self.now, self.decay = average, now, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, now in zip(self.average.parameters(), self.now.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for held, latest in zip(self.average.buffers(), self.now.buffers(), strict=True):
            held.copy_(latest)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.load_state_dict(state)


def ahead(make: Callable[[Any], Any], plans: Iterator[Any], workers: int) -> Iterator[Any]:
    """map(make, plans), made by threads a little ahead of time; plans are drawn in order here."""
    if workers < 1:
        yield from map(make, plans)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(make, plan) for plan in islice(plans, 2 * workers))
        while waiting:
            answer = waiting.popleft().result()
            waiting.extend(pool.submit(make, plan) for plan in islice(plans, 1))
            yield answer


def millions(model: torch.nn.Module) -> str:
    """Parameters of a network, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
