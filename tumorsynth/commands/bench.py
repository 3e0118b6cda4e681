"""``tumorsynth bench``: the time and memory of one tumour on this machine, step by step."""

from __future__ import annotations

import os
import statistics
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BUSY_CORES = 0.7  # load average of the minute before, from which times are not to be relied on


def bench(
    generator: Annotated[
        str, typer.Option(help="Bundled name, generator folder or hub id.")
    ] = "liver-early",
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, ... [default: cuda if available]", show_default=False
        ),
    ] = None,
    side: Annotated[
        int, typer.Option(min=32, max=512, help="Side of the patch, in voxels of 1 mm.")
    ] = 96,
    size_mm: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LOW HIGH",
            help="Range of the tumour's diameter in mm. [default: 15 20]",
            show_default=False,
        ),
    ] = (15.0, 20.0),
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed calls.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. [default: torch's own choice]", show_default=False),
    ] = None,
) -> None:
    """Time one tumour in a patch, step by step, on this machine.

    Prints medians after a warm-up, and the share of four fixed convolutions that a call takes, by
    which you can compare machines. The convolutions are timed in turn with the calls, so that other
    programs slow both alike. On a GPU the timed steps are synchronised and add up to more than the
    whole call, which is not.
    """
    where_and_what = f"{size_mm[0]:g} to {size_mm[1]:g} mm in a patch of {side}^3"
    # at once and apart from the results: importing torch takes seconds
    typer.echo(f"timing one tumour of {generator}, {where_and_what}", err=True)
    busy_cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    import torch

    from tumorsynth.commands.shared import check_device
    from tumorsynth.commands.timing import (
        call_times,
        once,
        patch_and_label,
        peak_mib,
        reference_work,
    )
    from tumorsynth.synthesizer import SynthesizeTumor

    if threads is not None:
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    where = torch.device(device)
    image, label = patch_and_label(side, device=where)
    synth = SynthesizeTumor(generator, count=1, size_mm=size_mm)
    synth(image, label, spacing=1.0, seed=0)
    if not synth.report[0]["applied"]:
        raise ValueError(
            f"no tumour was made in a patch of {side} voxels: {synth.report[0]['reason']}; "
            "give a larger --side or a smaller --size-mm"
        )
    convolve, reference_ms = reference_work(where), list[float]()
    convolve()  # warm-up
    # minutes on a slow machine
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("timing", total=2 * repeats)

        def between() -> None:
            progress.advance(bar)
            reference_ms.append(once(convolve, where)[0])

        found = call_times(synth, image, label, repeats, between, spacing=1.0)
    peak = peak_mib(lambda: synth(image, label, spacing=1.0, seed=0), where)
    call = found.pop("call")
    # of a call and the convolutions right before it
    share = statistics.median(
        one / other for one, other in zip(call["wall_ms"], reference_ms, strict=False)
    )
    Console().print(_table(found), highlight=False)
    whole = statistics.median(call["wall_ms"])
    words = f"one call, {where_and_what}: {whole:.1f} ms"
    typer.echo(words + ("" if peak is None else f", {peak:.0f} MiB of memory"))
    typer.echo(
        f"{share:.2f} of four float32 convolutions (3x3x3, 32 channels, 96^3), "
        f"{statistics.median(reference_ms):.1f} ms"
    )
    if busy_cores > BUSY_CORES:
        typer.echo(
            f"{busy_cores:.1f} cores were busy in the minute before: if other programs still run, "
            "all times are too long",
            err=True,
        )
    typer.echo(f"{generator} on {_machine(where)}")


def _table(steps: dict[str, dict[str, list[float]]]) -> Table:
    medians = {name: statistics.median(ms["wall_ms"]) for name, ms in steps.items()}
    total = sum(medians.values())
    table = Table(box=None)
    table.add_column("step")
    for heading in ("ms", "share"):
        table.add_column(heading, justify="right")
    for name, ms in medians.items():
        table.add_row(name, f"{ms:.1f}", f"{ms / total:.0%}")
    return table


def _machine(device: Any) -> str:
    """Device, on a CPU with what decides its speed, and the version of torch."""
    import torch

    from tumorsynth.commands.timing import cpu_name
    from tumorsynth.models.kernels import cpu_isa

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {cpu_isa()}, {threads} thread" + ("" if threads == 1 else "s")
    return f"{name or device}, torch {torch.__version__}"
