"""The log of a training: log.csv, TensorBoard, sample pictures, progress on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tumorsynth.training.config import Training
from tumorsynth.training.pictures import write_png

LOG = "log.csv"
MEAN_STEPS = 50  # over which progress on stderr averages the losses


class Log:
    """log.csv, TensorBoard if installed, and progress on stderr; rank 0 writes alone."""

    def __init__(self, fabric: Any, folder: Path, config: Training, first: int, title: str):
        self.fabric, self.folder, self.config = fabric, folder, config
        self.active = fabric.is_global_zero
        self.first, self.title, self.start = first, title, time.time()
        self.rows: list[str] = []
        self.mean: dict[str, float] = {}
        self.recent: dict[str, deque[float]] = {}
        self.bar: Any = None
        self.board: Any = None

    def __enter__(self) -> Log:
        if not self.active:
            return self
        path = self.folder / LOG
        if path.is_file():  # steps after the last checkpoint are repeated
            lines = path.read_text().splitlines(keepends=True)
            complete = [line for line in lines[1:] if line.endswith("\n")]
            kept = [line for line in complete if int(line.split(",")[0]) <= self.first]
            path.write_text("".join(lines[:1] + kept))
        self.has_header = path.is_file() and path.stat().st_size > 0
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
        """Log the losses of a step; ``done`` is the number of finished steps."""
        if not self.active:
            return
        if not self.has_header:
            self.rows.append(",".join(["step", "lr", *losses]) + "\n")
            self.has_header = True
        self.rows.append(",".join([str(done), f"{rate:.6g}", *map(repr, losses.values())]) + "\n")
        for name, value in losses.items():
            self.recent.setdefault(name, deque(maxlen=MEAN_STEPS)).append(value)
            self.mean[name] = sum(self.recent[name]) / len(self.recent[name])
        summary = "  ".join(f"{name} {value:.4g}" for name, value in self.mean.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=summary)
        if done % self.config.log_every and done != self.config.steps:
            return
        self.flush()
        if self.board is not None:
            for name, value in {**losses, "lr": rate}.items():
                self.board.add_scalar(name, value, done)
        if self.bar is None:
            spent = time.time() - self.start
            left = spent / (done - self.first) * (self.config.steps - done)
            self.say(
                f"step {done}/{self.config.steps}  {summary}  {spent:.0f} s, {left:.0f} s left"
            )

    def picture(self, done: int, image: Tensor) -> None:
        """Write a sample picture (H, W) in [0, 1]."""
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu()
        write_png(self.folder / "pictures" / f"step_{done:07d}.png", pixels)
        if self.board is not None:
            self.board.add_image("sample", pixels, done, dataformats="HW")

    def flush(self) -> None:
        """Append the collected lines to log.csv."""
        if self.active and self.rows:
            with (self.folder / LOG).open("a") as file:
                file.write("".join(self.rows))
            self.rows = []

    def say(self, message: str) -> None:
        """Print one line on stderr."""
        print_status(self.fabric, message)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error[0] is None or issubclass(error[0], SystemExit | ValueError):  # Diverged is one
            self.flush()
        if self.board is not None:
            self.board.close()


def print_status(fabric: Any, message: str) -> None:
    """Print one line on stderr, from the first process alone."""
    if fabric.is_global_zero:
        print(message, file=sys.stderr, flush=True)


def millions(model: torch.nn.Module) -> str:
    """Return the number of parameters of a network in millions, such as "1.2"."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
