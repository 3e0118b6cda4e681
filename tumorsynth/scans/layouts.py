"""Find the scans of a folder in the layouts in which public data sets are downloaded.

`find_scans` knows them all; each function below finds the scans of one. Results keep the layout.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tumorsynth.scans import dataset_json
from tumorsynth.scans.case_layouts import (
    KITS,
    cases_like_kits,
    cases_with_masks,
    search,
    with_mask_folders,
)
from tumorsynth.scans.channel_layout import CHANNEL, by_channels
from tumorsynth.scans.file_kinds import check_is_there, describe_folder
from tumorsynth.scans.numbered_layouts import NUMBERED, in_test_folder, numbered, numbered_in
from tumorsynth.scans.pairing import (
    Pair,
    Places,
    find_files,
    find_pairs,
    find_subfolder,
    has_ending,
    is_collection,
    name_of,
)
from tumorsynth.scans.patterns import find_by_pattern
from tumorsynth.scans.places import folder_names, places_in, written_name

TWO_FOLDERS = [("imagesTr", "labelsTr"), ("images", "labels")]  # of a data set
LOOKED_FOR = (
    "NAME_ct with NAME_label, equal names in two folders, imagesTr/NAME_0000 with labelsTr/NAME "
    "(nnU-Net), a dataset.json (Decathlon), ct beside the folder segmentations (TotalSegmentator, "
    "AbdomenAtlas), volume-0 with segmentation-0 (LiTS), img0001 with label0001 (BTCV), and "
    "imaging beside segmentation (KiTS), in every format that can be read"
)
MAX_LISTED = 3  # files in a message


class NothingPaired(ValueError):
    """A folder holds no scans with labels in any layout."""


@dataclass(frozen=True)
class Found:
    """The scans that were found.

    Attributes:
        pairs: sorted by name. A CT without a label has the path where its label should be.
        dataset: the dataset.json that describes them; None without one.
        alone: labels without a CT.
        tests: CTs in the folder of a public set's scans without label, which are left out.
    """

    pairs: list[Pair]
    dataset: Path | None = None
    alone: tuple[Path, ...] = ()
    tests: tuple[Path, ...] = ()

    @property
    def has_masks(self) -> bool:
        """Whether the labels are folders of one file per organ."""
        return any(pair.label.is_dir() for pair in self.pairs)

    @property
    def about_alone(self) -> str | None:
        """Which labels have no CT; None if all have one."""
        if not self.alone:
            return None
        listed = ", ".join(map(str, self.alone[:MAX_LISTED]))
        more = ", ..." if len(self.alone) > MAX_LISTED else ""
        if len(self.alone) == 1:
            return f"1 label has no CT and is left out: {listed}"
        return f"{len(self.alone)} labels have no CT and are left out: {listed}{more}"

    @property
    def about_tests(self) -> str | None:
        """How many CTs are left out as they come without label; None if there are none."""
        if not self.tests:
            return None
        count = "1 scan" if len(self.tests) == 1 else f"{len(self.tests)} scans"
        return f"{count} without label in {self.tests[0].parent}: left out, as the data set's tests"

    @property
    def about_channels(self) -> str | None:
        """Which channels are copied without the tumours; None if there are no others."""
        all_places = (pair.places for pair in self.pairs if pair.places is not None)
        places = next((places for places in all_places if places.copies), None)
        if places is None:
            return None
        others = " and ".join(place for _, place in places.copies)
        return f"the tumours go into {places.ct} and the like alone, not into {others}"

    @property
    def label_map(self) -> str | None:
        """The label map of the public set whose layout this is, if the layout is one set's own."""
        if not self.pairs:
            return None
        stems = name_of(self.pairs[0].ct) or "", name_of(self.pairs[0].label) or ""
        if tuple(stem.lower() for stem in stems) == KITS:
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
    channel: str | None = None,
) -> Found:
    """Find the CTs and label maps of two files, one folder, two folders or a dataset.json.

    Args:
        ct: a CT, a folder of a known layout, or a dataset.json.
        label: the label map, its folder, or the folder of all label maps; None if ``ct`` holds
            both.
        pattern: names of the CT and of the label within the folders, with {name} in both.
        without: a folder that is not searched: that of the results.
        channel: number or name of the CT among nnU-Net's several channels; None where it is the one
            that dataset.json calls CT.

    Raises:
        FileNotFoundError: if ``ct`` or ``label`` does not exist.
        NothingPaired: if nothing can be paired; the message says which pairs were looked for.
        ValueError: if the paths or names contradict each other.
    """
    for path in (ct, label):
        if path is not None:
            check_is_there(path)
    found = _find(ct, label, pattern, without, channel)
    if channel is not None and not any(CHANNEL.search(name_of(p.ct) or "") for p in found.pairs):
        raise ValueError(
            f"--channel is for the channels of nnU-Net, NAME_0000, NAME_0001, ..., got {channel}, "
            f"but the CTs are called as {found.pairs[0].ct.name}; leave it out"
        )
    return found


def _find(
    ct: Path,
    label: Path | None,
    pattern: Sequence[str] | None,
    without: Path | None,
    channel: str | None,
) -> Found:
    if pattern is not None:
        pairs, alone = find_by_pattern(ct, label, pattern)
        return _found(pairs, alone)
    if not is_collection(ct):
        if label is None and ct.suffix.lower() == ".json":
            if not dataset_json.read(ct).get("training") and _two_folders(ct.parent):
                return _in_one_folder(ct.parent, without, channel)
            return _found(dataset_json.listed_pairs(ct), dataset=ct)
        if label is not None and label.is_dir():
            return Found([_file_with_masks(ct, label)])
        return Found(find_pairs(ct, label))
    if label is None:
        return _in_one_folder(ct, without, channel)
    return _in_two_folders(ct, label, channel)


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


def _in_one_folder(root: Path, without: Path | None, channel: str | None) -> Found:
    if any(has_ending(path, "_ct") for path in root.iterdir()):
        pairs = find_pairs(root, None)
        labels = find_files(root, "_label", ending_required=True)
        return Found(pairs, alone=_alone(labels.values(), pairs))
    dataset = root / dataset_json.NAME
    if dataset.is_file() and dataset_json.lists_cases(dataset):
        return _found(dataset_json.listed_pairs(dataset), dataset=dataset)
    if two := _two_folders(root):
        return _in_two_folders(*two, channel, keep=True)
    folders = list(search(root, without))
    for find in (cases_with_masks, cases_like_kits, numbered_in):
        pairs, alone = find(root, folders)
        if pairs:
            tests = [pair for pair in pairs if find is numbered_in and in_test_folder(root, pair)]
            tests = tests if len(tests) < len(pairs) else []  # else no label is where it should be
            found = _found([pair for pair in pairs if pair not in tests], alone)
            return replace(found, tests=tuple(pair.ct for pair in tests))
    if what := describe_folder(root):
        raise ValueError(f"the CTs must be several scans, but {root} is a folder{what}")
    held = ", ".join(sorted(path.name for path in root.iterdir())[:3]) or "nothing"
    raise NothingPaired(
        f"the folder {root} holds no NAME_ct.nii.gz, and no scan with its label in another known "
        f"layout, but {held}; looked for {LOOKED_FOR}; give the folder of the CTs and then that of "
        "the label maps, --pattern with their names, or --segment for CTs without labels"
    )


def _two_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders of CTs and labels of a data set, if it has them."""
    for names in TWO_FOLDERS:
        cts, labels = (find_subfolder(root, name) for name in names)
        if cts is not None and labels is not None:
            return cts, labels
    return None


def _in_two_folders(cts: Path, labels: Path, channel: str | None, *, keep: bool = False) -> Found:
    """Pair the files of two folders. keep: keep their layout also where names are equal."""
    if not labels.is_dir():
        return Found(find_pairs(cts, labels))  # says what is wrong
    dataset = _dataset_of(cts, labels)
    maps = find_files(labels, "")
    names = folder_names(cts, labels)
    masks = with_mask_folders(cts, labels)
    ways = [
        _by_equal_names(cts, labels),
        by_channels(cts, labels, dataset, channel),
        numbered([cts, labels], dict(zip((cts, labels), names, strict=True)))[0],
        masks[0],
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
    alone = masks[1] if pairs is masks[0] else _alone(maps.values(), pairs)
    if best == 0 and dataset is None and not keep:
        return Found(pairs, alone=tuple(alone))
    if best == 0:
        pairs = [replace(p, places=places_in(p, names)) for p in pairs]
    return _found(pairs, alone, dataset)


def _by_equal_names(cts: Path, labels: Path) -> list[Pair]:
    try:
        return find_pairs(cts, labels)
    except ValueError:
        if cts.resolve() == labels.resolve():
            return []
        if find_files(cts, "_ct"):
            raise
        return []


def _file_with_masks(ct: Path, masks: Path) -> Pair:
    """One CT, and its folder of one file per organ."""
    if not find_files(masks, ""):
        return find_pairs(ct, masks)[0]  # says what is wrong
    name = name_of(ct, "_ct") or ct.stem or ct.name
    return Pair(name, ct, masks, Places(written_name(ct), masks.name))


def _dataset_of(cts: Path, labels: Path) -> Path | None:
    """The dataset.json beside the two folders, if they are those of a data set."""
    path = cts.parent / dataset_json.NAME
    beside = cts.resolve().parent == labels.resolve().parent
    return path if beside and path.is_file() else None


def _alone(labels: Iterable[Path], pairs: Sequence[Pair]) -> tuple[Path, ...]:
    """The labels that belong to no pair."""
    used = {path for pair in pairs for path in (pair.ct, pair.label)}
    used |= {path for pair in pairs if pair.places for path, _ in pair.places.copies}
    return tuple(path for path in labels if path not in used)


def _found(pairs: Sequence[Pair], alone: Iterable[Path] = (), dataset: Path | None = None) -> Found:
    return Found(_named(pairs), dataset, tuple(sorted(alone)))


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


def _some_names(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "") if names else "nothing"
