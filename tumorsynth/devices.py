"""Devices that are none, devices that lack an operator, and devices that are lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_said: set[tuple[str, str]] = set()


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
