"""Layouts in which the names of CT and label end in the same number: LiTS and BTCV."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from tumorsynth.scans.pairing import Pair, Places, find_files, missing
from tumorsynth.scans.places import written_name

# The CT's and the label's name by the set's label map.
NUMBERED = {
    "lits": (re.compile(r"volume-(\d+)$", re.I), re.compile(r"segmentation-(\d+)$", re.I)),
    "btcv": (re.compile(r"img(\d+)$", re.I), re.compile(r"label(\d+)$", re.I)),
}
TEST_FOLDERS = ("testing", "test")  # of scans that come without labels: BTCV's is Testing


def numbered_in(root: Path, folders: Sequence[Path]) -> tuple[list[Pair], list[Path]]:
    """Return the pairs in a folder and those below it, and the labels without a CT."""
    return numbered(folders, {f: f.relative_to(root).as_posix() for f in folders})


def numbered(folders: Sequence[Path], places: Mapping[Path, str]) -> tuple[list[Pair], list[Path]]:
    """Return the pairs in several folders, and the labels without a CT.

    Args:
        folders: where to look.
        places: the paths of these folders beneath that of the results.

    Raises:
        ValueError: if a CT has several labels.
    """
    files = [(folder, *one) for folder in folders for one in sorted(find_files(folder, "").items())]
    for ct_name, label_name in NUMBERED.values():
        labels: dict[str, dict[Path, Path]] = {}
        for folder, stem, path in files:
            if match := label_name.match(stem):
                labels.setdefault(match[1], {})[folder] = path
        label_folders = {folder for held in labels.values() for folder in held}
        pairs = []
        for folder, stem, path in files:
            if not (match := ct_name.match(stem)):
                continue
            held = labels.get(match[1], {})
            if folder not in held and len(held) > 1:
                raise ValueError(
                    f"{path.name} must have one label, but there are "
                    f"{' and '.join(str(p) for p in list(held.values())[:2])}; give the folder of "
                    "the CTs and then that of the label maps"
                )
            name = label_name.pattern.replace(r"(\d+)$", match[1])
            beside = folder if len(label_folders) != 1 else next(iter(label_folders))
            label = held.get(folder) or next(iter(held.values()), missing(beside, name, path))
            ct_place, label_place = (
                str(PurePosixPath(places[p.parent]) / written_name(p)) for p in (path, label)
            )
            pairs.append(Pair(stem, path, label, Places(ct_place, label_place)))
        if pairs and labels:
            used = {pair.label for pair in pairs}
            all_labels = [path for held in labels.values() for path in held.values()]
            return pairs, [path for path in all_labels if path not in used]
    return [], []


def in_test_folder(root: Path, pair: Pair) -> bool:
    """Return whether a CT without label lies in the folder of the scans that come without."""
    inside = pair.ct.relative_to(root).parts[:-1] if pair.ct.is_relative_to(root) else ()
    return not pair.label.exists() and any(part.lower() in TEST_FOLDERS for part in inside)
