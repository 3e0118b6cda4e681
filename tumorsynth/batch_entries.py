"""Find image and label in a batch, however its dataset, collate function or loaders nest it.

A place is a key of a dictionary, a position in a list or tuple, or a field of a named tuple or
dataclass. A path of places is a string with dots, "labeled.image", or a tuple, ("labeled", 0). A
key that holds a dot itself comes first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import (
    Callable,
    Hashable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Path = tuple[Any, ...]
_MAX_SHOWN = 24  # entries that a message lists


class Entry(NamedTuple):
    """A tensor in a batch.

    Args:
        path: where it is.
        value: the tensor.
        affine: what TorchIO's batches hold beside the voxels of an image; None elsewhere.
    """

    path: Path
    value: Any
    affine: Any = None

    def with_affine(self) -> Any:
        """Return the tensor with TorchIO's affine as its attribute, as a MetaTensor has it."""
        if self.affine is None or hasattr(self.value, "affine"):
            return self.value
        same = self.value.detach()
        same.affine = self.affine
        return same


def entries_of(container: Any) -> dict[Any, Any]:
    """Return a container's entries by key, position or field; nothing for anything else."""
    if isinstance(container, Mapping):
        return dict(container)
    if _is_named_tuple(container):
        return container._asdict()
    if isinstance(container, Sequence) and not isinstance(container, str | bytes):
        return dict(enumerate(container))
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        names = [field.name for field in dataclasses.fields(container)]
        return {name: getattr(container, name) for name in names}
    if _is_torchio2_batch(container):
        return dict(container.images)
    if _is_torchio2_image(container):
        affines = [np.asarray(affine.data.cpu()) for affine in container.affines]
        return {"data": container.data, "affine": np.stack(affines)}
    return {}


def find_path(container: Any, place: Hashable) -> Path | None:
    """Return the path to a place, None if there is no such entry."""
    if place == ():
        return ()
    entries = entries_of(container)
    key = _key(entries, place)
    if key is not None:
        return key
    splits: list[tuple[Any, Any]] = []
    if isinstance(place, tuple):
        splits = [(place[0], place[1:])]
    elif isinstance(place, str):
        splits = [(place[:i], place[i + 1 :]) for i, letter in enumerate(place) if letter == "."]
    for first, rest in splits:
        key = _key(entries, first)
        end = None if key is None else find_path(entries[key[0]], rest)
        if key is not None and end is not None:
            return key + end
    return None


def value_at(container: Any, path: Path) -> Any:
    """Return the entry at a path from `find_path`."""
    for key in path:
        container = entries_of(container)[key]
    return container


def find_entry(container: Any, place: Hashable) -> Entry | None:
    """Return the tensor at a place, or the voxels of TorchIO's image there; None without any."""
    path = find_path(container, place)
    if path is None:
        return None
    value = value_at(container, path)
    if is_torchio_image(value):
        path, value = (*path, "data"), entries_of(value)["data"]
    beside = entries_of(value_at(container, path[:-1]))
    return Entry(path, value, beside.get("affine") if path[-1] == "data" else None)


def is_torchio_image(value: Any) -> bool:
    """Return whether this is an image of a batch from TorchIO: voxels and affine by name."""
    return (isinstance(value, Mapping) and isinstance(value.get("data"), Tensor)) or (
        _is_torchio2_image(value)
    )


def can_replace(container: Any, path: Path) -> bool:
    """Return whether an entry can be replaced in place: one container on its path can change."""
    return any(_is_mutable(value_at(container, path[:depth])) for depth in range(len(path)))


def replace_entry(container: Any, path: Path, value: Any, in_place: bool = False) -> Any:
    """Return the container with another value at a path.

    Args:
        container: to be searched.
        path: from `find_path`.
        value: the new entry.
        in_place: whether to change the container itself, and of those on the path the ones that
            can change; otherwise they are copied and the container stays as it is.
    """
    if not path:
        return value
    key, *rest = path
    old = entries_of(container)[key]
    new = replace_entry(old, tuple(rest), value, in_place)
    if in_place and new is old:
        return container
    if _is_named_tuple(container):
        return container._replace(**{key: new})
    if isinstance(container, tuple):
        return (*container[:key], new, *container[key + 1 :])
    if not (in_place and _is_mutable(container)):
        container = copy.copy(container)
    if isinstance(container, MutableMapping | MutableSequence):
        container[key] = new
    elif _is_torchio2_batch(container):
        container.images[key] = new
    else:
        object.__setattr__(container, key, new)  # a frozen dataclass is a copy here
    return container


def map_tensors(container: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a container with a function applied to all of its tensors, nested ones too."""
    if isinstance(container, Tensor):
        return function(container)
    for key, old in entries_of(container).items():
        new = map_tensors(old, function)
        if new is not old:
            container = replace_entry(container, (key,), new)
    return container


def describe(container: Any) -> str:
    """Return the paths of a batch's entries, for a message."""
    paths = [".".join(map(str, path)) for path in _leaves(container, ())]
    more = f" and {len(paths) - _MAX_SHOWN} more" if len(paths) > _MAX_SHOWN else ""
    return f"{paths[:_MAX_SHOWN]}{more}"


def _leaves(container: Any, path: Path) -> Iterator[Path]:
    entries = {} if is_torchio_image(container) else entries_of(container)
    is_list = isinstance(container, Sequence) and not _is_named_tuple(container)
    if is_list and path and not any(entries_of(part) for part in entries.values()):
        entries = {}  # of one kind, like the paths of the files
    if path and not entries:
        yield path
    for key, part in entries.items():
        yield from _leaves(part, (*path, key))


def _key(entries: dict[Any, Any], place: Any) -> Path | None:
    """Return the key of an entry, as a path; a position may be negative or in letters."""
    if place in entries:
        return (place,)
    if entries and all(isinstance(key, int) for key in entries):
        digits = place.lstrip("-") if isinstance(place, str) else ""
        number = int(place) if digits.isdecimal() else place
        if isinstance(number, int) and -len(entries) <= number < len(entries):
            return ([*entries][number],)
    return None


def _is_mutable(container: Any) -> bool:
    if dataclasses.is_dataclass(container):
        return not container.__dataclass_params__.frozen  # type: ignore[union-attr]
    return isinstance(container, MutableMapping | MutableSequence) or (
        _is_torchio2_batch(container) or _is_torchio2_image(container)
    )


def _is_named_tuple(container: Any) -> bool:
    return isinstance(container, tuple) and hasattr(container, "_fields")


def _is_torchio2_batch(value: Any) -> bool:
    return type(value).__name__ == "SubjectsBatch" and isinstance(value.images, Mapping)


def _is_torchio2_image(value: Any) -> bool:
    return type(value).__name__ == "ImagesBatch" and isinstance(value.data, Tensor)
