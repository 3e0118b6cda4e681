"""Find the files of training cases: in a dataset.json, or in one or two folders of any layout."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tumorsynth.scans import dataset_json
from tumorsynth.scans.file_kinds import describe_folder
from tumorsynth.scans.layouts import NothingPaired, find_scans
from tumorsynth.scans.organ_masks import OrganMasks, choose_masks
from tumorsynth.scans.pairing import find_files, has_ending, is_collection, name_of

DATASET_EXAMPLE = 'write {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}'


@dataclass(frozen=True)
class Source:
    """The files of one case."""

    name: str
    image: Path
    label: Path | None
    held_out: bool = False
    masks: OrganMasks | None = None  # where the label is a folder of one file per organ


def find_sources(
    data: Path,
    labels: Path | None = None,
    channel: str | None = None,
) -> list[Source]:
    """Find the files that a dataset.json lists, or that one or two folders hold.

    Args:
        data: as for `load_data`.
        labels: likewise.
        channel: likewise.

    Raises:
        FileNotFoundError: if ``data`` does not exist.
        ValueError: if it lists or holds no cases, or is malformed.
    """
    if data.is_dir():
        return _in_folders(data, labels, channel)
    if not data.is_file():
        raise FileNotFoundError(f"no such file: {data}; pass a dataset.json, a pack or a folder")
    if name_of(data):
        raise ValueError(f"{data} is one scan; pass its folder, or list it in a dataset.json")
    if channel is not None:
        raise ValueError(
            f"--channel is for a folder in nnU-Net's layout, got {channel} with {data.name}; leave "
            "it out, as this file lists each image"
        )
    try:
        listed = json.loads(data.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{data} must be JSON: {error}; {DATASET_EXAMPLE}") from error
    if not isinstance(listed, dict) or "training" not in listed:
        raise ValueError(f'{data} has no list "training"; {DATASET_EXAMPLE}')
    sources: list[Source] = []
    for key in ("training", "validation"):
        entries = listed.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(
                f'"{key}" in {data} must be a list, got {str(entries)[:80]}; {DATASET_EXAMPLE}'
            )
        sources += [_source(data, entry, key == "validation") for entry in entries]
    if all(source.held_out for source in sources):
        raise ValueError(f"{data} lists no cases under training; add some")
    names = _distinct_names([Path(os.path.abspath(source.image)) for source in sources])
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def dataset_beside(data: Path) -> Path | None:
    """Return the dataset.json that is the data, or lies in their folder; None without one."""
    path = data / dataset_json.NAME if data.is_dir() else data
    return path if path.is_file() else None


def _distinct_names(files: list[Path]) -> list[str]:
    """File names without .nii[.gz], with as many folders as make them unique: "s1/ct", "s2/ct"."""
    parts_of = {file: (*file.parent.parts[1:], _stem(file)) for file in files}
    depth = dict.fromkeys(parts_of, 1)
    while True:
        names = {file: "/".join(parts[-depth[file] :]) for file, parts in parts_of.items()}
        taken = list(names.values())
        ambiguous = [
            f for f in parts_of if taken.count(names[f]) > 1 and depth[f] < len(parts_of[f])
        ]
        if not ambiguous:
            return [names[file] for file in files]
        for file in ambiguous:
            depth[file] += 1


def _source(dataset: Path, entry: Any, held_out: bool) -> Source:
    image, label = (entry.get(k) for k in ("image", "label")) if isinstance(entry, dict) else (0, 0)
    if not isinstance(image, str) or not isinstance(label, str | None):
        raise ValueError(
            f"every case in {dataset} must have the path of its image, and of its label if it has "
            f"one, got {str(entry)[:80]}; {DATASET_EXAMPLE}"
        )
    folder = dataset.parent
    return Source(_stem(image), folder / image, folder / label if label else None, held_out)


def _in_folders(images: Path, labels: Path | None, channel: str | None) -> list[Source]:
    if not is_collection(images):
        what = describe_folder(images)
        raise ValueError(f"the CTs must be several scans, but {images} is a folder{what}")
    if labels is not None and labels.resolve() == images.resolve():
        if not any(has_ending(path, "_label") for path in images.iterdir()):
            raise ValueError(
                f"label maps in the CTs' own folder must be named NAME_label.nii.gz beside "
                f"NAME_ct.nii.gz, but {images} holds none; rename them, or keep them in a folder "
                "of their own and pass it as --labels"
            )
        labels = None
    try:
        found = find_scans(images, labels, channel=channel)
    except NothingPaired:
        if labels is not None or channel is not None:
            raise
    else:
        for note in (found.about_alone, found.about_tests):
            if note:
                warnings.warn(note, stacklevel=3)
        if labels is None and found.dataset and dataset_json.lists_cases(found.dataset):
            return find_sources(found.dataset)
        return [Source(c.name, c.ct, c.label) for c in found.pairs]
    files = find_files(images, "")
    if files:
        return [Source(name, path, None) for name, path in files.items()]
    raise ValueError(f"{images} holds no .nii or .nii.gz files; pass the folder of the CTs")


def with_masks(sources: list[Source], organs: Sequence[str]) -> list[Source]:
    """Say which files matter where labels are folders of one file per organ.

    Args:
        sources: the cases.
        organs: names of the organs; without any, such labels are left out, with a warning.

    Raises:
        ValueError: for names where labels are label maps, and unknown names.
    """
    folders = [s.label for s in sources if s.label is not None and s.label.is_dir()]
    if organs and not folders:
        raise ValueError(
            f"--organ goes with labels of one file per organ, got {', '.join(organs)} with label "
            "maps; leave it out"
        )
    if not folders:
        return sources
    if not organs:
        warnings.warn(
            f"{folders[0]} holds one file per organ, and no label is read; name the organ with "
            "--organ to train on labels",
            stacklevel=3,
        )
        return [replace(s, label=None) if s.label in folders else s for s in sources]
    masks = choose_masks(folders, organs)
    return [replace(s, masks=masks) if s.label in folders else s for s in sources]


def _stem(path: str | Path) -> str:
    return name_of(Path(path)) or Path(path).name
