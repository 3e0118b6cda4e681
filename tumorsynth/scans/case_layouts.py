"""Layouts with a folder for each scan: TotalSegmentator, AbdomenAtlas and KiTS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tumorsynth.scans.pairing import (
    Pair,
    find_files,
    find_named,
    find_subfolder,
    match_names,
    missing,
)
from tumorsynth.scans.places import folder_names, places_beneath, places_in

MASKS = "segmentations"  # the folder of one file per organ, in TotalSegmentator and AbdomenAtlas
CT, KITS = "ct", ("imaging", "segmentation")
MAX_DEPTH = 3  # folders below the given one that are searched

Layout = tuple[list[Pair], list[Path]]  # the scans, and labels without a CT


def cases_with_masks(root: Path, folders: Sequence[Path]) -> Layout:
    """TotalSegmentator, AbdomenAtlas: CASE/ct beside CASE/segmentations/ORGAN."""
    pairs, alone = [], []
    for folder in folders:
        ct, masks = find_named(folder, CT), find_subfolder(folder, MASKS)
        if ct is not None:
            pairs.append(_pair(root, folder, ct, masks or folder / MASKS))
        elif masks is not None and find_files(masks, ""):
            alone.append(masks)
    return (pairs, alone) if any(pair.label.is_dir() for pair in pairs) else ([], [])


def cases_like_kits(root: Path, folders: Sequence[Path]) -> Layout:
    """KiTS: CASE/imaging beside CASE/segmentation."""
    pairs, alone = [], []
    for folder in folders:
        ct, label = (find_named(folder, name) for name in KITS)
        if ct is not None:
            pairs.append(_pair(root, folder, ct, label or missing(folder, KITS[1], ct)))
        elif label is not None:
            alone.append(label)
    return (pairs, alone) if pairs else ([], [])


def _pair(root: Path, folder: Path, ct: Path, label: Path) -> Pair:
    return Pair(folder.name, ct, label, places_beneath((root, root), ct, label))


def with_mask_folders(cts: Path, labels: Path) -> Layout:
    """Two folders: CTs NAME or NAME/ct, with the masks in the folder NAME or NAME/segmentations."""
    files = find_files(cts, "_ct") or {
        folder.name: path for folder in subfolders(cts) if (path := find_named(folder, CT))
    }
    folders = {
        folder.name: find_subfolder(folder, MASKS) or folder
        for folder in subfolders(labels)
        if cts.resolve() != labels.resolve()
    }
    masks = match_names(files, folders)
    pairs = [Pair(name, path, masks.get(name, labels / name)) for name, path in files.items()]
    names = folder_names(cts, labels)
    pairs = [replace(p, places=places_in(p, names, (cts, labels))) for p in pairs]
    used = {pair.label for pair in pairs}
    return pairs, [folder for folder in folders.values() if folder not in used]


def search(folder: Path, without: Path | None, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """A folder and those below it, but not below the folder of a case.

    Args:
        folder: where to begin.
        without: a folder that is left out.
        depth: folders below that are searched.
    """
    yield folder
    if depth == 0 or find_named(folder, CT) or find_named(folder, KITS[0]):
        return
    for sub in subfolders(folder):
        if without is None or sub.resolve() != without.resolve():
            yield from search(sub, without, depth - 1)


def subfolders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(hidden))
