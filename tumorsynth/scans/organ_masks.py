"""Labels of one file per organ, as TotalSegmentator and AbdomenAtlas have them.

The masks become one label map for the synthesis: the wanted organs are 1, 2, ..., the tumours come
next, and the other organs follow where they matter. Afterwards the masks are written again, with
one more for the tumours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tumorsynth.label_maps import matching_names, suggest
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_of_tumors import organ_of_tumors
from tumorsynth.scans.pairing import find_files
from tumorsynth.scans.places import written_name
from tumorsynth.scans.volume import Volume
from tumorsynth.scans.volume_files import (
    check_same_grid,
    copy_volume,
    read_pair,
    read_volume,
    write_volume,
    written_suffix,
)


@dataclass(frozen=True)
class OrganMasks:
    """Which of the files matter.

    Attributes:
        organs: names of the files in which tumours may sit, without .nii.gz; value 1, 2, ...
        tumor: name of the file for the tumours.
        context: whether the other organs are read as well, for tumours that grow beyond the organ
            or push tissue aside.
        moves: whether tissue is pushed aside, so that all masks change.
    """

    organs: tuple[str, ...]
    tumor: str
    context: bool = False
    moves: bool = False

    def __post_init__(self) -> None:
        for name in (*self.organs, self.tumor):
            if not name or Path(name).name != name:  # a report may come from anybody
                raise ValueError(f"masks must have plain file names, got {name!r}; rename the file")

    @property
    def organ_labels(self) -> tuple[int, ...]:
        """Values of the wanted organs in the label map."""
        return tuple(range(1, len(self.organs) + 1))

    @property
    def tumor_label(self) -> int:
        """Value of the tumours in the label map."""
        return len(self.organs) + 1

    def read(self, folder: Path, image: Volume, reading: Reading) -> Volume:
        """Read the masks of a scan as one label map.

        Tumours that the folder has already, in the file of the tumours, get the tumours' value.

        Args:
            folder: of the masks.
            image: the CT, on whose grid they must lie.
            reading: what to do where files contradict themselves or each other.

        Raises:
            ValueError: if the folder has none of the organs, a mask lies on another grid, or masks
                overlap that are to be moved.
        """
        files = find_files(folder, "")
        if not any(name in files for name in self.organs):
            raise ValueError(
                f"{folder.name} must have the file of an organ, {' or '.join(self.organs)}, but "
                f"{suggest(self.organs[0], files)}; name another with --organ"
            )
        voxels = np.zeros(image.stored.shape, np.int16)
        values = self._values(files)
        for name, value in values.items():
            mask = read_volume(files[name], reading)
            check_same_grid(image, mask, reading=reading)
            inside = mask.integers() > 0
            if self.moves and name != self.tumor and voxels[inside].any():
                raise ValueError(
                    f"masks must not overlap where tumours push tissue aside, but {name} in "
                    f"{folder.name} overlaps another; give --mass-effect 0"
                )
            voxels[inside] = value
            label = mask.as_label()
        dtype = np.uint8 if max(values.values()) <= 255 else np.int16
        return replace(label, name=folder.name, stored=voxels.astype(dtype))

    def has_tumors(self, folder: Path) -> bool:
        """Return whether a folder has files of the tumours and of one of the organs."""
        files = find_files(folder, "") if folder.is_dir() else {}
        return self.tumor in files and any(name in files for name in self.organs)

    def lacking(self, folder: Path) -> list[str]:
        """Return the organs that a folder lacks; none if it has no organ, which is an error."""
        files = find_files(folder, "") if folder.is_dir() else {}
        absent = [name for name in self.organs if name not in files]
        return absent if len(absent) < len(self.organs) else []

    def check_free(self, label: Volume, *, add: bool) -> None:
        """Raise ValueError if a scan has tumours already, unless others are to be added."""
        count = int((label.stored == self.tumor_label).sum())
        if count and not add:
            raise ValueError(
                f"{label.name} must have no tumours yet, but {self.tumor} in it holds {count} "
                f"voxels; to add others to them, give --add-to-label"
            )

    def _values(self, files: Iterable[str]) -> dict[str, int]:
        """The values of the files that are read, the wanted organs and the tumours last."""
        names = list(files)
        others = [name for name in names if name not in (*self.organs, self.tumor)]
        first = enumerate(others, self.tumor_label + 1) if self.context else ()
        last = [*enumerate(self.organs, 1), (self.tumor_label, self.tumor)]
        return {name: value for value, name in [*first, *last] if name in names}

    def write(self, folder: Path, source: Path, label: Volume, new: np.ndarray) -> None:
        """Write the masks of a scan with synthetic tumours.

        The organs' files hold the tumours' voxels, as in the public sets. Files change only where
        tissue was pushed aside, and where tumours grew beyond their organ.

        Args:
            folder: to write to; made if it does not exist.
            source: the folder that the label map was read from.
            label: that label map.
            new: (X, Y, Z), the label map with the tumours.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tumor = new == self.tumor_label
        moved = bool(((new != label.stored) & ~tumor).any())
        files = find_files(source, "")
        values = self._values(files)
        changed = tumor if moved else tumor & ~np.isin(label.stored, list(values.values()))
        owner = self._owner(files, values, changed, label, new) if changed.any() else None
        for name, path in files.items():
            if name == self.tumor:
                continue
            if owner is None or not moved and name not in self.organs:
                copy_volume(path, folder / written_name(path))
                continue
            mask = read_volume(path).as_label()
            inside = new == values[name] if moved else mask.stored > 0
            inside |= owner == values[name]
            write_volume(folder / written_name(path), mask, inside.astype(mask.stored.dtype))
        suffix = written_suffix(next(iter(files.values())).name)
        write_volume(folder / f"{self.tumor}{suffix}", label, tumor.astype(np.uint8))

    def _owner(
        self,
        files: Mapping[str, Path],
        values: Mapping[str, int],
        tumor: np.ndarray,
        label: Volume,
        new: np.ndarray,
    ) -> np.ndarray:
        """Return the value of the organ in the voxels of tumours that grew from it, else 0."""
        held = [name for name in self.organs if name in values]
        before = label.stored
        for name in held if (before == self.tumor_label).any() else ():  # hidden by tumours
            mask = read_volume(files[name]).as_label().stored > 0
            before = np.where(mask & (before == self.tumor_label), values[name], before)
        return organ_of_tumors(tumor, before, new, [values[name] for name in held])


def choose_masks(
    folders: Iterable[Path], organs: Sequence[str], *, context: bool = False, moves: bool = False
) -> OrganMasks:
    """Choose the files of the organs that the user named.

    Args:
        folders: of the masks, one for each scan.
        organs: names of organs or groups; empty where each folder has one file.
        context: see `OrganMasks`.
        moves: see `OrganMasks`.

    Raises:
        ValueError: if a name fits no file, or none is given where there are several.
    """
    names = list(dict.fromkeys(_names(folders)))
    if not organs:
        masks = [name for name in names if not name.endswith("_tumor")]
        if len(masks) != 1:
            raise ValueError(
                "an organ must be chosen, since there is one file per organ; give --organ NAME, "
                f"{suggest('', names)}"
            )
        organs = masks
    found: list[str] = []
    for organ in organs:
        matching = matching_names(organ, names)
        if not matching.names:
            raise ValueError(
                f"--organ must name files of the folder of masks, got {organ!r}; "
                f"{suggest(organ, names)}"
            )
        if matching.other_side:
            raise ValueError(
                f"--organ must name all files that it means, got {organ!r}, which is "
                f"{' and '.join(matching.names)} and perhaps others; give --organ for each of "
                f"{', '.join([*matching.names, *matching.other_side])} that you mean"
            )
        found += [name for name in matching.names if name not in found]
    tumor = f"{organs[0].strip().lower().replace(' ', '_')}_tumor" if len(organs) == 1 else "tumor"
    return OrganMasks(tuple(found), tumor, context or moves, moves)


def _names(folders: Iterable[Path]) -> Iterator[str]:
    for folder in folders:
        if folder.is_dir():
            yield from find_files(folder, "")


def read_scan(
    ct: Path, label: Path, reading: Reading, masks: OrganMasks | None
) -> tuple[Volume, Volume]:
    """Read a CT, and its label map or its folder of one file per organ.

    Raises:
        ValueError: as for `volume_files.read_pair` and `OrganMasks.read`.
    """
    if masks is None or not label.is_dir():
        return read_pair(ct, label, reading)
    image = read_volume(ct, reading)
    return image, masks.read(label, image, reading)
