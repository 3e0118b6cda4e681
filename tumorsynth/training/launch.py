"""Where a training runs: Lightning Fabric, or one process with torch alone where that is absent."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.models.conv import cpu_computes_bfloat16
from tumorsynth.training.config import Hardware


def check_hardware(hardware: Hardware) -> None:
    """ValueError for what this machine has not: said before the scans are read."""
    kind = (hardware.accelerator or "auto").lower()
    if kind not in ("auto", "cpu", "cuda", "gpu", "mps", "tpu"):
        raise ValueError(f"--accelerator must be cpu, cuda or gpu, got {hardware.accelerator}")
    apple = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": apple}
    if not there.get(kind, kind != "gpu" or any(there.values())):
        raise ValueError(
            f"--accelerator {hardware.accelerator}: there is no such GPU here; take --accelerator "
            "cpu, or leave it out"
        )
    devices = (hardware.devices or "auto").replace(" ", "")  # as Lightning has them
    numbers = all(part.isdigit() for part in devices.rstrip(",").split(","))
    if devices == "0" or not (numbers or devices in ("auto", "-1")):
        raise ValueError(f"--devices must be at least 1, or auto, got {hardware.devices}")


def usable_precision(hardware: Hardware, precision: str) -> str:
    """``precision``, or 32-true on a CPU that emulates bfloat16, which is ten times slower."""
    kind = (hardware.accelerator or "auto").lower()
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = kind == "cpu" or (kind == "auto" and not gpu)
    if not precision.startswith("bf16") or not on_cpu or cpu_computes_bfloat16():
        return precision
    warnings.warn(
        f"this CPU does not compute in bfloat16, so training uses --precision 32-true, not "
        f"{precision}",
        stacklevel=2,
    )
    return "32-true"


def launch(hardware: Hardware, precision: str) -> Any:
    """A launched Fabric, or an `Alone` with the same methods.

    What the hardware leaves open is left to ``fabric run`` (LT_* variables), torchrun and SLURM.
    """
    try:
        from lightning.fabric import Fabric
    except ModuleNotFoundError:
        if hardware.devices not in (None, "1") or "LOCAL_WORLD_SIZE" in os.environ:
            raise ModuleNotFoundError(
                'more than one device needs lightning: pip install "tumorsynth[train]"'
            ) from None
        return Alone(hardware.accelerator, usable_precision(hardware, precision))
    for name in ("lightning.fabric", "lightning.pytorch"):  # either may say what it is about to do
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1x1 layers
    given: dict[str, Any] = {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": hardware.num_nodes,
        "strategy": hardware.strategy,
    }
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local and "LT_CLI_USED" not in os.environ:  # torchrun: it has started the processes
        given["devices"] = given["devices"] or local
        given["num_nodes"] = given["num_nodes"] or int(os.environ["WORLD_SIZE"]) // int(local)
    if given["devices"] is None and "LT_DEVICES" not in os.environ:
        given["devices"] = "1"
    kept = {key: value for key, value in given.items() if value is not None}
    if isinstance(kept.get("devices"), str) and kept["devices"].isdigit():
        kept["devices"] = int(kept["devices"])
    if os.environ.get("LT_PRECISION") is None:
        kept["precision"] = usable_precision(hardware, precision)
    fabric = Fabric(**kept)
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has started the processes
        fabric.launch()
    # or the threads of gloo outlive what they work for, and now and then abort an ended process
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Alone:
    """What the engine asks of Fabric, for one process: nothing but torch."""

    global_rank, world_size, is_global_zero = 0, 1, True

    def __init__(self, accelerator: str | None, precision: str):
        kind = accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device("cuda" if kind == "gpu" else kind)
        self.precision = precision

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def setup(self, module: nn.Module, optimiser: Any) -> tuple[nn.Module, Any]:
        return module.to(self.device), optimiser

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def all_reduce(self, values: Tensor, reduce_op: str) -> Tensor:
        return values

    def barrier(self) -> None:
        pass
