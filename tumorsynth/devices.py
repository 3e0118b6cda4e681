"""Devices that are none, lack an operator or are lost, and a program's own settings."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_said: set[tuple[str, str]] = set()
_full_lock = threading.Lock()
_full_depth = 0  # of full_float32, over all threads: the settings are the process's
_full_restore = ExitStack()


def parse_device(device: Any) -> torch.device:
    """The torch device of that name; whether it is there is found out where it is used."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must name a torch device, got {device!r}; pass 'cpu', 'cuda' or None for the "
            "image's own"
        ) from error


def check_device(device: torch.device) -> None:
    """ValueError unless torch can compute on it here and now; a forked worker's CUDA RuntimeError
    passes."""
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
    """float32 and the CPU where a tensor is made without saying which, as the code here expects.

    A program may have said otherwise with ``torch.set_default_dtype`` or ``set_default_device``;
    a seed shall mean the same tumours there, and CPU generators draw on the CPU alone.
    """
    found, dtype = torch.empty(()).device, torch.get_default_dtype()
    with ExitStack() as stack:
        if found.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def full_float32(kind: str) -> Iterator[None]:
    """float32 with all of its digits on a device of that kind, for what cannot do with fewer.

    By default PyTorch rounds what goes into CUDA's convolutions to TF32, 10 of 23 digits; a program
    may have said the same of matrix products. Both are as they were afterwards.
    """
    global _full_depth
    if kind != "cuda":
        yield
        return
    with _full_lock:
        _full_depth += 1
        if _full_depth == 1:
            _without_tf32(_full_restore)
    try:
        yield
    finally:
        with _full_lock:
            _full_depth -= 1
            if _full_depth == 0:
                _full_restore.close()


def _without_tf32(restore: ExitStack) -> None:
    backends: Any = torch.backends

    def without(owner: Any, name: str, exact: object) -> None:
        found = getattr(owner, name)
        if found != exact:
            restore.callback(setattr, owner, name, found)
            setattr(owner, name, exact)

    # torch >= 2.9 has newer names, of which some are for several operators, and wants no mixture
    general = (getattr(owner, "fp32_precision", "none") for owner in (backends, backends.cudnn))
    newer = any(precision != "none" for precision in general)
    for old, new in (
        (backends.cudnn, lambda: backends.cudnn.conv),
        (backends.cuda.matmul, lambda: backends.cuda.matmul),
    ):
        if not newer:
            try:
                without(old, "allow_tf32", False)
                continue
            except RuntimeError:  # what torch says of a mixture
                pass
        without(new(), "fp32_precision", "ieee")


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether asking a tensor for its values costs no waiting for a device."""
    return tensor.device.type == "cpu"


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. From ordinary memory CUDA has read it when this returns, so that
    neither waiting for the device's earlier work nor keeping the tensor is needed."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def or_on_cpu(step: str, device: torch.device, work: Callable[[torch.device], T]) -> T:
    """work(device), or work(CPU) where the device lacks an operator, which is said once."""
    try:
        return work(device)
    except NotImplementedError as error:  # what torch says of an operator without a kernel
        if device.type == "cpu":
            raise
        if (step, device.type) not in _said:
            _said.add((step, device.type))
            reason = str(error).strip().split("\n")[0][:160]
            warnings.warn(
                f"{device.type} lacks an operator, so {step} runs on the CPU: {reason}",
                stacklevel=2,
            )
    return work(torch.device("cpu"))


def is_lost(error: BaseException) -> bool:
    """Whether a device failed for good: every later call in this process will fail as well."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    kinds = getattr(torch, "AcceleratorError", ())  # torch >= 2.8
    return isinstance(error, kinds) or str(error).startswith(("CUDA error", "HIP error"))
