"""Where the results of a scan go, in the layout and the format that the scan came in."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tumorsynth.scans.pairing import Pair, Places, name_of
from tumorsynth.scans.volume_files import written_suffix


def written_name(path: Path) -> str:
    """The name under which a volume is written: in its own format where that can be."""
    if path.name.endswith((".nii", ".nii.gz")):
        return path.name
    return f"{name_of(path) or path.stem}{written_suffix(path.name)}"


def _label_name(label: Path) -> str:
    """The same of a label; a folder of one file per organ keeps its name."""
    return label.name if label.is_dir() else written_name(label)


def places_in(
    pair: Pair, folders: tuple[str, str], roots: tuple[Path, Path] | None = None
) -> Places:
    """Places in two folders.

    Args:
        pair: the files.
        folders: what the folders of CTs and labels are called beneath that of the results.
        roots: the folders that the files come from; their subfolders are kept.
    """
    ct, label = PurePosixPath(folders[0]), PurePosixPath(folders[1])
    if roots is not None:
        ct /= pair.ct.parent.relative_to(roots[0]).as_posix()
        label /= pair.label.parent.relative_to(roots[1]).as_posix()
    return Places(str(ct / written_name(pair.ct)), str(label / _label_name(pair.label)))


def folder_names(cts: Path, labels: Path) -> tuple[str, str]:
    """What the folders of CTs and labels are called beneath that of the results."""
    names = cts.resolve().name, labels.resolve().name
    return names if names[0] != names[1] else ("images", "labels")


def places_beneath(roots: tuple[Path, Path], ct: Path, label: Path) -> Places:
    """Places of a CT and a label as beneath the roots that they come from."""
    ct_place = ct.relative_to(roots[0]).with_name(written_name(ct))
    label_place = label.relative_to(roots[1]).with_name(_label_name(label))
    return Places(ct_place.as_posix(), label_place.as_posix())
