"""`Generator.compile`: its networks through torch.compile, for a bounded number of shapes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_SHAPES = 8
TOGETHER = 8  # crops in one pass; a batch goes in parts of 8, 4, 2 and 1, so that few shapes arise

Network = Callable[..., Tensor]


class Compiled:
    """Calls networks compiled, each shape of input by itself, or as they are where that fails.

    On CUDA in the mode "reduce-overhead", which records the kernels of a pass as one CUDA graph, on
    the CPU in the default one. Shapes are compiled when they first come, at most ``max_shapes`` of
    each network; others run as they are, which is said once. If torch cannot compile, that is
    said once with its reason, and everything runs as it is from then on. With gradients nothing is
    compiled. Copies and pickles take the settings along and compile anew.

    backend: of torch.compile.
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
        """Forget what was compiled, and that something failed."""
        self._runs: dict[tuple[Any, ...], Network] = {}
        self._counts: dict[Network, int] = {}
        self._off = self._full = False
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        """Whether something is compiled and nothing has failed."""
        return bool(self._runs) and not self._off

    def __getstate__(self) -> dict[str, Any]:
        return {"max_shapes": self.max_shapes, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, network: Network, *inputs: Tensor) -> Tensor:
        """network(*inputs); the inputs are (B, ...), one crop each."""
        if self._off or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return network(*inputs)
        parts = []
        for part in zip(*(x.split(in_parts(len(x))) for x in inputs), strict=True):
            try:
                run = self._run(network, part)
                if run is None:
                    return network(*inputs)
                parts.append(run(*part).clone())  # a CUDA graph's next pass writes over its answer
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of many kinds, torch's own and its backend's
                made = network(*inputs)  # fails too where torch.compile is not to blame
                self._give_up(error)
                return made
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, network: Network, inputs: tuple[Tensor, ...]) -> Network | None:
        """The compiled network for inputs like these, or None where there are enough shapes."""
        device = inputs[0].device
        alike = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        key = network, alike, device, _autocast(device.type)
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
                f"{self.max_shapes} shapes are compiled: others run as they are; crops of one size "
                "keep them few, generator.compile(max_shapes=...) allows more",
                stacklevel=2,
            )
        return None

    def _compile(self, network: Network, device: torch.device, number: int) -> Network:
        def run(*inputs: Tensor) -> Tensor:
            return network(*inputs)

        # code of its own: torch counts the compilations of a function, and stops at some
        run.__code__ = run.__code__.replace(co_name=f"compiled_{number}")
        mode = "reduce-overhead" if device.type == "cuda" and self.backend == "inductor" else None
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode, backend=self.backend)

    def _give_up(self, error: Exception) -> None:
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
    """The sizes of a batch's parts: as many of 8 as there are, then 4, 2 and 1."""
    whole, rest = divmod(batch, TOGETHER)
    return [TOGETHER] * whole + [size for size in (4, 2, 1) if rest & size]


def _autocast(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if kind == "cpu" else torch.is_autocast_enabled()
