"""Check and use devices, and hold torch's global settings where results depend on them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_warned: set[tuple[str, str]] = set()  # (step, device type) of `or_on_cpu`
# full_float32 nests over all threads, since the settings belong to the process
_float32_lock = threading.Lock()
_float32_depth = 0
_float32_restore = ExitStack()


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


@contextmanager
def full_float32(kind: str) -> Iterator[None]:
    """Compute convolutions and matrix products in full float32 on devices of a type.

    By default PyTorch rounds the inputs of CUDA convolutions to TF32 (10 of 23 bits), and a program
    may have asked for the same in matrix products. The settings are restored afterwards.

    Args:
        kind: type of the device, such as "cuda".
    """
    global _float32_depth
    if kind != "cuda":
        yield
        return
    with _float32_lock:
        _float32_depth += 1
        if _float32_depth == 1:
            _without_tf32(_float32_restore)
    try:
        yield
    finally:
        with _float32_lock:
            _float32_depth -= 1
            if _float32_depth == 0:
                _float32_restore.close()


def _without_tf32(restore: ExitStack) -> None:
    backends: Any = torch.backends

    def set_until_restored(owner: Any, name: str, value: object) -> None:
        current = getattr(owner, name)
        if current != value:
            restore.callback(setattr, owner, name, current)
            setattr(owner, name, value)

    # torch >= 2.9 has newer settings, some of them for several operators, and refuses a mixture
    overall = (getattr(owner, "fp32_precision", "none") for owner in (backends, backends.cudnn))
    newer = any(precision != "none" for precision in overall)
    for old, new in (
        (backends.cudnn, lambda: backends.cudnn.conv),
        (backends.cuda.matmul, lambda: backends.cuda.matmul),
    ):
        if not newer:
            try:
                set_until_restored(old, "allow_tf32", False)
                continue
            except RuntimeError:  # torch refuses a mixture
                pass
        set_until_restored(new(), "fp32_precision", "ieee")


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be read without host-device synchronisation."""
    return tensor.device.type == "cpu"


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the device's earlier work.

    CUDA has read a tensor in pageable memory when this returns, so the caller need not keep it.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def or_on_cpu(step: str, device: torch.device, work: Callable[[torch.device], T]) -> T:
    """Return work(device), or work(CPU) if the device lacks an operator.

    Args:
        step: name of the work, for the one warning.
        device: where to try first.
        work: the function to call.
    """
    try:
        return work(device)
    except NotImplementedError as error:  # torch raises it for an operator without a kernel
        if device.type == "cpu":
            raise
        if (step, device.type) not in _warned:
            _warned.add((step, device.type))
            reason = str(error).strip().split("\n")[0][:160]
            warnings.warn(
                f"{device.type} lacks an operator, so {step} runs on the CPU: {reason}",
                stacklevel=2,
            )
    return work(torch.device("cpu"))


def is_lost(error: BaseException) -> bool:
    """Whether a device failed for good, so that every later call in this process fails too."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    kinds = getattr(torch, "AcceleratorError", ())  # torch >= 2.8
    return isinstance(error, kinds) or str(error).startswith(("CUDA error", "HIP error"))
