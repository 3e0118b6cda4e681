"""Find scans by the user's own pattern of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tumorsynth.scans.pairing import Pair, Places
from tumorsynth.scans.places import places_beneath

NAME = "{name}"
EXAMPLE = "for example --pattern 'img/{name}.nii.gz' 'seg/{name}_mask.nii.gz'"


def find_by_pattern(
    ct: Path, label: Path | None, pattern: Sequence[str]
) -> tuple[list[Pair], list[Path]]:
    """Find the CTs of a pattern with the label of each, and labels without a CT.

    Args:
        ct: the folder that the first pattern starts from.
        label: the folder that the second starts from; None for the same.
        pattern: paths of a CT and of its label, with {name} in both; * stands for any text.

    Raises:
        ValueError: if a pattern has no {name}, or no CT matches.
    """
    root = label or ct
    if not ct.is_dir() or not root.is_dir():
        raise ValueError(
            f"--pattern goes with folders, got {ct if not ct.is_dir() else root}; give the folder "
            "that the patterns start from"
        )
    for one in pattern:
        if NAME not in one or Path(one).is_absolute() or ".." in Path(one).parts:
            raise ValueError(
                f"--pattern must be two paths below the folder with {NAME} in each, got {one!r}; "
                f"give {EXAMPLE}"
            )
    matches = _matching(ct, pattern[0])
    labels = _matching(root, pattern[1])
    if not matches:
        raise ValueError(
            f"--pattern must match the CTs, but {pattern[0]!r} matches no file in {ct}; give "
            f"{EXAMPLE}"
        )
    if not matches.keys() & labels.keys():
        raise ValueError(
            f"--pattern must match CTs and labels of one name, but {pattern[0]!r} matches "
            f"{_some(matches)} and {pattern[1]!r} {_some(labels)}; correct the second"
        )
    pairs = []
    for name, path in matches.items():
        found = labels.get(name, root / pattern[1].replace(NAME, name))
        places = places_beneath((ct, root), path, found)
        if places.ct == places.label:  # equal names in two folders
            places = Places(f"images/{places.ct}", f"labels/{places.label}")
        pairs.append(Pair(name.replace("/", "_"), path, found, places))
    return pairs, [path for name, path in labels.items() if name not in matches]


def _matching(folder: Path, pattern: str) -> dict[str, Path]:
    """The paths below a folder that match, by what {name} stands for."""
    first, *others = (re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split(NAME))
    named = re.compile(first + "(?P<name>[^/]+?)" + "(?P=name)".join(others))
    found: dict[str, Path] = {}
    # "{name}*" must not become "**", which stands for folders
    parts = [
        re.sub(r"\*+", "*", part.replace(NAME, "*")) if NAME in part else part
        for part in pattern.split("/")
    ]
    for path in sorted(folder.glob("/".join(parts))):
        match = named.fullmatch(path.relative_to(folder).as_posix())
        if match is None or path.name.startswith("."):
            continue
        name = match["name"]
        if name in found:
            raise ValueError(
                f"--pattern must give each scan its own name, but {found[name]} and {path} are "
                f"both {name!r}; make the pattern longer"
            )
        found[name] = path
    return found


def _some(names: dict[str, Path]) -> str:
    listed = ", ".join(list(names)[:3])
    return f"{listed}, ..." if len(names) > 3 else listed or "no file"
