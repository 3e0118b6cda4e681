"""Run a generator's networks through torch.compile, for a bounded number of shapes."""

from __future__ import annotations

import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tumorsynth.generators.recorded import RecordedPass, new_pool

MAX_SHAPES = 8  # compiled for each network
MAX_BATCH = 8  # crops in one pass; batches are split into 8, 4, 2 and 1, which keeps shapes few

Network = Callable[..., Tensor]


class Compiled:
    """Calls networks compiled, one compilation for each input shape.

    On CUDA the kernels of a pass are recorded as one CUDA graph. A shape is compiled when it first
    occurs. Further shapes than ``max_shapes`` run uncompiled, with one warning. If torch cannot
    compile or record, one warning gives the reason, and everything runs uncompiled or unrecorded
    from then on. Calls with gradients are never compiled. Threads take turns, since graphs read and
    write memory of their own. Copies, pickles and forked processes keep the settings and compile
    again.

    Args:
        max_shapes: shapes to compile for each network.
        backend: passed to torch.compile.

    Raises:
        ValueError: if ``max_shapes`` is not a positive whole number.
    """

    def __init__(
        self, max_shapes: int = MAX_SHAPES, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        if isinstance(max_shapes, bool) or not isinstance(max_shapes, int) or max_shapes < 1:
            raise ValueError(
                f"max_shapes must be a positive whole number, got {max_shapes!r}; pass for example "
                f"{MAX_SHAPES}"
            )
        self.max_shapes, self.backend = max_shapes, backend
        self.clear()

    def clear(self) -> None:
        """Discard compiled networks and earlier failures."""
        self._runs: dict[tuple[Any, ...], Network] = {}
        self._counts: dict[Network, int] = {}
        self._off = self._full = self._unrecorded = False
        self._lock, self._process = threading.Lock(), os.getpid()
        self._pools: dict[torch.device, Any] = {}
        self._ends: dict[torch.device, torch.cuda.Event] = {}

    @property
    def works(self) -> bool:
        """Whether a network is compiled and none has failed."""
        return bool(self._runs) and not (self._off or self._unrecorded)

    def __getstate__(self) -> dict[str, Any]:
        return {"max_shapes": self.max_shapes, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, network: Network, *inputs: Tensor) -> Tensor:
        """Return network(*inputs).

        Args:
            network: the network to call.
            inputs: tensors (B, ...), one crop each along B.
        """
        if self._process != os.getpid():  # a fork may copy the lock while another thread holds it
            self.clear()
        if self._off or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return network(*inputs)
        parts = []
        for part in zip(*(x.split(in_parts(len(x))) for x in inputs), strict=True):
            try:
                with self._lock, self._after_the_last_pass(part[0].device):
                    run = self._run(network, part)
                    if run is not None:
                        # the next pass of what the backend recorded overwrites the answer
                        parts.append(run(*part).clone())
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of many types, from torch and its backend
                out = network(*inputs)  # raises too if the network itself is at fault
                self._disable(error)
                return out
            if run is None:
                return network(*inputs)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @contextmanager
    def _after_the_last_pass(self, device: torch.device) -> Iterator[None]:
        """Let this thread's stream of the device wait for the pass before, perhaps on another."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if device not in self._ends:
            self._ends[device] = torch.cuda.Event()
        end = self._ends[device]
        stream.wait_event(end)
        try:
            yield
        finally:
            end.record(stream)

    def _run(self, network: Network, inputs: tuple[Tensor, ...]) -> Network | None:
        """Return the network compiled for inputs like these, or None at the limit of shapes."""
        device = inputs[0].device
        layout = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        key = network, layout, device, _autocast(device.type)
        if key in self._runs:
            return self._runs[key]
        if self._counts.get(network, 0) < self.max_shapes:
            made = self._compile(network, len(self._runs))
            if self._records_on(device):
                made = self._recorded(made, inputs)
            self._counts[network] = self._counts.get(network, 0) + 1
            self._runs[key] = made
            return made
        first, self._full = not self._full, True
        if first:
            warnings.warn(
                f"{self.max_shapes} shapes are compiled: others run as they are; use crops of one "
                "size, or allow more with generator.compile(max_shapes=...)",
                stacklevel=3,
            )
        return None

    def _compile(self, network: Network, number: int) -> Network:
        def run(*inputs: Tensor) -> Tensor:
            return network(*inputs)

        # a code object of its own, since torch limits the compilations of one
        run.__code__ = run.__code__.replace(co_name=f"compiled_{number}")
        return torch.compile(run, fullgraph=True, dynamic=False, backend=self.backend)

    def _records_on(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.backend == "inductor" and not self._unrecorded

    def _recorded(self, run: Network, inputs: tuple[Tensor, ...]) -> Network:
        """Return a recording of a compiled network, or the network itself if that fails.

        Torch's own recordings ("reduce-overhead") belong to one thread: called from another they
        fail, or overwrite its inputs.
        """
        device = inputs[0].device
        if device not in self._pools:
            self._pools[device] = new_pool()
        try:
            return RecordedPass(run, inputs, self._pools[device])
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            run(*inputs)  # raises too if not the recording is at fault
            self._unrecorded = True
            warnings.warn(
                "CUDA graphs do not work here, so the compiled networks run kernel by kernel "
                f"({_reason(error)})",
                stacklevel=4,
            )
            return run

    def _disable(self, error: Exception) -> None:
        with self._lock:
            first, self._off = not self._off, True
        if first:
            warnings.warn(
                "torch.compile does not work here, so the generator runs as it is "
                f"({_reason(error)})",
                stacklevel=3,
            )


def _reason(error: Exception) -> str:
    """Return an error's type and words; without words, where it was raised."""
    words = " ".join(str(error).split())[:300]
    raised = traceback.extract_tb(error.__traceback__)
    if not words and raised:
        last = raised[-1]
        words = f"{Path(last.filename).name}, line {last.lineno}: {last.line}"
    return f"{type(error).__name__}: {words}"


def in_parts(batch: int) -> list[int]:
    """Split a batch into sizes of 8, then 4, 2 and 1."""
    whole, rest = divmod(batch, MAX_BATCH)
    return [MAX_BATCH] * whole + [size for size in (4, 2, 1) if rest & size]


def _autocast(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if kind == "cpu" else torch.is_autocast_enabled()
