"""What several commands share: options, the parsing of their values, messages, the transform."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tumorsynth.nifti_header import require_nibabel

if TYPE_CHECKING:
    from tumorsynth.appearance.gate import Gate
    from tumorsynth.intensity import HU, Scaled
    from tumorsynth.synthesizer import SynthesizeTumor

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write the results to.")]
GeneratorName = Annotated[
    str | None,
    typer.Option(
        help="Bundled name, generator folder, hub id or bank of lesions; `tumorsynth info` lists "
        "the bundled ones. [default: liver-early, or hu2023 if that does not ship]",
        show_default=False,
    ),
]
Count = Annotated[
    str | None,
    typer.Option(
        help="Tumours per scan: N, or LOW-HIGH for a random number. "
        "[default: 1-3; with --size-prior, as many as in real cases]",
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
Seed = Annotated[int, typer.Option(help="The same seed gives the same tumours.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Gated = Annotated[
    bool,
    typer.Option(
        "--gate",
        help="Score each tumour (visible, solid, as noisy as the scan, no disc), make a bad one "
        "again, and skip it after three attempts.",
    ),
]
GateLimits = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=LOW:HIGH,...",
        help="The gate with limits of your own, for example visibility=8:,contrast_hu=-60:-15 or "
        "noise_ratio=none; tries=5 makes five attempts. docs/realism.md lists the scores.",
        show_default=False,
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        help="CPU threads per process. Another number may change the last bit of what a diffusion "
        "generator makes."
    ),
]


Geometry = Annotated[
    str | None,
    typer.Option(
        help="Where the sources of a NIfTI header contradict each other, the one to take: sform, "
        "qform or pixdim. [default: refuse such a file]",
        show_default=False,
    ),
]
SameGrid = Annotated[
    bool,
    typer.Option(
        "--same-grid", help="Voxel lies on voxel, although the affines of the two files differ."
    ),
]


def say(words: str) -> None:
    """Print one line on stderr."""
    print(f"tumorsynth: {printable(words)}", file=sys.stderr)


def fail(words: str, code: int) -> int:
    """Print an error on stderr; returns the exit code."""
    say(words)
    return code


def printable(value: object) -> str:
    """Make a name or a card's text safe to print: one line, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def check_device(device: str) -> None:
    """Raise ValueError if this machine has no such device."""
    import torch

    from tumorsynth import devices

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device must name a torch device, got {device!r}; give for example cpu or cuda:0"
        ) from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must name a GPU of this machine, got {device}: no such GPU; use --device cpu"
        )
    devices.check_device(wanted)


def build_synthesizer(
    *, generator: str | None, device: str, threads: int | None = None, **options: Any
) -> SynthesizeTumor:
    """Build the transform, and fail fast on missing packages, devices and damaged weights."""
    require_nibabel()
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
    load_generator(name, wanted)
    return SynthesizeTumor(generator=name, device=wanted, **options)


def parse_mass_effect(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(
            f"--mass-effect must be a share from 0 to 0.9, or auto, got {text!r}; give for example "
            "0.3"
        ) from None


def parse_bulge(text: str) -> bool | tuple[float, float]:
    if text in ("no", "prior"):
        return text == "prior"
    low, _, high = text.partition("-")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise ValueError(
            f"--bulge must be prior, no, a share from 0 to 0.9, or LOW-HIGH, got {text!r}; give "
            "for example 0.3 or 0-0.5"
        ) from None


def parse_gate(on: bool, limits: str | None) -> Gate | None:
    """Return the gate of --gate and --gate-limits; None if neither is given."""
    from tumorsynth.appearance.gate import LIMITS, Gate

    settings: dict[str, Any] = {}
    try:
        for part in [] if limits is None else limits.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name == "tries":
                settings[name] = int(value)
            elif name not in LIMITS:
                raise ValueError(name)
            elif value == "none":
                settings[name] = None
            else:
                low, high = value.split(":")
                settings[name] = (float(low or "-inf"), float(high or "inf"))
    except ValueError:
        raise ValueError(
            f"--gate-limits must be NAME=LOW:HIGH or NAME=none, with commas between them and NAME "
            f"one of {', '.join(LIMITS)}, or tries=N, got {limits!r}; give for example "
            "visibility=8:,contrast_hu=-60:-15"
        ) from None
    return Gate(**settings) if on or settings else None


def parse_count(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(
            f"--count must be N or LOW-HIGH, got {text!r}; give for example 3 or 1-3"
        ) from None


def parse_intensity(text: str) -> HU | Scaled:
    from tumorsynth.intensity import HU, Scaled

    if text.lower() == "hu":
        return HU()
    try:
        a_min, a_max, b_min, b_max = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--intensity must be hu, or four numbers, got {text!r}; give for example -175,250,0,1"
        ) from None
    return Scaled(a_min, a_max, b_min, b_max)
