"""Find the scans of a folder in the layouts in which public data sets are downloaded.

`find_scans` knows them all; each function below finds the scans of one. Results keep the layout.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tumorsynth.scans import dataset_json
from tumorsynth.scans.file_kinds import check_is_there, describe_folder
from tumorsynth.scans.pairing import (
    Pair,
    Places,
    find_files,
    find_pairs,
    has_ending,
    is_collection,
    name_of,
)
from tumorsynth.scans.patterns import find_by_pattern
from tumorsynth.scans.volume_files import written_suffix

MASKS = "segmentations"  # the folder of one file per organ, in TotalSegmentator and AbdomenAtlas
MAX_DEPTH = 3  # folders below the given one that are searched
CHANNEL = re.compile(r"_(\d{4})$")
# The CT's and the label's name, which end in the same number, by the set's label map.
NUMBERED = {
    "lits": (re.compile(r"volume-(\d+)$", re.I), re.compile(r"segmentation-(\d+)$", re.I)),
    "btcv": (re.compile(r"img(\d+)$", re.I), re.compile(r"label(\d+)$", re.I)),
}
KITS = ("imaging", "segmentation")
TWO_FOLDERS = [("imagesTr", "labelsTr"), ("images", "labels")]  # of a data set
LOOKED_FOR = (
    "NAME_ct with NAME_label, equal names in two folders, imagesTr/NAME_0000 with labelsTr/NAME "
    "(nnU-Net), a dataset.json (Decathlon), ct beside the folder segmentations (TotalSegmentator, "
    "AbdomenAtlas), volume-0 with segmentation-0 (LiTS), img0001 with label0001 (BTCV), and "
    "imaging beside segmentation (KiTS)"
)


class NothingPaired(ValueError):
    """A folder holds no scans with labels in any layout."""


@dataclass(frozen=True)
class Found:
    """The scans that were found.

    Attributes:
        pairs: sorted by name.
        dataset: the dataset.json that describes them; None without one.
    """

    pairs: list[Pair]
    dataset: Path | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the labels are folders of one file per organ."""
        return any(pair.label.is_dir() for pair in self.pairs)

    @property
    def label_map(self) -> str | None:
        """The label map of the public set whose layout this is, if the layout is one set's own."""
        stems = name_of(self.pairs[0].ct) or "", name_of(self.pairs[0].label) or ""
        if stems == KITS:
            return "kits"
        matching = (
            known
            for known, names in NUMBERED.items()
            if all(name.match(stem) for name, stem in zip(names, stems, strict=True))
        )
        return next(matching, None)


def find_scans(
    ct: Path,
    label: Path | None = None,
    pattern: Sequence[str] | None = None,
    without: Path | None = None,
) -> Found:
    """Find the CTs and label maps of two files, one folder, two folders or a dataset.json.

    Args:
        ct: a CT, a folder of a known layout, or a dataset.json.
        label: the label map, its folder, or the folder of all label maps; None if ``ct`` holds
            both.
        pattern: names of the CT and of the label within the folders, with {name} in both.
        without: a folder that is not searched: that of the results.

    Raises:
        FileNotFoundError: if ``ct`` or ``label`` does not exist.
        NothingPaired: if nothing can be paired; the message says which pairs were looked for.
        ValueError: if the paths or names contradict each other.
    """
    for path in (ct, label):
        if path is not None:
            check_is_there(path)
    if pattern is not None:
        return Found(_named(find_by_pattern(ct, label, pattern)))
    if not is_collection(ct):
        if label is None and ct.suffix.lower() == ".json":
            return Found(_named(dataset_json.listed_pairs(ct)), ct)
        if label is not None and label.is_dir():
            return Found([_file_with_masks(ct, label)])
        return Found(find_pairs(ct, label))
    if label is None:
        return _in_one_folder(ct, without)
    return _in_two_folders(ct, label)


def find_unlabelled(ct: Path, label: Path | None, made: Path) -> Found:
    """Find CTs whose label maps are to be made: one file, or all of a folder.

    Args:
        ct: the file or the folder.
        label: what the user gave as label.
        made: the folder for the label maps.

    Raises:
        FileNotFoundError: if ``ct`` does not exist.
        ValueError: if there are none, or a label is given as well.
    """
    check_is_there(ct)
    if label is not None:
        raise ValueError(
            f"--segment makes the label maps, but LABEL is {label}; leave one of them out"
        )
    if not is_collection(ct):
        ct = Path(os.path.abspath(ct)) if ct.is_dir() else ct  # "." has no name
        name = name_of(ct, "_ct") or ct.stem or ct.name
        return Found([Pair(name, ct, made / f"{name}.nii.gz")])
    files = {n: p for n, p in find_files(ct, "_ct").items() if not has_ending(p, "_label")}
    if not files:
        raise ValueError(f"the folder {ct} holds no .nii.gz; give the folder of the CTs")
    return Found(
        [Pair(name, path, made / f"{name}.nii.gz") for name, path in sorted(files.items())]
    )


def _in_one_folder(root: Path, without: Path | None) -> Found:
    if any(has_ending(path, "_ct") for path in root.iterdir()):
        return Found(find_pairs(root, None))
    dataset = root / dataset_json.NAME
    if dataset.is_file() and dataset_json.lists_cases(dataset):
        return Found(_named(dataset_json.listed_pairs(dataset)), dataset)
    for names in TWO_FOLDERS:
        images, labels = (root / name for name in names)
        if images.is_dir() and labels.is_dir():
            return _in_two_folders(images, labels, keep=True)
    folders = list(_folders(root, without))
    for find in (_cases_with_masks, _cases_like_kits, _numbered_in):
        if pairs := find(root, folders):
            return Found(_named(pairs))
    if what := describe_folder(root):
        raise ValueError(f"the CTs must be several scans, but {root} is a folder{what}")
    held = ", ".join(sorted(path.name for path in root.iterdir())[:3]) or "nothing"
    raise NothingPaired(
        f"the folder {root} holds no NAME_ct.nii.gz, and no scan with its label in another known "
        f"layout, but {held}; looked for {LOOKED_FOR}; give the folder of the CTs and then that of "
        "the label maps, --pattern with their names, or --segment for CTs without labels"
    )


def _in_two_folders(cts: Path, labels: Path, *, keep: bool = False) -> Found:
    """Pair the files of two folders. keep: keep their layout also where names are equal."""
    if not labels.is_dir():
        return Found(find_pairs(cts, labels))  # says what is wrong
    dataset = _dataset_of(cts, labels)
    ways = [
        _by_equal_names(cts, labels),
        _by_channels(cts, labels, dataset),
        _numbered([cts, labels], dict(zip((cts, labels), _folder_names(cts, labels), strict=True))),
        _with_mask_folders(cts, labels),
    ]
    counts = [sum(pair.label.exists() for pair in pairs) for pairs in ways]
    best = counts.index(max(counts))
    if not counts[best]:
        find_pairs(cts, labels)  # may know better what is wrong
        raise ValueError(
            f"no CT of {cts} has its label in {labels}: {_some_names(cts)} against "
            f"{_some_names(labels)}; looked for {LOOKED_FOR}; name files so, or give "
            "--pattern with their names"
        )
    pairs = ways[best]
    if best == 0 and dataset is None and not keep:
        return Found(pairs)
    if best == 0:
        pairs = [replace(p, places=_places(p, _folder_names(cts, labels))) for p in pairs]
    return Found(_named(pairs), dataset)


def _by_equal_names(cts: Path, labels: Path) -> list[Pair]:
    try:
        return find_pairs(cts, labels)
    except ValueError:
        if cts.resolve() == labels.resolve():
            return []
        if find_files(cts, "_ct"):
            raise
        return []


def _by_channels(cts: Path, labels: Path, dataset: Path | None) -> list[Pair]:
    """nnU-Net: NAME_0000, NAME_0001, ... are the channels of NAME."""
    channels: dict[str, dict[int, Path]] = {}
    for stem, path in find_files(cts, "").items():
        if match := CHANNEL.search(stem):
            channels.setdefault(stem[: match.start()], {})[int(match[1])] = path
    known = find_files(labels, "")
    if not channels.keys() & known.keys():
        return []
    numbers = {number for held in channels.values() for number in held}
    which = dataset_json.ct_channel(dataset, numbers)
    pairs = []
    for name, held in channels.items():
        ct = held.get(which, cts / f"{name}_{which:04d}.nii.gz")
        pair = Pair(name, ct, known.get(name, labels / f"{name}.nii.gz"))
        places = _places(pair, _folder_names(cts, labels))
        others = [path for number, path in held.items() if number != which]
        folder = PurePosixPath(places.ct).parent
        copies = tuple((path, str(folder / written_name(path))) for path in others)
        pairs.append(replace(pair, places=replace(places, copies=copies)))
    return pairs


def _with_mask_folders(cts: Path, labels: Path) -> list[Pair]:
    """CTs NAME or NAME/ct, with the masks in the folder NAME or NAME/segmentations."""
    files = find_files(cts, "_ct") or {
        folder.name: path for folder in _subfolders(cts) if (path := _file_named(folder, "ct"))
    }
    pairs = []
    for name, path in files.items():
        masks = labels / name
        masks = masks / MASKS if (masks / MASKS).is_dir() else masks
        if masks.is_dir():
            pair = Pair(name, path, masks)
            pairs.append(
                replace(pair, places=_places(pair, (cts.name, labels.name), (cts, labels)))
            )
    return pairs


def _file_with_masks(ct: Path, masks: Path) -> Pair:
    """One CT, and its folder of one file per organ."""
    if not find_files(masks, ""):
        return find_pairs(ct, masks)[0]  # says what is wrong
    name = name_of(ct, "_ct") or ct.stem or ct.name
    return Pair(name, ct, masks, Places(written_name(ct), masks.name))


def _cases_with_masks(root: Path, folders: Sequence[Path]) -> list[Pair]:
    """TotalSegmentator, AbdomenAtlas: CASE/ct beside CASE/segmentations/ORGAN."""
    return [
        _case_pair(root, folder, ct, folder / MASKS)
        for folder in folders
        if (ct := _file_named(folder, "ct")) and (folder / MASKS).is_dir()
    ]


def _cases_like_kits(root: Path, folders: Sequence[Path]) -> list[Pair]:
    """KiTS: CASE/imaging beside CASE/segmentation."""
    return [
        _case_pair(
            root,
            folder,
            ct,
            _file_named(folder, "segmentation") or folder / "segmentation.nii.gz",
        )
        for folder in folders
        if (ct := _file_named(folder, "imaging"))
    ]


def _case_pair(root: Path, folder: Path, ct: Path, label: Path) -> Pair:
    where = "" if folder == root else folder.relative_to(root).as_posix() + "/"
    name = label.name if label.is_dir() else written_name(label)
    return Pair(folder.name, ct, label, Places(where + written_name(ct), where + name))


def _numbered_in(root: Path, folders: Sequence[Path]) -> list[Pair]:
    return _numbered(folders, {f: f.relative_to(root).as_posix() for f in folders})


def _numbered(folders: Sequence[Path], places: Mapping[Path, str]) -> list[Pair]:
    """LiTS and BTCV: the two names end in the same number, in one folder or in two.

    Args:
        folders: where to look.
        places: the paths of these folders beneath OUT.
    """
    files = [(folder, stem, path) for folder in folders for stem, path in _volumes(folder)]
    for ct_name, label_name in NUMBERED.values():
        labels: dict[str, dict[Path, Path]] = {}
        for folder, stem, path in files:
            if match := label_name.match(stem):
                labels.setdefault(match[1], {})[folder] = path
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
            missing = folder / label_name.pattern.replace(r"(\d+)$", f"{match[1]}.nii.gz")
            label = held.get(folder) or next(iter(held.values()), missing)
            ct_place, label_place = (
                str(PurePosixPath(places[p.parent]) / written_name(p)) for p in (path, label)
            )
            pairs.append(Pair(stem, path, label, Places(ct_place, label_place)))
        if pairs and labels:
            return pairs
    return []


def _dataset_of(cts: Path, labels: Path) -> Path | None:
    """The dataset.json beside the two folders, if they are those of a data set."""
    path = cts.parent / dataset_json.NAME
    beside = cts.resolve().parent == labels.resolve().parent
    return path if beside and path.is_file() else None


def _folder_names(cts: Path, labels: Path) -> tuple[str, str]:
    """What the two folders are called in OUT."""
    names = cts.resolve().name, labels.resolve().name
    return names if names[0] != names[1] else ("images", "labels")


def _places(pair: Pair, folders: tuple[str, str], roots: tuple[Path, Path] | None = None) -> Places:
    """Where results go: in folders of these names, below them as beneath the roots."""
    ct, label = PurePosixPath(folders[0]), PurePosixPath(folders[1])
    if roots is not None:
        ct /= pair.ct.parent.relative_to(roots[0]).as_posix()
        label /= pair.label.parent.relative_to(roots[1]).as_posix()
    name = pair.label.name if pair.label.is_dir() else written_name(pair.label)
    return Places(str(ct / written_name(pair.ct)), str(label / name))


def written_name(path: Path) -> str:
    """The name under which a volume is written: in its own format where that can be."""
    if path.name.endswith((".nii", ".nii.gz")):
        return path.name
    return f"{name_of(path) or path.stem}{written_suffix(path.name)}"


def _named(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs sorted by name, with folders in the names that would be equal."""
    taken = Counter(pair.name for pair in pairs)
    named = [
        replace(pair, name=_long_name(pair)) if taken[pair.name] > 1 else pair for pair in pairs
    ]
    return sorted(named, key=lambda pair: pair.name)


def _long_name(pair: Pair) -> str:
    folder = PurePosixPath(pair.places.ct).parent if pair.places else PurePosixPath()
    parts = [part for part in folder.parts if part != pair.name]
    return "_".join([*parts, pair.name])


def _folders(folder: Path, without: Path | None, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """A folder and those below it, but not below the folder of a case."""
    yield folder
    if depth == 0 or _file_named(folder, "ct") or _file_named(folder, "imaging"):
        return
    for sub in _subfolders(folder):
        if without is None or sub.resolve() != without.resolve():
            yield from _folders(sub, without, depth - 1)


def _subfolders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(hidden))


def _volumes(folder: Path) -> list[tuple[str, Path]]:
    return sorted(find_files(folder, "").items())


def _file_named(folder: Path, stem: str) -> Path | None:
    for path in (folder / f"{stem}.nii.gz", folder / f"{stem}.nii", folder / stem):
        if path.is_file() or path.is_symlink() and not path.is_dir():
            return path
    return None


def _some_names(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "") if names else "nothing"
