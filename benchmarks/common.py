"""What every benchmark shares: the machine's description, spread, and writing results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tumorsynth
from tumorsynth.commands.timing import cpu_name
from tumorsynth.models.kernels import cpu_isa

HERE = Path(__file__).resolve().parent
_written: set[Path] = set()  # said once each


def arguments(doc: str, output: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every timing shares; the script adds its own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", type=_device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=repeats)
    help = f"results/NAME.json [default: {output}_cpu, {output}_cpu_2threads, {output}_cuda]"
    parser.add_argument("-o", "--output", metavar="NAME", help=help)
    parser.set_defaults(question=output)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; torch gets its number of threads."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threads = f"_{args.threads}threads" if args.device.type == "cpu" and args.threads > 1 else ""
    args.output = args.output or f"{args.question}_{args.device.type}{threads}"
    return args


def _device(name: str) -> torch.device:
    """With its number, as a tensor's device has it: generators are kept by device."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def clock(device: torch.device) -> tuple[str, str]:
    """The clock a picture is drawn by, and its name: a GPU's work is not the CPU's."""
    return ("cpu_ms", "CPU time") if device.type == "cpu" else ("wall_ms", "time")


def environment() -> dict[str, Any]:
    """Device, versions and commit of a run."""
    return {
        "cpu": cpu_name(),
        "isa": cpu_isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32 if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "triton": _version("triton"),
        "tumorsynth": tumorsynth.__version__,
        "commit": _commit(),
    }


@cache
def _commit() -> str:
    given = os.environ.get("BENCHMARK_COMMIT")  # where the checkout is a copy without git
    if given is not None or shutil.which("git") is None:
        return given or "unknown"
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=HERE).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75]).round(2).tolist()
    return {"median": middle, "q25": low, "q75": high}


def spreads(clocks: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """`tumorsynth.commands.timing.times` as medians and quartiles."""
    return {clock: spread(values) for clock, values in clocks.items()}


def picture(name: str, draw: Callable[[Any], None], panels: int = 1) -> None:
    """results/<name>.png: ``draw(axes)``, a row of panels; none where matplotlib is not there."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.2), layout="constrained")
    draw(axes)
    figure.savefig(HERE / "results" / f"{name}.png", dpi=80)
    plt.close(figure)


def write(name: str, results: dict[str, Any]) -> None:
    """results/<name>.json, or a file of that path, with the environment."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(), **results}, indent=2) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)  # whole at any moment
    if path not in _written:
        _written.add(path)
        print(path, flush=True)
