"""Synthesise tumours in one scan and write its four files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tumorsynth.scans import nifti
from tumorsynth.scans.nifti import Volume
from tumorsynth.scans.outputs import output_paths, unfinished_marker
from tumorsynth.scans.run_settings import run_settings, to_json_types, voxels_sha256

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor

# Where 1024 was added to the HU, soft tissue lies here. In a correct CT, dense bone fills less than
# this share of the voxels.
SHIFTED_TISSUE_HU = (900, 1300)
MAX_SHARE_SHIFTED = 0.1


def synthesize_scan(
    synth: SynthesizeTumor,
    image: Volume,
    label: Volume,
    out: Path,
    name: str,
    seed: int,
    step: Callable[[], None],
    params: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Synthesise tumours in one scan and write its CT, label map, preview and report.

    The report is written last: where it exists, the scan is complete.

    Args:
        synth: the transform.
        image: the CT.
        label: its label map, on the same grid.
        out: an existing folder.
        name: what the names of the files start with.
        seed: decides the tumours.
        step: called after each of reading, synthesising, writing and drawing.
        params: of an earlier report, to make its tumours again.

    Returns:
        The report, as written.

    Raises:
        ValueError: if the CT holds no finite values, or clearly no HU where the transform expects
            HU.
    """
    import torch

    from tumorsynth.appearance.visibility import FaintTumorWarning
    from tumorsynth.scans.preview import save_preview

    before, old = image.values(), label.integers()
    _check_intensity(image.name, before, synth)
    step()
    with warnings.catch_warnings():
        # the command's summary counts such tumours over all scans
        warnings.simplefilter("ignore", FaintTumorWarning)
        changed_image, changed_label = synth(
            torch.from_numpy(before)[None],
            torch.from_numpy(old)[None],
            affine=image.affine,
            seed=seed,
            params=params,
        )
    after, new = changed_image[0].numpy(), changed_label[0].numpy()
    records = [dict(record) for record in synth.report]
    step()
    differs = (after != before) & ~(np.isnan(after) & np.isnan(before))
    relabelled = new != old
    new_ct = image.with_changes(differs, after[differs])
    new_label = label.with_changes(relabelled, new[relabelled])
    report = {
        **run_settings(synth, ct=image.name, label=label.name, seed=seed),
        "voxels_sha256": {
            "ct": voxels_sha256(image.stored),
            "label": voxels_sha256(label.stored),
            "new_ct": voxels_sha256(new_ct),
            "new_label": voxels_sha256(new_label),
        },
        "tumors": records,
        "params": synth.params,
    }
    paths = output_paths(out, name)
    # if the run is killed before the report is written, the marker says that these files are ours
    marker = unfinished_marker(out, name)
    marker.touch()
    paths["report"].unlink(missing_ok=True)
    nifti.write_volume(paths["ct"], image, new_ct)
    nifti.write_volume(paths["label"], label, new_label)
    step()
    tumor = relabelled & (new == synth.tumor_label)
    hu = [synth.intensity.to_hu(torch.from_numpy(v)).numpy() for v in (before, after)]
    save_preview(paths["preview"], *hu, tumor, image.affine, records, title=f"{name}, seed {seed}")
    text = json.dumps(report, indent=2, default=to_json_types) + "\n"
    nifti.write_atomic(paths["report"], lambda file: file.write(text.encode()))
    marker.unlink(missing_ok=True)
    step()
    return report


def check_organ(label: Volume, organ_labels: tuple[int, ...]) -> None:
    """Raise ValueError if a label map holds none of the organ's values."""
    held = np.unique(label.integers())
    if not np.isin(held, organ_labels).any():
        listed = ", ".join(map(str, held[:20])) + (", ..." if len(held) > 20 else "")
        raise ValueError(
            f"--organ-label {' '.join(map(str, organ_labels))} must be in the label map, but "
            f"{label.name} holds {listed}; give the value that the organ has there"
        )


def _check_intensity(name: str, values: np.ndarray, synth: SynthesizeTumor) -> None:
    """Raise ValueError in the clear cases: no finite value; or, for HU, a range of [0, 1] or
    [-1, 1], or HU + 1024."""
    from tumorsynth.intensity import HU

    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(
            f"a CT must hold finite numbers, but every voxel of {name} is NaN or infinite; "
            "export it again"
        )
    if not isinstance(synth.intensity, HU):
        return
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 2:
        raise ValueError(
            f"a CT must be in HU, but {name} holds values from {low:g} to {high:g}; give the CT "
            "in HU, or say how it was scaled, for example --intensity -175,250,0,1"
        )
    from_hu, to_hu = SHIFTED_TISSUE_HU
    shifted = float(((finite > from_hu) & (finite < to_hu)).mean())
    if shifted > MAX_SHARE_SHIFTED:
        raise ValueError(
            f"a CT must be in HU, but in {name} {shifted:.0%} of the voxels lie from {from_hu} to "
            f"{to_hu}, as soft tissue does where 1024 was added; subtract it"
        )
