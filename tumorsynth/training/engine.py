"""The loop that both stages run in: steps, checkpoints, resume, signals.

Nothing random outlives a step: crops and noise are functions of (seed, step, place in the batch),
and torch's own random state is set at the start of every step. So a checkpoint is weights and a
step number, a resumed run repeats an uninterrupted one, and the work can be split over any number
of processes.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tumorsynth.training.config import Training
from tumorsynth.training.log import Log
from tumorsynth.training.run_folder import CHECKPOINT, RunFolder, written


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
    spent = seconds  # what the last checkpoint says: resuming a finished run changes nothing
    if fabric.is_global_zero:
        run.path.mkdir(parents=True, exist_ok=True)
        for stale in run.path.glob(f".{CHECKPOINT}.*"):  # of a killed process
            stale.unlink()
    fabric.barrier()
    with written(run), _Signals() as signals, Log(fabric, run.path, config, first, title) as log:
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
                    spent = seconds + time.time() - start
                    run.save(done, state, spent)
            if stopping and done < config.steps:
                log.say(f"stopped at step {done}, which is saved; go on with --resume")
                raise SystemExit(128 + signals.caught if signals.caught else 1)
    fabric.barrier()
    return spent


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
