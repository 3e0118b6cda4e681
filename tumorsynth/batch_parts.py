"""Find the parts of a training batch that get tumours: the batch, or those of several loaders."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tumorsynth.batch_entries import (
    Entry,
    Path,
    describe,
    entries_of,
    find_entry,
    find_path,
    value_at,
)

POSITIONS = {"image": 0, "label": 1}  # in a list
NAMES = ("image", "label", "organ")


class Part(NamedTuple):
    """A whole batch, or what one of several loaders gave.

    Args:
        path: where it is in the batch; empty for the whole batch.
        entries: its image, label and organ map, the latter if there is one.
        missing: names and places of those that it lacks.
    """

    path: Path
    entries: dict[str, Entry]
    missing: dict[str, Hashable]


def find_parts(
    batch: Any, places: Mapping[str, Hashable | None], loader: Hashable | None = None
) -> list[Part]:
    """Return the parts of a batch that have all entries.

    Lightning gives None for a loader that ends before the others: there is nothing to do for it.

    Args:
        batch: what the loaders gave.
        places: where image, label and organ map are in a part. None stands for "image" and "label",
            or 0 and 1 in a list, and for no organ map.
        loader: where the one part is that counts; None for any.

    Raises:
        ValueError: if no part has them.
    """
    path = () if loader is None else find_path(batch, loader)
    if path is None:
        raise missing_entry(batch, loader, "loader")
    root = value_at(batch, path)
    parts = list(_search(root, path, places))
    complete = [part for part in parts if not part.missing]
    if complete or root is None or any(one is None for one in entries_of(root).values()):
        return complete
    name, place = next(iter(max(parts, key=lambda part: len(part.entries)).missing.items()))
    raise missing_entry(batch, place, name)


def missing_entry(batch: Any, place: Hashable, argument: str) -> ValueError:
    """Return the error for a place that a batch does not have, and the argument that gave it."""
    return ValueError(
        f"the batch has no {place!r}, it has {describe(batch)}; say where it is with "
        f"{argument}=... of TumorSynthCallback, with dots where it is nested ('image.data')"
    )


def is_list(part: Any) -> bool:
    """Return whether a part of a batch has positions in place of keys."""
    return isinstance(next(iter(entries_of(part)), None), int)


def _search(root: Any, path: Path, places: Mapping[str, Hashable | None]) -> Iterator[Part]:
    """Yield the parts below a path; no part is inside of a complete one."""
    part = _part(root, path, places)
    yield part
    if part.missing:
        for key, below in entries_of(root).items():
            if entries_of(below):
                yield from _search(below, (*path, key), places)


def _part(root: Any, path: Path, places: Mapping[str, Hashable | None]) -> Part:
    part = Part(path, {}, {})
    for name in NAMES:
        place = places[name]
        if place is None and name == "organ":
            continue
        default = POSITIONS.get(name) if is_list(root) else name
        entry = find_entry(root, default if place is None else place)
        if entry is not None and _may_be_voxels(entry.value, path, place):
            part.entries[name] = entry
        else:
            part.missing[name] = default if place is None else place
    return part


def _may_be_voxels(value: Any, path: Path, place: Hashable | None) -> bool:
    """Return whether an entry counts; a value of another type at a given place is an error later.

    Args:
        value: of the entry.
        path: of its part.
        place: where the user says that it is; None for a default.
    """
    if isinstance(value, Tensor):
        return True
    return not path and not isinstance(value, Mapping) and not (place is None and entries_of(value))
