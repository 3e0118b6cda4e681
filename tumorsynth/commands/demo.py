"""``tumorsynth demo``: tumours in a phantom; no data needed."""

from __future__ import annotations

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
    prints their paths. Replaces the results of an earlier demo in OUT.
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
        phantom = make_phantom(spacing=(1.0, 1.0, 1.5), seed=seed)
        stored = phantom.image[0].round().short().numpy()
        image = nifti.new_volume("phantom_ct.nii.gz", stored, phantom.affine)
        mask = nifti.new_volume("phantom_label.nii.gz", phantom.label[0].numpy(), phantom.affine)
        made = synthesize_scan(synth, image, mask, out, "phantom", seed, progress.step)
        print(summary("phantom", made["tumors"]))
        progress.end()
    print(f"generator: {synth.handle.get(device).name}")
    for path in output_paths(out, "phantom").values():
        print(path)
