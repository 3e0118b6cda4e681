"""What several commands have in common: options, what their words mean, and the synthesizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tumorsynth.scans import nifti

if TYPE_CHECKING:
    from tumorsynth.intensity import HU, Scaled
    from tumorsynth.synthesizer import SynthesizeTumor

# Shared options, so that every command says the same of the same word.
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
GeneratorName = Annotated[
    str | None,
    typer.Option(
        help="Bundled name, generator folder or hub id; `tumorsynth info` lists the bundled ones. "
        "[default: liver-early, or hu2023 where that does not ship]",
        show_default=False,
    ),
]
Count = Annotated[
    str | None,
    typer.Option(
        help="Tumours per scan: N, or LOW-HIGH to draw from. "
        "[default: 1-3; with --size-prior as many as real cases have]",
        show_default=False,
    ),
]
SizeMm = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Range of the equivalent diameter in mm. [default: 8 20]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Same seed, same tumours.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int,
    typer.Option(help="CPU threads per process; another number may change a diffusion's last bit."),
]


def fail(words: str, code: int) -> int:
    """Say what is wrong in one line on stderr; returns the exit code."""
    print(f"tumorsynth: {plain(words)}", file=sys.stderr)
    return code


def plain(value: object) -> str:
    """On one line, and no command to the terminal: names and cards may be anybody's."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def check_device(device: str) -> None:
    """ValueError for what is no device of this machine."""
    import torch

    from tumorsynth import devices

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must name a torch device, got {device!r}; try cpu") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there is no such GPU here; use --device cpu")
    devices.check_device(wanted)


def synthesizer(
    *, generator: str | None, device: str, threads: int | None = None, **options: Any
) -> SynthesizeTumor:
    # now, and not after the work is done
    nifti.require_nibabel()
    from tumorsynth.scans.preview import require_matplotlib

    require_matplotlib()
    import torch

    from tumorsynth.generators.store import default_generator, load_generator
    from tumorsynth.synthesizer import SynthesizeTumor

    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = torch.device(device)
    name = generator or default_generator()
    load_generator(name, wanted)  # damaged weights are said before any scan is read
    return SynthesizeTumor(generator=name, device=wanted, **options)


def share(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(
            f"--mass-effect must be a share from 0 to 0.9, or auto, got {text!r}"
        ) from None


def bulge_range(text: str) -> bool | tuple[float, float]:
    if text in ("no", "prior"):
        return text == "prior"
    low, _, high = text.partition("-")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise ValueError(
            f"--bulge must be prior, no, a share from 0 to 0.9, or LOW-HIGH, got {text!r}"
        ) from None


def count_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"--count must be N or LOW-HIGH, as 3 or 1-3, got {text!r}") from None


def scale_of(text: str) -> HU | Scaled:
    from tumorsynth.intensity import HU, Scaled

    if text.lower() == "hu":
        return HU()
    try:
        a_min, a_max, b_min, b_max = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--intensity must be hu or four numbers as in -175,250,0,1, got {text!r}"
        ) from None
    return Scaled(a_min, a_max, b_min, b_max)
