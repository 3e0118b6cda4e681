"""Launch a training: with Lightning Fabric, or in one process if Lightning is not installed."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.models.kernels import cpu_computes_bfloat16, cpu_gains_from_bfloat16
from tumorsynth.training.config import Hardware


def check_hardware(hardware: Hardware) -> None:
    """Check that this machine has the hardware, before scans are read.

    Raises:
        ValueError: for an accelerator or devices that it does not have.
    """
    kind = (hardware.accelerator or "auto").lower()
    if kind not in ("auto", "cpu", "cuda", "gpu", "mps", "tpu"):
        raise ValueError(f"--accelerator must be cpu, cuda or gpu, got {hardware.accelerator}")
    apple = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.is_available(), "mps": apple}
    if not available.get(kind, kind != "gpu" or any(available.values())):
        raise ValueError(
            f"--accelerator {hardware.accelerator}: there is no such GPU here; use --accelerator "
            "cpu, or leave it out"
        )
    devices = (hardware.devices or "auto").replace(" ", "")  # in Lightning's notation
    numbers = all(part.isdigit() for part in devices.rstrip(",").split(","))
    if devices == "0" or not (numbers or devices in ("auto", "-1")):
        raise ValueError(f"--devices must be at least 1, or auto, got {hardware.devices}")


def usable_precision(hardware: Hardware, precision: str) -> str:
    """Return the precision to train in on this hardware.

    Args:
        hardware: where to run.
        precision: "bf16-mixed", which becomes "32-true", with a warning, on a CPU that emulates it;
            "32-true"; or "auto" for the faster one.
    """
    kind = (hardware.accelerator or "auto").lower()
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = kind == "cpu" or (kind == "auto" and not gpu)
    if precision == "auto":
        return "bf16-mixed" if not on_cpu or cpu_gains_from_bfloat16() else "32-true"
    if not precision.startswith("bf16") or not on_cpu or cpu_computes_bfloat16():
        return precision
    warnings.warn(
        f"this CPU does not compute in bfloat16, so training uses --precision 32-true, not "
        f"{precision}",
        stacklevel=2,
    )
    return "32-true"


def launch(hardware: Hardware, precision: str) -> Any:
    """Launch Lightning Fabric, or return a `SingleProcess` with the same methods.

    ``fabric run`` (LT_* variables), torchrun and SLURM decide what the hardware leaves open.

    Args:
        hardware: where to run.
        precision: "auto", "bf16-mixed" or "32-true".

    Raises:
        ModuleNotFoundError: for several devices without Lightning.
    """
    try:
        from lightning.fabric import Fabric
    except ModuleNotFoundError:
        if hardware.devices not in (None, "1") or "LOCAL_WORLD_SIZE" in os.environ:
            raise ModuleNotFoundError(
                'more than one device needs lightning: pip install "tumorsynth[train]"'
            ) from None
        return SingleProcess(hardware.accelerator, usable_precision(hardware, precision))
    for name in ("lightning.fabric", "lightning.pytorch"):  # both announce their settings
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    # 1x1x1 layers have ambiguous strides
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    fabric = Fabric(**_fabric_options(hardware, precision))
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has started the processes
        fabric.launch()
    # otherwise the threads of gloo outlive the training and sometimes abort the process
    atexit.register(_destroy_process_group)
    return fabric


def _fabric_options(hardware: Hardware, precision: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": hardware.num_nodes,
        "strategy": hardware.strategy,
    }
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local and "LT_CLI_USED" not in os.environ:  # torchrun has started the processes
        options["devices"] = options["devices"] or local
        options["num_nodes"] = options["num_nodes"] or int(os.environ["WORLD_SIZE"]) // int(local)
    if options["devices"] is None and "LT_DEVICES" not in os.environ:
        options["devices"] = "1"
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(options.get("devices"), str) and options["devices"].isdigit():
        options["devices"] = int(options["devices"])
    if os.environ.get("LT_PRECISION") is None:
        options["precision"] = usable_precision(hardware, precision)
    return options


def _destroy_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class SingleProcess:
    """The methods of Fabric that the engine uses, for one process and with torch alone."""

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
