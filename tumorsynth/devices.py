"""Check and use devices, and hold torch's global settings where results depend on them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_warned: set[tuple[str, str]] = set()  # (step, device type) of `or_on_cpu`
LARGEST_UNPINNED_BYTES = 2**16  # CUDA copies more than this from pageable memory by waiting


def parse_device(device: Any) -> torch.device:
    """Return the torch device of a name, without checking that it exists.

    Raises:
        ValueError: if torch knows no device of that name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must name a torch device, got {device!r}; pass 'cpu', 'cuda' or None for the "
            "image's own"
        ) from error


def check_device(device: torch.device) -> None:
    """Check that torch can compute on a device.

    Raises:
        ValueError: if it cannot.
        RuntimeError: torch's own, in a forked worker that uses CUDA or if memory is full.
    """
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if "forked subprocess" in str(error) or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(
            f"device must be one that torch can compute on here, got {str(device)!r} ({reason}); "
            "pass 'cpu', or install the torch that goes with it"
        ) from error


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Make float32 and the CPU the defaults for new tensors.

    A program may have called ``torch.set_default_dtype`` or ``set_default_device``. A seed must
    give the same tumours there, and CPU generators draw on the CPU only.
    """
    device, dtype = torch.empty(()).device, torch.get_default_dtype()
    with ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


class _OfThread(threading.local):
    """How many `full_float32` of this thread hold for convolutions alone that say so themselves."""

    depth = 0


class _OfProcess:
    """A setting that allows TF32, off while any thread needs it off.

    Args:
        older: returns the owner of ``allow_tf32``.
        newer: returns the owner of ``fp32_precision``, of torch >= 2.9.
    """

    def __init__(self, older: Callable[[], Any], newer: Callable[[], Any]) -> None:
        self._older, self._newer = older, newer
        self._lock, self._depth, self._restore = threading.Lock(), 0, ExitStack()

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._turn_off()
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._restore.close()

    def _turn_off(self) -> None:
        backends: Any = torch.backends
        # torch >= 2.9 has newer settings, some of them for several operators, and refuses a mixture
        overall = (getattr(owner, "fp32_precision", "none") for owner in (backends, backends.cudnn))
        if all(precision == "none" for precision in overall):
            try:
                return self._set(self._older(), "allow_tf32", False)
            except RuntimeError:  # torch refuses a mixture
                pass
        self._set(self._newer(), "fp32_precision", "ieee")

    def _set(self, owner: Any, name: str, value: object) -> None:
        current = getattr(owner, name)
        if current != value:
            self._restore.callback(setattr, owner, name, current)
            setattr(owner, name, value)


_of_thread = _OfThread()
_convolutions = _OfProcess(lambda: torch.backends.cudnn, lambda: torch.backends.cudnn.conv)  # type: ignore[attr-defined]
_matrix_products = _OfProcess(
    lambda: torch.backends.cuda.matmul, lambda: torch.backends.cuda.matmul
)


@contextmanager
def full_float32(kind: str, own_layers: bool = False) -> Iterator[None]:
    """Compute convolutions and matrix products in full float32 on devices of a type.

    By default PyTorch rounds the inputs of CUDA convolutions to TF32 (10 of 23 bits), and a program
    may have asked for the same in matrix products. The settings are restored afterwards. They
    belong to the process: where they allow TF32, other threads are without it meanwhile.

    Args:
        kind: type of the device, such as "cuda".
        own_layers: whether all convolutions within are `tumorsynth.models.conv`'s and run as they
            are. These then ask for full float32 in each call, and the process's setting for
            convolutions stays. PyTorch offers no such argument for matrix products.
    """
    if kind != "cuda":
        yield
        return
    with ExitStack() as stack:
        if own_layers:
            _of_thread.depth += 1
            stack.callback(_leave_own_layers)
        else:
            stack.enter_context(_convolutions.off())
        stack.enter_context(_matrix_products.off())
        yield


def _leave_own_layers() -> None:
    _of_thread.depth -= 1


def asks_for_full_float32() -> bool:
    """Whether this thread's convolutions must ask for full float32; see `full_float32`."""
    return _of_thread.depth > 0


def cudnn_flags_without_tf32() -> tuple[bool, bool, bool, bool]:
    """Return the last arguments of ``torch._convolution``: the process's settings, TF32 off."""
    cudnn: Any = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return cudnn.benchmark, deterministic, cudnn.enabled, False


def allow_deterministic_products(device: torch.device) -> None:
    """Let CUDA's matrix products run in a program that asks torch for deterministic algorithms.

    Otherwise torch raises an error there. As Lightning does, this sets CUBLAS_WORKSPACE_CONFIG,
    unless the program has.
    """
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be read without host-device synchronisation."""
    return tensor.device.type == "cpu"


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the device's earlier work.

    CUDA has read a small tensor in pageable memory when this returns. For a large one it would
    wait, so that goes through pinned memory, which torch keeps until the copy is done. Either way
    the caller need not keep the tensor.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if tensor.numel() * tensor.element_size() > LARGEST_UNPINNED_BYTES:
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def stream_of(device: torch.device) -> int:
    """Return which queue of the device this thread's operators go to; 0 where there is one.

    What one queue is still computing, another must not read.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def or_on_cpu(step: str, device: torch.device, work: Callable[[torch.device], T]) -> T:
    """Return work(device), or work(CPU) if the device lacks an operator.

    Args:
        step: name of the work, for the one warning.
        device: where to try first.
        work: the function to call.
    """
    try:
        return work(device)
    except NotImplementedError as error:
        warn_of_missing_operator(step, device, error)
    return work(torch.device("cpu"))


def warn_of_missing_operator(step: str, device: torch.device, error: NotImplementedError) -> None:
    """Warn, once, that work runs on the CPU.

    Args:
        step: name of the work.
        device: where it was tried.
        error: torch's, for an operator without a kernel; raised again if that device is the CPU.
    """
    if device.type == "cpu":
        raise error
    if (step, device.type) not in _warned:
        _warned.add((step, device.type))
        reason = str(error).strip().split("\n")[0][:160]
        warnings.warn(
            f"{device.type} lacks an operator, so {step} runs on the CPU: {reason}", stacklevel=3
        )


def is_lost(error: BaseException) -> bool:
    """Whether a device failed for good, so that every later call in this process fails too."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    kinds = getattr(torch, "AcceleratorError", ())  # torch >= 2.8
    return isinstance(error, kinds) or str(error).startswith(("CUDA error", "HIP error"))
