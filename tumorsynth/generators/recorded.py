"""One pass of a network as a CUDA graph: its kernels are recorded once and replayed together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM_UP_PASSES = 2  # in which torch compiles, and chooses kernels, before it records
_one_at_a_time = threading.Lock()  # recording synchronises, which another recording forbids


class RecordedPass:
    """Replays a function's kernels on inputs of the same shapes.

    Inputs are copied into memory of the graph's own. One thread at a time may call it and use the
    answer, which the next call overwrites; on another stream than before, it must wait for that.

    Args:
        run: the function, which neither waits for the GPU nor draws random numbers.
        inputs: what to record it with.
        pool: from `new_pool`.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any) -> None:
        with torch.inference_mode(False):  # what is made within it cannot be written to outside
            self._inputs = [x.clone() for x in inputs]
        device = inputs[0].device
        with _one_at_a_time, torch.cuda.device(device), _without_kept_casts():
            stream, outside = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_PASSES):
                    run(*self._inputs)
            outside.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # other threads may go on with what CUDA would forbid this one
            recording: Any = torch.cuda.graph
            with recording(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the function gives for these inputs."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output


def new_pool() -> Any:
    """Return memory for graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def _without_kept_casts() -> Iterator[None]:
    """Keep autocast from reusing weights that it cast earlier, which a graph would not find."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
