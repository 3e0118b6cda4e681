"""Find CTs, files or folders of DICOM slices, and the label maps that belong to them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tumorsynth.itk_formats.recognize import is_dicom_folder
from tumorsynth.scans.file_kinds import check_is_there, describe_folder

# The names of volumes, first the formats that are preferred where two files have one name. A folder
# of DICOM slices comes after them. MGH is listed so that whoever reads it says what it is.
FORMATS = [
    re.compile(pattern, re.I)
    for pattern in (
        r"\.nii(\.gz)*$",
        r"\.hdr(\.gz)*$",
        r"\.img(\.gz)*$",
        r"(\.seg)?\.(nrrd|nhdr)$|\.(mha|mhd)$",
        r"\.(mgh|mgz)$",
    )
]
NO_TWO_OF = (0, 3)  # formats of which two files of one name are an error
DICOM_FOLDER = len(FORMATS)  # the number of the format of a folder of slices


@dataclass(frozen=True)
class Places:
    """Where the results of a scan go beneath OUT, in the layout that the scan came in.

    Attributes:
        ct: path of the new CT.
        label: path of the new label map, or of its folder of one file per organ.
        copies: files that stay as they are, and their paths: further channels.
    """

    ct: str
    label: str
    copies: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Pair:
    """A CT and its label map. The results are named after ``name``.

    Attributes:
        name: of the scan.
        ct: the CT: a file, or a folder of DICOM slices.
        label: its label map, or a folder with one file per organ.
        places: where the results go; None for NAME_ct and NAME_label.
    """

    name: str
    ct: Path
    label: Path
    places: Places | None = None


def find_pairs(ct: Path, label: Path | None) -> list[Pair]:
    """Pair the CTs and label maps of two files, one folder or two folders.

    A folder of DICOM slices stands for a CT file, named as the folder. In one folder,
    NAME_ct.nii[.gz] pairs with NAME_label.nii[.gz]. In two folders, files of the
    same name pair. Names are compared without .nii[.gz] and without a trailing _ct or _label.
    A CT without a label map is listed with the path where its label map should be, so that the
    caller reports it; a label map without a CT is ignored, and so are hidden files.

    Args:
        ct: a CT file, or a folder of CTs.
        label: the label map, or the folder of label maps; None if one folder holds both.

    Returns:
        The pairs, sorted by name.

    Raises:
        FileNotFoundError: if ``ct`` or ``label`` does not exist.
        ValueError: if the two do not go together, or hold no CT.
    """
    for path in (ct, label):
        if path is not None:
            check_is_there(path)
    if not is_collection(ct):
        return [_pair_of_files(ct, label)]
    if label is not None and not label.is_dir():
        raise ValueError(
            f"CT {ct} is a folder, so the label must be one too, got {label}; give the folder of "
            "the label maps"
        )

    one_folder = label is None
    cts = find_files(ct, "_ct", ending_required=one_folder)
    labels = find_files(label or ct, "_label", ending_required=one_folder)
    if not cts:
        if what := describe_folder(ct):
            raise ValueError(f"the CTs must be several scans, but {ct} is a folder{what}")
        raise ValueError(
            f"the folder {ct} holds no NAME_ct.nii.gz; name the files NAME_ct.nii.gz and "
            "NAME_label.nii.gz, or give the folder of the CTs and then that of the label maps"
            if one_folder
            else f"the folder {ct} holds no .nii.gz; give the folder of the CTs"
        )
    known, ending = match_names(cts, labels), "_label" if one_folder else ""
    return [
        Pair(name, path, known.get(name) or missing(label or ct, f"{name}{ending}", path))
        for name, path in sorted(cts.items())
    ]


def match_names(cts: Mapping[str, Path], labels: Mapping[str, Path]) -> dict[str, Path]:
    """Return the labels of CTs by name: of the same name, or of the one that differs by case."""
    found = {name: labels[name] for name in cts if name in labels}
    rest = [name for name in labels if name not in found]
    for name in cts.keys() - found.keys():
        others = [one for one in cts if one.casefold() == name.casefold()]
        alike = [one for one in rest if one.casefold() == name.casefold()]
        if len(others) == len(alike) == 1:
            found[name] = labels[alike[0]]
    return found


def missing(folder: Path, name: str, ct: Path) -> Path:
    """Return where a file that a CT lacks should be, in the format of the CT."""
    stem = name_of(ct) or ct.name
    return folder / f"{name}{ct.name[len(stem) :] or '.nii.gz'}"


def is_collection(ct: Path) -> bool:
    """Return whether a path is a folder of scans, rather than a scan: a file, or DICOM slices."""
    if not ct.is_dir():
        return False
    return not is_dicom_folder(ct) or any(_format(path) == 0 for path in ct.iterdir())


def _pair_of_files(ct: Path, label: Path | None) -> Pair:
    ct = Path(os.path.abspath(ct)) if ct.is_dir() else ct  # "." has no name
    if label is None or label.is_dir():
        got = "none" if label is None else f"the folder {label}"
        raise ValueError(
            f"CT {ct.name} needs its label file as second argument, got {got}; give its label "
            "map, or --segment to make one with TotalSegmentator"
        )
    return Pair(name_of(ct, "_ct") or ct.stem or ct.name, ct, label)


def find_files(folder: Path, ending: str, *, ending_required: bool = False) -> dict[str, Path]:
    """List the scans of a folder by name, without .nii[.gz] and without ``ending``.

    Upper and lower case of .nii.gz and of the ending do not matter. A pair of .hdr and .img is
    listed by its .hdr. Where a name has no NIfTI file, a volume of another format (.nrrd, .mha,
    ...) or a subfolder of DICOM slices is listed.

    Args:
        folder: where to look; hidden files and subfolders without DICOM slices are ignored.
        ending: what a name may end in, "_ct" for example.
        ending_required: list only the files whose name has that ending.

    Raises:
        ValueError: if two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (_format(path), path)):
        name = name_of(path, ending)
        # a dangling link is a scan that cannot be read: list it, so that it is reported
        is_scan = path.is_file() or path.is_symlink() or _format(path) == DICOM_FOLDER
        if name is None or path.name.startswith(".") or not is_scan:
            continue
        if ending_required and not has_ending(path, ending):
            continue
        if name not in found:
            found[name] = path
        elif _format(path) == _format(found[name]) and _format(path) in NO_TWO_OF:
            raise ValueError(
                f"each scan needs its own name, but {found[name].name} and {path.name} in {folder} "
                f"are both {name!r}; rename or move one"
            )
    return found


def find_named(folder: Path, name: str) -> Path | None:
    """Return a folder's volume of this name: of any format, in upper or lower case.

    Where there are several, that of the same case and the preferred format is returned.
    """
    named = [path for path in folder.iterdir() if path.name[: len(name)].lower() == name]
    found = [
        path
        for path in named
        if (name_of(path) or path.name).lower() == name
        and (path.is_file() or not path.exists() or _format(path) == DICOM_FOLDER)
    ]
    return min(
        found,
        key=lambda path: (not path.name.startswith(name), _format(path), -len(path.name), path),
        default=None,
    )


def find_subfolder(folder: Path, name: str) -> Path | None:
    """Return a subfolder by its name, in upper or lower case."""
    exact = folder / name
    if exact.is_dir():
        return exact
    found = (path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower())
    return next((path for path in found if path.is_dir()), None)


def name_of(path: Path, ending: str = "") -> str | None:
    """Return a scan's name without .nii[.gz] and without ``ending``; None if it names no volume."""
    stem = _stem(path)
    if ending and has_ending(path, ending):
        return stem[: -len(ending)] or stem
    return stem or None


def has_ending(path: Path, ending: str) -> bool:
    """Return whether a file is a volume whose name has this ending, in upper or lower case."""
    return _stem(path).lower().endswith(ending)


def _stem(path: Path) -> str:
    """Return the name without the suffix of a format; "" if it has none of them."""
    format_ = _format(path)
    if format_ == DICOM_FOLDER:
        return path.name
    return FORMATS[format_].sub("", path.name) if format_ < len(FORMATS) else ""


def _format(path: Path) -> int:
    """Return the number of the path's format: in FORMATS, DICOM_FOLDER, or one more for none."""
    if path.is_dir():
        return DICOM_FOLDER if is_dicom_folder(path) else DICOM_FOLDER + 1
    matches = (k for k, suffix in enumerate(FORMATS) if suffix.search(path.name))
    return next(matches, DICOM_FOLDER + 1)
