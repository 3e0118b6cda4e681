"""The dataset.json of nnU-Net and the Decathlon: cases, channels, labels; also for results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.label_maps import LabelMap
from tumorsynth.label_maps.reading import read_dataset_labels
from tumorsynth.scans.pairing import Pair, Places, name_of
from tumorsynth.scans.places import written_name
from tumorsynth.scans.volume_files import written_suffix

NAME = "dataset.json"
CHANNEL_KEYS = ("channel_names", "modality")  # of versions 2 and 1 of nnU-Net
LIST_EXAMPLE = 'write {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}'


def read(path: Path) -> dict[str, Any]:
    """Read a dataset.json; raise ValueError if it is no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; {LIST_EXAMPLE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(content).__name__}; repair it")
    return content


def lists_cases(path: Path) -> bool:
    """Whether a dataset.json lists the files of its cases, and they are there under these names."""
    listed = read(path).get("training")
    if not isinstance(listed, list) or not listed:
        return False
    images = [one.get("image") for one in listed if isinstance(one, dict)]
    return any(isinstance(one, str) and (path.parent / one).exists() for one in images)


def listed_pairs(path: Path) -> list[Pair]:
    """The CTs and label maps that a dataset.json lists under "training".

    Raises:
        ValueError: if it lists none.
    """
    listed = read(path).get("training")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f'{path} has no list "training"; {LIST_EXAMPLE}')
    return [_pair(path, entry) for entry in listed]


def _pair(dataset: Path, entry: Any) -> Pair:
    image, label = (entry.get(k) for k in ("image", "label")) if isinstance(entry, dict) else (0, 0)
    if not isinstance(image, str) or not isinstance(label, str):
        raise ValueError(
            f"every case in {dataset} must have the path of its image and of its label, got "
            f"{str(entry)[:80]}; {LIST_EXAMPLE}"
        )
    name = name_of(dataset.parent / image) or Path(image).name
    places = Places(_beneath(dataset, image, "images"), _beneath(dataset, label, "labels"))
    return Pair(name, dataset.parent / image, dataset.parent / label, places)


def _beneath(dataset: Path, path: str, otherwise: str) -> str:
    """A path of a dataset.json, kept beneath the folder of the results."""
    file = PurePosixPath(path)
    inside = not file.is_absolute() and ".." not in file.parts
    place = file if inside else PurePosixPath(otherwise) / file.name
    return str(place.with_name(written_name(dataset.parent / path)))


def channel_names(path: Path) -> dict[int, str]:
    """The names of the channels by their numbers; none if the file has none."""
    content = read(path)
    named: dict[str, Any] = next(
        (content[key] for key in CHANNEL_KEYS if isinstance(content.get(key), dict)), {}
    )
    return {int(k): str(v) for k, v in named.items() if k.isdigit()}


def label_map(path: Path) -> LabelMap | None:
    """The names of a dataset's label values; None if it has no labels."""
    if "labels" not in read(path):
        return None
    labels = read_dataset_labels(path)
    return LabelMap(path.name, {k: v for k, v in labels.items() if k.lower() != "background"})


def check_tumor_label(path: Path, value: int) -> None:
    """Raise ValueError if nnU-Net would refuse a dataset.json with this value for tumours.

    Args:
        path: the dataset.json that the scans came with.
        value: that the tumours get.
    """
    content = read(path)
    if "labels" not in content:
        return
    labels = read_dataset_labels(path)
    held = {v for values in labels.values() for v in values}
    if value in held or "channel_names" not in content:  # the Decathlon has no such rules
        return
    ignored = labels.get("ignore", ())
    if ignored or "regions_class_order" in content:
        what = "an ignore label, which must be the highest" if ignored else "regions"
        raise ValueError(
            f"--tumor-label {value} must be a label of {path.name} already, as it has {what}; add "
            "the tumours to its labels first"
        )
    if value != max(held) + 1:
        raise ValueError(
            f"--tumor-label must follow the labels of {path.name}, since nnU-Net takes 0, 1, 2, "
            f"... only, got {value} after {max(held)}; give --tumor-label {max(held) + 1}"
        )


def write_for_results(source: Path, out: Path, pairs: Iterable[Pair], tumor_label: int) -> None:
    """Write the dataset.json of the results: their cases alone, and the tumours' label.

    Args:
        source: the dataset.json that the scans came with.
        out: the folder of the results.
        pairs: the scans that are finished.
        tumor_label: the tumours' value.
    """
    content = read(source)
    places = [pair.places for pair in pairs if pair.places is not None]
    if "numTraining" in content or "channel_names" in content:
        content["numTraining"] = len(places)
    if isinstance(content.get("training"), list):
        content["training"] = [{"image": f"./{p.ct}", "label": f"./{p.label}"} for p in places]
    for other in ("validation", "test"):  # whose files stayed where they were
        if content.get(other):
            content[other] = []
    if "numTest" in content:
        content["numTest"] = 0
    if "labels" in content:
        content["labels"] = _with_tumor(content["labels"], tumor_label)
    if places and "file_ending" in content:
        label = places[0].label
        content["file_ending"] = ".nii" if label.endswith(".nii") else written_suffix(label)
    text = json.dumps(content, indent=2) + "\n"
    write_atomic(out / NAME, lambda file: file.write(text.encode()))


def _with_tumor(labels: dict[str, Any], value: int) -> dict[str, Any]:
    by_value = all(isinstance(v, str) for v in labels.values())  # {"1": "liver"}, the Decathlon
    held = [labels] if by_value else [v if isinstance(v, list) else [v] for v in labels.values()]
    if value in {int(v) for values in held for v in values}:
        return labels
    name = "tumor" if "tumor" not in [*labels, *map(str, labels.values())] else f"tumor_{value}"
    return {**labels, str(value): name} if by_value else {**labels, name: value}
