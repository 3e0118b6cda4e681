"""The loop that both stages run in: steps, checkpoints, resuming, signals.

No random state outlives a step: crops and noise are functions of (seed, step, slot of the batch),
and torch's own random state is set at the start of every step. Hence a checkpoint is weights and a
step number, a resumed run repeats an uninterrupted one, and any number of processes can share the
work.
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

from tumorsynth.devices import onto
from tumorsynth.training.config import Training
from tumorsynth.training.log import Log
from tumorsynth.training.run_folder import CHECKPOINT, RunFolder, explain_write_errors

# By device, of how many steps the losses may wait to be read; other devices: 1. A GPU then never
# waits for the CPU.
UNREAD_STEPS = {"cpu": 0}


class Stage(Protocol):
    """What the loop needs of a stage."""

    def state(self) -> dict[str, Any]:
        """Return all that a step changes: parts with state_dict and load_state_dict, by name."""
        ...

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Take one optimiser step with this learning rate; return the losses, "loss" first."""
        ...

    def picture(self) -> Tensor:
        """Draw (H, W) in [0, 1] what the stage can do so far."""
        ...


class Diverged(ValueError):
    """The loss is NaN or infinite."""


def train_loop(fabric: Any, run: RunFolder, stage: Stage, config: Training, title: str) -> float:
    """Train a stage from its last checkpoint, or from step 0, to ``config.steps``.

    Args:
        fabric: from `launch`.
        run: folder of the run.
        stage: what to train.
        config: settings of the training.
        title: first line of the log.

    Returns:
        Seconds of training, including those before a resumption.

    Raises:
        Diverged: for a loss that is NaN or infinite.
        OSError: for files that cannot be written.
        SystemExit: after SIGTERM or Ctrl-C. All three leave the last good checkpoint.
    """
    if config.batch_size % (fabric.world_size * config.accumulate):
        raise ValueError(
            f"--batch-size must be a multiple of processes x --accumulate, got {config.batch_size} "
            f"and {fabric.world_size} x {config.accumulate}"
        )
    state = stage.state()
    first, seconds, start = 0, 0.0, time.time()
    if (saved := run.load()) is not None:
        first = int(saved["step"])
        seconds = float(saved.get("seconds", 0.0))
        for name, part in state.items():
            part.load_state_dict(saved["parts"][name])
    spent = seconds  # what the last checkpoint says: resuming a finished run changes nothing
    if fabric.is_global_zero:
        run.path.mkdir(parents=True, exist_ok=True)
        for stale in run.path.glob(f".{CHECKPOINT}.*"):  # left by a killed process
            stale.unlink()
    fabric.barrier()
    with (
        explain_write_errors(run),
        _Signals() as signals,
        Log(fabric, run.path, config, first, title) as log,
    ):
        unread: deque[_StepLosses] = deque()
        for step in range(first, config.steps):
            torch.manual_seed(_step_seed(config.seed, step))
            rate = learning_rate(config, step)
            unread.append(_StepLosses(fabric, step, rate, stage.step(step, rate), signals.caught))
            done = step + 1
            saves = done % config.save_every == 0 or done == config.steps
            draws = bool(config.picture_every) and done % config.picture_every == 0
            stopping = False
            left = 0 if saves or draws else UNREAD_STEPS.get(fabric.device.type, 1)
            while len(unread) > (0 if stopping else left):
                stopping |= _log_losses(unread.popleft(), log, run, config)
            if fabric.is_global_zero:
                if draws:
                    log.picture(done, stage.picture())
                if saves or stopping:
                    log.flush()
                    spent = seconds + time.time() - start
                    run.save(done, state, spent)
            if stopping and done < config.steps:
                log.say(f"stopped at step {done}, which is saved; go on with --resume")
                raise SystemExit(128 + signals.caught if signals.caught else 1)
    fabric.barrier()
    return spent


class _StepLosses:
    """Mean losses over all processes, and whether any was told to stop, on their way to the CPU."""

    def __init__(
        self, fabric: Any, step: int, rate: float, losses: dict[str, Tensor], signal_caught: int
    ):
        self.step, self.rate, self.names = step, rate, list(losses)
        own = torch.stack([v.detach().float() for v in losses.values()])
        stop = onto(torch.tensor([float(signal_caught)]), own.device)
        sums = fabric.all_reduce(torch.cat([own / fabric.world_size, stop]), reduce_op="sum")
        self.copied: torch.cuda.Event | None = None
        if sums.device.type == "cuda":
            self.sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self.sums.copy_(sums, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(sums.device))
        else:
            self.sums = sums

    def read(self) -> tuple[dict[str, float], bool]:
        """Wait for the values; return the mean losses, and whether to stop."""
        if self.copied is not None:
            self.copied.synchronize()
        *means, stop_sum = self.sums.tolist()
        return dict(zip(self.names, means, strict=True)), stop_sum > 0


def _log_losses(losses: _StepLosses, log: Log, run: RunFolder, config: Training) -> bool:
    """Check and log the losses of a step; return whether any process was told to stop."""
    means, stopping = losses.read()
    if not all(map(math.isfinite, means.values())):
        values = ", ".join(f"{name} {value}" for name, value in means.items())
        raise Diverged(
            f"the loss is not finite at step {losses.step} ({values}); lower --lr {config.lr:g}, "
            f"or use --precision 32-true; {_what_remains(run)}"
        )
    log.write(losses.step + 1, losses.rate, means)
    return stopping


def learning_rate(config: Training, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to 1 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * (0.01 + 0.99 * cosine)


def batch_slots(fabric: Any, config: Training) -> list[list[int]]:
    """Return the slots of the batch that this process fills, a list for each accumulated part."""
    size = config.batch_size // (config.accumulate * fabric.world_size)
    starts = [
        (part * fabric.world_size + fabric.global_rank) * size for part in range(config.accumulate)
    ]
    return [list(range(start, start + size)) for start in starts]


def adamw(network: torch.nn.Module, device: torch.device, **options: Any) -> torch.optim.AdamW:
    """Return AdamW for a network's parameters; on a GPU, one kernel updates all of them."""
    fused = True if device.type == "cuda" else None  # None: torch's choice
    return torch.optim.AdamW(network.parameters(), fused=fused, **options)


def update(network: torch.nn.Module, optimiser: Any, clip: float) -> None:
    """Take an optimiser step with the gradients clipped to this norm, then clear them."""
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def random_stream(*numbers: int) -> np.random.Generator:
    """Return an independent random stream for (seed, purpose, step, slot, ...)."""
    return np.random.default_rng(list(numbers))


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _what_remains(run: RunFolder) -> str:
    return f"{run.checkpoint} stays" if run.checkpoint.is_file() else "no checkpoint yet"


class _Signals:
    """Defer SIGTERM (a job's time is up) and the first Ctrl-C until the step is done."""

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


class WeightAverage:
    """An exponential moving average of a network's weights, part of the state.

    average: the network that holds the average. trained: the network whose weights are averaged.
    """

    def __init__(self, average: torch.nn.Module, trained: torch.nn.Module, decay: float):
        self.average, self.trained, self.decay = average, trained, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        means: list[Tensor] = list(self.average.parameters())
        latest: list[Tensor] = list(self.trained.parameters())
        torch._foreach_lerp_(means, latest, 1 - decay)  # one kernel for many weights
        for held, buffer in zip(self.average.buffers(), self.trained.buffers(), strict=True):
            held.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.load_state_dict(state)


def prefetch(make: Callable[[Any], Any], items: Iterator[Any], workers: int) -> Iterator[Any]:
    """Yield make(item) in order, computed by threads up to 2 * workers items ahead.

    The calling thread draws the items. Without workers nothing is computed ahead.
    """
    if workers < 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(make, item) for item in islice(items, 2 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(make, item) for item in islice(items, 1))
            yield result
