"""Synthesise tumours in one scan and write its four files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.scans.outputs import output_paths, output_paths_of, unfinished_marker
from tumorsynth.scans.run_settings import run_settings, to_json_types, voxels_sha256
from tumorsynth.scans.volume import Volume
from tumorsynth.scans.volume_files import copy_volume, write_volume

if TYPE_CHECKING:
    from tumorsynth.scans.follow_up import FollowUp
    from tumorsynth.scans.organ_masks import OrganMasks
    from tumorsynth.scans.pairing import Pair
    from tumorsynth.scans.phase import Phase
    from tumorsynth.synthesizer import SynthesizeTumor


def synthesize_scan(
    synth: SynthesizeTumor,
    image: Volume,
    label: Volume,
    out: Path,
    name: str,
    seed: int,
    step: Callable[[], None],
    params: list[dict[str, Any]] | None = None,
    geometry: str | None = None,
    masks: OrganMasks | None = None,
    pair: Pair | None = None,
    about_label: dict[str, Any] | None = None,
    view: bool = False,
    follow_up: FollowUp | None = None,
    phase: Phase | None = None,
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
        geometry: the source of the header that the affine was read from, for the report.
        masks: how a folder of one file per organ became the label map.
        pair: the files, where the results keep their layout.
        about_label: which program made the label map, for the report.
        view: whether to write the scan's part of the page of `tumorsynth.scans.view`.
        follow_up: the point in time; the tumours grow by its factor.
        phase: the other phase that ``image`` is, if ``params`` are of a first one.

    Returns:
        The report, as written.

    Raises:
        ValueError: if the CT holds no finite values, or clearly no HU where the transform expects
            HU.
    """
    import torch

    from tumorsynth.appearance.visibility import FaintTumorWarning
    from tumorsynth.pipeline.grow import NoRoomToGrowWarning
    from tumorsynth.scans.preview import save_preview
    from tumorsynth.scans.view import save_view

    whole_label = label.as_label()
    before, old = image.values(), label.integers()
    _check_intensity(image.name, before, old, synth)
    step()
    with warnings.catch_warnings():
        # the command's summary counts such tumours over all scans
        warnings.simplefilter("ignore", FaintTumorWarning)
        warnings.simplefilter("ignore", NoRoomToGrowWarning)
        tensors = torch.from_numpy(before)[None], torch.from_numpy(old)[None]
        if follow_up is not None and follow_up.factor != 1 and params is None:
            synth(*tensors, affine=image.affine, seed=seed)
            params = synth.grow(synth.params, follow_up.factor)
        changed_image, changed_label = synth(
            *tensors,
            affine=image.affine,
            seed=seed if params is None else None,
            params=params,
            **({} if phase is None else phase.call()),
        )
    after, new = changed_image[0].numpy(), changed_label[0].numpy()
    records = [dict(record) for record in synth.report]
    step()
    differs = (after != before) & ~(np.isnan(after) & np.isnan(before))
    relabelled = new != old
    new_ct = image.with_changes(differs, after[differs])
    new_label = whole_label.with_changes(relabelled, new[relabelled])
    report = {
        **run_settings(
            synth,
            ct=image.name,
            label=label.name,
            seed=seed,
            geometry=geometry,
            masks=masks,
            follow_up=follow_up,
        ),
        **({} if phase is None else {"phase_of": phase.to_dict()}),
        **_about_organs(synth),
        **({} if about_label is None else {"segmentation": about_label}),
        "voxels_sha256": {
            "ct": voxels_sha256(image.stored),
            "label": voxels_sha256(label.stored),
            "new_ct": voxels_sha256(new_ct),
            "new_label": voxels_sha256(new_label),
        },
        "tumors": records,
        "params": synth.params,
    }
    places = None if pair is None else pair.places
    paths = output_paths(out, name) if pair is None else output_paths_of(pair, out)
    # if the run is killed before the report is written, the marker says that these files are ours
    marker = unfinished_marker(out, name)
    marker.touch()
    paths["report"].unlink(missing_ok=True)
    for path in (paths["ct"], paths["label"]):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(paths["ct"], image, new_ct)
    if pair is not None and masks is not None:
        masks.write(paths["label"], pair.label, whole_label, new_label)
    else:
        write_volume(paths["label"], whole_label, new_label)
    for source, place in () if places is None else places.copies:
        copy_volume(source, out / place)
    step()
    tumor = relabelled & (new == synth.tumor_label)
    hu, new_hu = (synth.intensity.to_hu(torch.from_numpy(v)).numpy() for v in (before, after))
    save_preview(
        paths["preview"], hu, new_hu, tumor, image.affine, records, title=f"{name}, seed {seed}"
    )
    if view:
        save_view(out, name, hu, new_hu, tumor, image.affine, report)
    text = json.dumps(report, indent=2, default=to_json_types) + "\n"
    write_atomic(paths["report"], lambda file: file.write(text.encode()))
    marker.unlink(missing_ok=True)
    step()
    return report


def _about_organs(synth: SynthesizeTumor) -> dict[str, Any]:
    """The names of the organs' values, where they were given by name."""
    label_map = synth.settings.label_map
    if label_map is None:
        return {}
    names = {label_map.name_of(value) or str(value): value for value in synth.organ_labels}
    return {"organs": {"label_map": label_map.source, **names}}


def check_organ(label: Volume, synth: SynthesizeTumor, *, segmented: bool = False) -> None:
    """Raise ValueError if a label map holds none of the organ's values.

    Args:
        label: the label map.
        synth: the transform.
        segmented: whether --segment made it.
    """
    held = label.held_values()
    if any(value in synth.organ_labels for value in held):
        return
    label_map = synth.settings.label_map
    if label_map is not None:
        other = "" if segmented else ", or the --label-map that it was made with"
        what = "the segmentation" if segmented else "the label map"
        raise ValueError(
            f"--organ must be in {what}, but {label.name} has no "
            f"{label_map.describe(synth.organ_labels)} of {label_map.source}; it holds "
            f"{label_map.describe(v for v in held if v) or '0 alone'}; give another --organ{other}"
        )
    listed = ", ".join(map(str, held[:20])) + (", ..." if len(held) > 20 else "")
    raise ValueError(
        f"--organ-label {' '.join(map(str, synth.organ_labels))} must be in the label map, but "
        f"{label.name} holds {listed}; give the value that the organ has there"
    )


def check_label_map(label: Volume, synth: SynthesizeTumor) -> None:
    """Raise ValueError if a label map holds values that the transform's label map does not have."""
    if synth.settings.label_map is not None:
        found = label.held_values()
        synth.settings.label_map.check(found, synth.tumor_label, label.name)
        synth.label_map_check.close()  # as checked here


def check_taken_label(
    label: Volume, organ_labels: tuple[int, ...], tumor_label: int, if_taken: str
) -> str | None:
    """Check whether a label map holds the tumours' value already: real tumours, or an organ.

    Args:
        label: the label map.
        organ_labels: values of the organ.
        tumor_label: the tumours' value.
        if_taken: "refuse" such a map; "judge": refuse it where the voxels are clearly not the
            organ's tumours; or "add" the tumours to them.

    Returns:
        A note for the user where the map is not refused, or None.

    Raises:
        ValueError: if the map is refused.
    """
    if if_taken == "add":
        return None
    import torch

    from tumorsynth.pipeline.taken_label import free_value

    values = torch.from_numpy(label.integers())
    count = int((values == tumor_label).sum())
    if not count:
        return None
    is_organ = is_another_organ(label, organ_labels, tumor_label, clearly=True)
    free = f"--tumor-label {free_value(values)}"
    if if_taken == "judge" and not is_organ:
        return (
            f"{label.name} holds {count} voxels of --tumor-label {tumor_label} already, and the "
            f"tumours are added to them; if they are an organ, give a free value such as {free}"
        )
    raise ValueError(
        f"--tumor-label {tumor_label} must be free in the label map, but {label.name} holds "
        f"{count} voxels of it; give a free value, for example {free}, or, if these are tumours, "
        "--add-to-label"
    )


def is_another_organ(
    label: Volume, organ_labels: tuple[int, ...], tumor_label: int, *, clearly: bool
) -> bool:
    """Return whether the voxels of the tumours' value look like another organ.

    Args:
        label: the label map.
        organ_labels: values of the organ.
        tumor_label: the tumours' value.
        clearly: ask for more evidence.
    """
    import torch

    from tumorsynth.geometry import frame_from_affine
    from tumorsynth.pipeline.taken_label import measure

    found = measure(torch.from_numpy(label.integers()), tumor_label, organ_labels)
    voxel_mm3 = frame_from_affine(label.affine).voxel_mm3
    return found is not None and found.looks_like_an_organ(voxel_mm3, clearly=clearly)


def _check_intensity(
    name: str, values: np.ndarray, label: np.ndarray, synth: SynthesizeTumor
) -> None:
    """Raise ValueError if a scan holds no finite value, or one value, or clearly no HU where the
    transform expects HU."""
    import torch

    from tumorsynth.intensity import HU
    from tumorsynth.intensity_check import describe, find_fault, sample_organ, sample_voxels

    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(
            f"a CT must hold finite numbers, but every voxel of {name} is NaN or infinite; "
            "export it again"
        )
    if float(finite.min()) == float(finite.max()):
        raise ValueError(
            f"a CT must show tissue, but every voxel of {name} is {finite[0]:g}; export it again"
        )
    image = torch.from_numpy(values)
    sampled = sample_voxels(image)
    organ = partial(sample_organ, image, torch.from_numpy(label), synth.organ_labels)
    fault = find_fault(sampled, organ) if isinstance(synth.intensity, HU) else None
    if fault is not None:
        raise ValueError(
            f"a CT must be in HU, but the values of {name}, {describe(sampled)}, {fault.found}; "
            + (f"give {fault.option}" if fault.option else fault.conversion)
        )
