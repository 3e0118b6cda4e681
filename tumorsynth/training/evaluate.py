"""Measure a trained network for its card: reconstruction, inpainting, contrast and noise.

    python -m tumorsynth.training.evaluate RUN/gen heldout.npz --organ-label 1 --tumor-label 2
    python -m tumorsynth.training.evaluate RUN/ae heldout.npz

Prints JSON; --pictures writes a grid of pictures, too. Needs torch only. The training commands end
with `autoencoder_metrics` and `generator_metrics`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tumorsynth.generators.diffusion import Generator
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.data import Case, load_pack
from tumorsynth.training.measures import summary
from tumorsynth.training.realism import (
    inpainting_error,
    measure_generator,
    organ_labels_around,
    real_tumors,
    synthetic_tumors,
)
from tumorsynth.training.reconstruction import evenly_spaced, measure_autoencoder, reconstruction

PICTURES = "pictures.png"
MAX_AUTOENCODER_CROPS, MAX_GENERATOR_CROPS, MAX_TUMORS = (
    64,
    32,
    16,
)  # measured after a long training
CALLS = 10  # of three tumours each
MIN_MEASURED = 4  # crops or tumours after a short one

HOW_RECONSTRUCTION = (
    "reconstruction: crops through the autoencoder, clipped to its window; voxels inside the "
    "window count, those without a label as tissue too; PSNR for the window's width; SSIM in 3-D, "
    "Gaussian of sigma 1.5 mm; noise is the standard deviation of what a Gaussian of 1.5 mm leaves "
    "behind, 4 mm inside the region (1 mm in small ones); without_detail: of the decoded latent "
    "alone, which a denoiser works in: judge an autoencoder for a generator by these"
)
HOW_TUMOURS = (
    "contrast: a tumour's core against the median of the organ 2 to 8 mm away, percentiles 5, 50 "
    "and 95; noise inside and outside by the same high pass, medians; synthetic tumours of 8 to 20 "
    "mm, placed in healthy tissue of the same scans"
)
HOW_INPAINTING = (
    "inpainting: healthy tissue hollowed in a tumour's shape and painted by the sampler, which "
    "puts a tumour there; so the error is of what it should have left: all outside the hole, and "
    "the ring 2 to 6 mm around it, next to the autoencoder's own error in the same voxels"
)


# -- what the training commands write into the card ------------------------------------------------


def autoencoder_metrics(
    autoencoder: Autoencoder,
    training: list[Case],
    held_out: list[Case],
    steps: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure an autoencoder for ``card["metrics"]``.

    Args:
        autoencoder: the trained network.
        training: scans that it was trained on; measured if none is held out, as the card then says.
        held_out: scans that it was not trained on.
        steps: of the training; short trainings are measured on fewer crops.
        folder: where to write pictures.png.

    Returns:
        A JSON-able dict; ``how`` describes the figures in words.
    """
    start = time.time()
    pictures = None if folder is None else folder / PICTURES
    measured = measure_autoencoder(
        autoencoder,
        held_out or training,
        crops=_measured(steps, MAX_AUTOENCODER_CROPS),
        pictures=pictures,
    )
    how = [measured_on(training, held_out), HOW_RECONSTRUCTION]
    if pictures is not None:
        how.append(
            f"{PICTURES}: a crop in each row, original, reconstruction and 4 x their difference, "
            "in axial, coronal and sagittal planes; parts of the scans, whose terms hold for it"
        )
    return {"how": how, **measured, "seconds": round(time.time() - start, 1)}


def generator_metrics(
    generator: Generator,
    training: list[Case],
    held_out: list[Case],
    tumor_label: int,
    steps: int,
    folder: Path | None = None,
    organ_labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure a generator for ``card["metrics"]``.

    Args:
        generator: the trained generator.
        training: as in `autoencoder_metrics`.
        held_out: as in `autoencoder_metrics`.
        tumor_label: label value of tumours.
        steps: of the training; short trainings are measured on fewer crops and tumours.
        folder: where to write pictures.png.
        organ_labels: labels to place synthetic tumours in, by default `organ_labels_around` the
            tumours of all cases.

    Returns:
        A JSON-able dict; ``how`` describes the figures in words.
    """
    start = time.time()
    cases = held_out or training
    pictures = None if folder is None else folder / PICTURES
    if organ_labels is None:
        organ_labels = organ_labels_around([*training, *held_out], tumor_label)
    measured = {
        **measure_autoencoder(
            generator.autoencoder,
            cases,
            tumor_label,
            crops=_measured(steps, MAX_GENERATOR_CROPS),
        ),
        **measure_generator(
            generator,
            cases,
            tumor_label,
            organ_labels,
            tumours=_measured(steps, MAX_TUMORS),
            pictures=pictures,
        ),
    }
    how = [measured_on(training, held_out), HOW_RECONSTRUCTION, HOW_TUMOURS, HOW_INPAINTING]
    if pictures is not None and pictures.is_file():
        how.append(
            f"{PICTURES}: in each row a synthetic tumour, columns 1 to 3 axial (before, after, "
            "outlined), 4 to 6 coronal, 7 to 9 sagittal, then a real one, two columns a plane "
            "(plain, outlined); black and white are a quarter of the window off the tissue around; "
            "parts of the scans, whose terms hold for it"
        )
    return {"how": how, **measured, "seconds": round(time.time() - start, 1)}


def measured_on(training: list[Case], held_out: list[Case]) -> str:
    """Describe which scans the figures are of, and whether training saw them."""
    if held_out:
        return f"scans held out of the training: {', '.join(c.name for c in held_out)}"
    return (
        f"scans it was TRAINED ON ({', '.join(c.name for c in training)}), as none was held out "
        '("validation" in dataset.json): expect worse on others'
    )


def _measured(steps: int, largest: int) -> int:
    return max(MIN_MEASURED, min(largest, steps // 20))


def compare_tumors(
    generator: Generator, case: Case, organ_labels: list[int], tumor_label: int, calls: int
) -> dict[str, Any]:
    """Summarise the real tumours of a case, and three synthetic ones for each call."""
    synthetic = list(synthetic_tumors(generator, case, organ_labels, tumor_label, range(calls)))
    real = real_tumors(case, organ_labels, tumor_label)
    result = {"real": summary([one.statistics for one in real])} if real else {}
    result["synthetic"] = summary([one.statistics for one in synthetic])
    if synthetic:
        result["inpainting"] = inpainting_error(generator, evenly_spaced(synthetic, 8))
    return result


def measure_on(
    generator: Generator,
    cases: Sequence[Case],
    organ_labels: list[int],
    tumor_label: int,
    calls: int = CALLS,
) -> dict[str, Any]:
    """Measure a generator on scans, by name; scans without a label are left out."""
    return {
        case.name: {
            "reconstruction": reconstruction(generator.autoencoder, case, organ_labels),
            **compare_tumors(generator, case, organ_labels, tumor_label, calls),
        }
        for case in cases
        if case.label is not None
    }


def main() -> None:
    from tumorsynth.generators.folder import read_card, read_folder
    from tumorsynth.generators.store import find_folder
    from tumorsynth.training.folders import KIND, read_autoencoder

    parser = argparse.ArgumentParser(
        prog="python -m tumorsynth.training.evaluate",
        description="Measure a generator or an autoencoder on scans it has not seen.",
    )
    parser.add_argument("folder", help="of a generator or an autoencoder, or a bundled name")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--organ-label", type=int, nargs="+", default=[1])
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--calls", type=int, default=CALLS, help="of three tumours each")
    parser.add_argument("--pictures", type=Path, help="a PNG to write")
    args = parser.parse_args()
    cases = load_pack(args.pack)
    if Path(args.folder).is_dir() and read_card(Path(args.folder)).get("kind") == KIND:
        autoencoder, _ = read_autoencoder(args.folder)
        result = measure_autoencoder(autoencoder, cases, args.tumor_label, pictures=args.pictures)
        print(json.dumps(result, indent=2))
        return
    generator = read_folder(find_folder(args.folder))
    result = measure_on(generator, cases, args.organ_label, args.tumor_label, args.calls)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
