"""What does a way of running the networks gain: number format, compiling, layout, fused search?

    python benchmarks/gpu/ways.py [--device cuda] [--generator liver-early published] [--ways ...]

Each row is one way and one batch of crops: ms of each stage, of `change` and `inpaint` (of the
whole batch), memory, the first pass (with what it compiles), and by how many HU the tumours differ
from those of the eager networks in full float32. Then whole calls, mask to blended label, of one
patch of 96^3 and of eight. "published" has random weights of the published sizes.

Ways: eager unless compiled; "float32" rounds on a GPU as PyTorch has it, convolutions to TF32 by
default, "full float32" does not. Needs torch alone. Rows are written as they come.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import tumorsynth as ts
from benchmarks.common import arguments, parse, spreads, write
from tumorsynth.commands.timing import (
    call_times,
    crop_and_mask,
    pass_times,
    patch_and_label,
    peak_mib,
    synchronise,
)
from tumorsynth.devices import full_float32
from tumorsynth.generators.diffusion import Generator, SamplerConfig
from tumorsynth.generators.sampling import Prediction
from tumorsynth.models import codebook
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.models.unet import FactorizedUNet


@dataclass(frozen=True)
class Way:
    precision: str = "float32"
    compiled: bool = False
    channels_last: bool = False
    full: bool = False  # no TF32 anywhere
    fused: bool = True  # search of the codes


WAYS = {
    "float32": Way(),
    "bfloat16": Way("bfloat16"),
    "compiled float32": Way(compiled=True),
    "compiled bfloat16": Way("bfloat16", compiled=True),
    "full float32": Way(full=True),
    "table of distances": Way(fused=False),
    "bfloat16, channels last": Way("bfloat16", channels_last=True),
    "compiled bfloat16, channels last": Way("bfloat16", compiled=True, channels_last=True),
}
GENERATORS = ("liver-early", "published", "tiny")


def load(name: str, device: torch.device) -> Generator:
    """A shipped generator, or random weights of the published sizes or of tiny ones."""
    torch.manual_seed(0)
    if name == "published":
        return Generator(Autoencoder(), FactorizedUNet()).to(device)
    return tiny().to(device) if name == "tiny" else ts.load_generator(name, device)


def tiny(codes: int = 64, prediction: Prediction = "noise") -> Generator:
    sizes = AutoencoderConfig(2, (8, 16), (16, 8), decoder_blocks=1, codes=codes, groups=4)
    denoiser = ConvUNet(ConvUNetConfig((8, 16), 1, time_channels=16, groups=4))
    sampler = SamplerConfig(prediction=prediction, crop_size=32, crop_multiple=8)
    return Generator(Autoencoder(sizes), denoiser, sampler)


@contextmanager
def run_as(generator: Generator, way: Way) -> Iterator[Generator]:
    """A copy of the generator that runs this way, within."""
    made, fused_on = copy.deepcopy(generator), codebook.fused_on
    made.precision = way.precision
    if way.channels_last:
        for network in (made.autoencoder, made.denoiser):
            network.to(memory_format=torch.channels_last_3d)
    if way.compiled:
        made.compile()
    codebook.fused_on = fused_on if way.fused else None
    try:
        with full_float32(made.device.type if way.full else "none"):
            yield made
    finally:
        codebook.fused_on = fused_on


def passes(generator: Generator, batch: int, repeats: int) -> dict[str, Any]:
    device = generator.device
    crop, mask = crop_and_mask(generator.crop_size, batch, device)
    start = time.perf_counter()
    generator.change(crop, mask, seed=0)
    synchronise(device)
    first = time.perf_counter() - start
    ms = {k: spreads(v) for k, v in pass_times(generator, batch=batch, repeats=repeats).items()}
    return {
        "first_s": round(first, 1),
        "ms": ms,
        "change_wall_ms_a_tumour": round(ms["change"]["wall_ms"]["median"] / batch, 2),
        "change_peak_mib": peak_mib(lambda: generator.change(crop, mask, seed=0), device),
    }


def calls(generator: Generator, name: str, batch: int, repeats: int) -> dict[str, Any]:
    image, label = patch_and_label(96 if name != "tiny" else 48, batch, generator.device)
    how = {"blend": "difftumor", "sigma_mm": 1.0} if name == "published" else {}
    size_mm = 18.0 if name != "tiny" else 8.0
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=size_mm, **how)
    found = call_times(synth, image, label, repeats, spacing=1.0)
    return {
        "tumours": sum(record["applied"] for record in synth.report),
        "ms": {key: spreads(clocks) for key, clocks in found.items()},
    }


def difference(reference: Generator, generator: Generator) -> float:
    """HU (root mean square in the tumour) between what both make of the same crop and seed."""
    crop, mask = crop_and_mask(generator.crop_size, 1, generator.device)
    with full_float32(reference.device.type):
        wanted = reference.change(crop, mask, seed=0)
    low, high = generator.window
    away = (generator.change(crop, mask, seed=0) - wanted)[mask] * (high - low)
    return round(float(away.square().mean().sqrt()), 3)


def line(row: dict[str, Any]) -> str:
    """The row in one line: medians by the wall's clock, in ms."""
    kind = "batch" if "batch" in row else "samples_in_a_call"
    times = "  ".join(f"{key} {found['wall_ms']['median']:g}" for key, found in row["ms"].items())
    more = ("tumours", "change_peak_mib", "rms_hu", "first_s", "compiled", "said")
    rest = ", ".join(f"{key} {row[key]}" for key in more if row.get(key) not in (None, []))
    return f"{row['generator']} | {row['way']} | {kind} {row[kind]}: {times}  [{rest}]"


def main() -> None:
    parser = arguments(__doc__, "ways", repeats=10)
    parser.add_argument("--generator", nargs="+", choices=GENERATORS, default=GENERATORS[:2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--calls", nargs="*", type=int, default=[1, 8], help="samples in a call")
    args = parse(parser)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any], said: list[warnings.WarningMessage]) -> None:
        rows.append({**row, "said": sorted({str(w.message)[:300] for w in said})})
        print(line(rows[-1]), flush=True)
        write(args.output, {"device": str(args.device), "rows": rows})

    references = {name: load(name, args.device) for name in args.generator}
    for way in args.ways:
        for name, reference in references.items():
            reference.precision = "float32"
            with run_as(reference, WAYS[way]) as generator:
                what = {"generator": name, "way": way, "crop": generator.crop_size}
                for batch in args.batches:
                    with warnings.catch_warnings(record=True) as said:
                        warnings.simplefilter("always", UserWarning)
                        row = {**what, "batch": batch, **passes(generator, batch, args.repeats)}
                        if batch == args.batches[0]:
                            row["rms_hu"] = difference(reference, generator)
                    if generator.compiled is not None:
                        row["compiled"] = generator.compiled.works
                    add(row, said)
                for batch in args.calls:
                    with warnings.catch_warnings(record=True) as said:
                        warnings.simplefilter("always", UserWarning)
                        row = calls(generator, name, batch, args.repeats)
                    add({**what, "samples_in_a_call": batch, **row}, said)


if __name__ == "__main__":
    main()
