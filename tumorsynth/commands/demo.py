"""``tumorsynth demo``: tumours in a phantom; no data needed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tumorsynth.commands.progress import progress_bar, summary
from tumorsynth.commands.shared import (
    Device,
    Gated,
    GeneratorName,
    Out,
    Seed,
    build_synthesizer,
    parse_count,
    parse_gate,
)
from tumorsynth.scans import nifti
from tumorsynth.scans.outputs import find_unfinished, output_paths
from tumorsynth.scans.scan import synthesize_scan
from tumorsynth.scans.volume_files import read_pair

SPACING_MM = (1.2, 1.2, 2.0)
HEALTHY = "healthy"  # folder of the scan without tumours


def demo(
    out: Out = Path("tumorsynth-demo"),
    generator: GeneratorName = None,
    count: Annotated[str, typer.Option(help="Tumours: N, or LOW-HIGH for a random number.")] = "3",
    size_mm: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Range of the equivalent diameter in mm. [default: 12 20]",
            show_default=False,
        ),
    ] = None,
    gate: Gated = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Synthesise tumours in a phantom; no data needed.

    Makes an abdominal CT with tumours in its liver, writes the same files as `synthesize` and
    prints their paths; OUT/healthy gets the CT and the label map without tumours, from which
    `replay` makes them again. Replaces the results of an earlier demo in OUT.
    """
    from tumorsynth.phantom import LABELS, make_phantom

    synth = build_synthesizer(
        generator=generator,
        organ_labels=(LABELS["liver"],),
        tumor_label=max(LABELS.values()) + 1,
        count=parse_count(count),
        size_mm=size_mm or (12.0, 20.0),
        gate=parse_gate(gate, None),
        device=device,
    )
    find_unfinished([], out, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(1) as progress:
        progress.begin("phantom", "generating")
        phantom = make_phantom(spacing=SPACING_MM, seed=seed)
        stored = phantom.image[0].round().short().numpy()
        image = nifti.new_volume("phantom_ct.nii.gz", stored, phantom.affine)
        mask = nifti.new_volume("phantom_label.nii.gz", phantom.label[0].numpy(), phantom.affine)
        healthy = output_paths(out / HEALTHY, "phantom")
        healthy["ct"].parent.mkdir(exist_ok=True)
        for key, volume in (("ct", image), ("label", mask)):
            nifti.write_volume(healthy[key], volume, volume.stored)
        # as `replay` reads them: a file rounds its affine
        image, mask = read_pair(healthy["ct"], healthy["label"])
        made = synthesize_scan(synth, image, mask, out, "phantom", seed, progress.step)
        print(summary("phantom", made["tumors"]))
        progress.end()
    print(f"generator: {synth.handle.get(device).name}")
    paths = output_paths(out, "phantom")
    for path in paths.values():
        print(path)
    print(f"tumours have the value {synth.tumor_label} in {paths['label'].name}")
    words = [paths["report"], healthy["ct"], healthy["label"], "-o", out / "replay"]
    print(f"the same again: tumorsynth replay {shlex.join(map(str, words))}")
