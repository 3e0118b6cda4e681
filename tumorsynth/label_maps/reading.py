"""Read a label map from what the user gives: the name of a public set, a dict or a dataset.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from tumorsynth.arguments import is_bool, suggestion
from tumorsynth.label_maps.names import LabelMap, LabelMapLike
from tumorsynth.label_maps.published import PUBLISHED

EXAMPLE = "for example {'liver': 1, 'kidney': (2, 3)}"


def read_label_map(given: LabelMapLike | LabelMap) -> LabelMap | None:
    """Return a label map; None for None.

    Args:
        given: the name of a public set; a dict of names to values or of values to names; or the
            path of a dataset.json with such "labels", or of its folder.

    Raises:
        ValueError: for an unknown name, or a map that is malformed.
        TypeError: for anything else.
        FileNotFoundError: for a path that does not exist.
    """
    if given is None or isinstance(given, LabelMap):
        return given
    if isinstance(given, Mapping):
        return LabelMap("your dict", _checked(given, "label_map"))
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"label_map must be one of {', '.join(PUBLISHED)}, a dict or the path of a "
            f"dataset.json, got {str(given)[:80]!r}; pass {EXAMPLE}"
        )
    name = str(given).strip().lower().replace("_", "-").replace(" ", "-")
    if isinstance(given, str) and name in PUBLISHED:
        return LabelMap(name, PUBLISHED[name], is_complete=True)
    path = Path(given)
    if path.is_dir():
        path = path / "dataset.json"
    if path.is_file():
        return LabelMap(path.name, read_dataset_labels(path))
    if path.suffix == ".json" or isinstance(given, os.PathLike):
        raise FileNotFoundError(f"label_map: no such file: {path}; give a dataset.json that exists")
    raise ValueError(
        f"label_map must be one of {', '.join(PUBLISHED)}, a dict or the path of a dataset.json, "
        f"got {given!r}; {suggestion([name], PUBLISHED) or 'give one of them'}".rstrip()
    )


def read_dataset_labels(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the "labels" of a dataset.json of nnU-Net or the Decathlon: values of each name.

    Raises:
        ValueError: if it is malformed.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; repair it") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise ValueError(
            f'{path} must have "labels" with names and values, got {str(labels)[:80]}; add them, '
            f"{EXAMPLE}"
        )
    return _checked(labels, f"labels of {path.name}")


def _checked(labels: Mapping[Any, Any], what: str) -> dict[str, tuple[int, ...]]:
    """Return values by name, of a map of names to values or of values to names."""
    found: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        if isinstance(value, str) and not _is_number(value):  # {"1": "liver"}, as in the Decathlon
            key, value = value, key
        values = value if isinstance(value, list | tuple | set | frozenset) else [value]
        if (
            not isinstance(key, str)
            or not key.strip()
            or not values
            or not all(map(_is_number, values))
        ):
            raise ValueError(
                f"{what} must give each name whole numbers from 0, got {key!r}: "
                f"{str(value)[:80]!r}; "
                f"write {EXAMPLE}"
            )
        found[key] = tuple(sorted({*found.get(key, ()), *(int(v) for v in values)}))
    if not found:
        raise ValueError(f"{what} must name at least one value, got none; write {EXAMPLE}")
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isdigit()
    number: Any = Integral
    whole = isinstance(value, number) or isinstance(value, float) and value.is_integer()
    return whole and not is_bool(value) and 0 <= value < 2**63
