"""Run a generator's networks through torch.compile, for a bounded number of shapes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_SHAPES = 8  # compiled for each network
MAX_BATCH = 8  # crops in one pass; batches are split into 8, 4, 2 and 1, which keeps shapes few

Network = Callable[..., Tensor]


class Compiled:
    """Calls networks compiled, one compilation for each input shape.

    On CUDA the mode is "reduce-overhead", which records the kernels of a pass as one CUDA graph; on
    a CPU it is the default mode. A shape is compiled when it first occurs. Further shapes than
    ``max_shapes`` run uncompiled, with one warning. If torch cannot compile, one warning gives the
    reason and everything runs uncompiled from then on. Calls with gradients are never compiled.
    Copies and pickles keep the settings and compile again.

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
        self._off = self._full = False
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        """Whether a network is compiled and none has failed."""
        return bool(self._runs) and not self._off

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
        if self._off or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return network(*inputs)
        parts = []
        for part in zip(*(x.split(in_parts(len(x))) for x in inputs), strict=True):
            try:
                run = self._run(network, part)
                if run is None:
                    return network(*inputs)
                parts.append(run(*part).clone())  # the next pass of a CUDA graph overwrites this
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of many types, from torch and its backend
                out = network(*inputs)  # raises too if the network itself is at fault
                self._disable(error)
                return out
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, network: Network, inputs: tuple[Tensor, ...]) -> Network | None:
        """Return the network compiled for inputs like these, or None at the limit of shapes."""
        device = inputs[0].device
        layout = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        key = network, layout, device, _autocast(device.type)
        with self._lock:
            if key in self._runs:
                return self._runs[key]
            if self._counts.get(network, 0) < self.max_shapes:
                self._counts[network] = self._counts.get(network, 0) + 1
                self._runs[key] = self._compile(network, device, len(self._runs))
                return self._runs[key]
            first, self._full = not self._full, True
        if first:
            warnings.warn(
                f"{self.max_shapes} shapes are compiled: others run as they are; use crops of one "
                "size, or allow more with generator.compile(max_shapes=...)",
                stacklevel=2,
            )
        return None

    def _compile(self, network: Network, device: torch.device, number: int) -> Network:
        def run(*inputs: Tensor) -> Tensor:
            return network(*inputs)

        # a code object of its own, since torch limits the compilations of one
        run.__code__ = run.__code__.replace(co_name=f"compiled_{number}")
        mode = "reduce-overhead" if device.type == "cuda" and self.backend == "inductor" else None
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode, backend=self.backend)

    def _disable(self, error: Exception) -> None:
        with self._lock:
            first, self._off = not self._off, True
        if first:
            reason = " ".join(str(error).split())[:300]
            warnings.warn(
                "torch.compile does not work here, so the generator runs as it is "
                f"({type(error).__name__}: {reason})",
                stacklevel=3,
            )


def in_parts(batch: int) -> list[int]:
    """Split a batch into sizes of 8, then 4, 2 and 1."""
    whole, rest = divmod(batch, MAX_BATCH)
    return [MAX_BATCH] * whole + [size for size in (4, 2, 1) if rest & size]


def _autocast(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if kind == "cpu" else torch.is_autocast_enabled()
